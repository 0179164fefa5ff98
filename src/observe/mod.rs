//! What the data plane writes for the operator: [`counters`], and log lines through the [`log_sink`].
//!
//! A leaf: it knows no other folder. `metrics` reads the counters.

pub mod counters;
pub mod log_sink;
