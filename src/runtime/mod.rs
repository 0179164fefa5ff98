//! Threads, phases and pauses: what both planes run on.

pub mod backoff;
pub mod drain;
pub mod resolve;
pub mod worker;
