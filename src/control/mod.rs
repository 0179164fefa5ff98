//! What the tasks of the control plane are built from.
//!
//! Pauses between tries ([`backoff`]), limits on how often a line is logged ([`log_limiter`]), threads for
//! work that may block ([`blocking`]), the tokio runtime of a control-plane thread ([`runtime`]), restarts of
//! a task that ends ([`supervised`]) and the watch over one that blocks ([`watchdog`]).

pub mod backoff;
pub mod blocking;
pub mod log_limiter;
pub mod runtime;
pub mod supervised;
pub mod watchdog;
