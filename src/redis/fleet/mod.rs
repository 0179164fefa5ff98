//! What each proxy of a fleet reports in Redis, for the operator's commands: which table it has applied, and
//! which backends get no sessions from it.

pub mod applied;
pub(in crate::redis) mod content;
mod reports;
pub(in crate::redis) mod unusable;
