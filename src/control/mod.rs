//! What the tasks of the control plane are built from.
//!
//! Pauses between tries ([`backoff`]), limits on how often a line is logged ([`log_limiter`]), threads for
//! work that may block ([`blocking`]) and the tokio runtime of a control-plane thread ([`runtime`]). A leaf:
//! it knows no other folder.

pub mod backoff;
pub mod blocking;
pub mod log_limiter;
pub mod runtime;
