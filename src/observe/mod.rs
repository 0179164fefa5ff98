//! What is written for the operator: [`counters`] of the data plane, restarts of [`tasks`], and log lines
//! through the [`log_sink`].
//!
//! A leaf: it knows no other folder. `metrics` reads the counters.

pub mod counters;
pub mod log_sink;
pub mod tasks;
