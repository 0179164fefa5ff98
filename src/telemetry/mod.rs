//! What the person on call sees: [`counters`] that the data plane writes, [`prometheus`] that reads them, the
//! [`access_log`] and its [`log_sink`], and the [`admin`] server.

pub mod accept;
pub mod access_log;
pub mod admin;
pub mod counters;
mod exposition;
pub mod log_sink;
pub mod prometheus;
mod scrapes;
