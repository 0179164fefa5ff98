//! What a pick yields: a backend with the source that named it, or why there is none.

use crate::balance::backend::{Active, TrialPermit};
use crate::balance::values::Weight;
use crate::observe::counters::Counter;

/// Where a pick came from. Log and metrics use [`Source::name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A fresh snapshot of a table from Redis.
    Snapshot,
    /// Redis, by the Lua script.
    Lua,
    /// The last snapshot from Redis, however old, or one that was saved before this process began.
    Stale,
    /// The `backends` of config.yaml.
    Configured,
}

impl Source {
    /// In the order of declaration.
    pub const ALL: [Self; 4] = [Self::Snapshot, Self::Lua, Self::Stale, Self::Configured];

    /// The name in the metric's label and in the access log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Lua => "lua",
            Self::Stale => "stale",
            Self::Configured => "configured",
        }
    }
}

/// What one worker counts of one pool.
#[derive(Debug, Default)]
pub struct PoolCounters {
    /// Picks by [`Source`].
    pub picks: [Counter; 4],
    /// Sessions that waited in the queue.
    pub queued: Counter,
}

/// A backend for a session.
#[derive(Debug)]
pub struct Pick {
    /// The session's slot at the backend.
    pub backend: Active,
    /// The permit of the trial session, if the session is one. The backend gets no other trial session until
    /// [`Pool::report_trial`](super::Pool::report_trial) is told how it ended.
    pub trial: Option<TrialPermit>,
    /// The weight that the backend was picked by.
    pub weight: Weight,
    /// Where the pick came from.
    pub source: Source,
}

/// Why there is no backend for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPick {
    /// No backend has weight, or none is left to try.
    NoBackend,
    /// All slots are taken, or other sessions wait for one already.
    Full,
}
