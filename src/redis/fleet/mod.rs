//! What the proxies of a fleet tell each other through Redis: which table each has applied, and which
//! backends it does not use.

pub mod applied;
pub(in crate::redis) mod content;
mod reports;
pub(in crate::redis) mod unusable;
