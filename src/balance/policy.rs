//! What a pool makes of its table, beside the weights: the same for as long as the process lives.

use std::num::NonZeroU32;
use std::time::Duration;

use super::Balance;
use super::queue::Capacity;

/// How a pool's table becomes a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// How a backend is chosen.
    pub balance: Balance,
    /// Where less of the weight than this (0 to 1) is on healthy backends, health is ignored. 0: only where none is healthy.
    pub fail_open: f64,
    /// How long a backend that joined or recovered takes to its whole weight. Zero: none.
    pub slow_start: Duration,
    /// When a backend that fails sessions gets none for a while. `None`: never.
    pub outlier: Option<Outlier>,
    /// How many sessions a backend may have, and who waits for a place.
    pub capacity: Capacity,
    /// After so long the sessions of a backend that is leaving are closed. Zero: never.
    pub drain_timeout: Duration,
}

/// When a backend is ejected for what its sessions saw: `pools.*.outlier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlier {
    /// So many sessions in a row that failed.
    pub consecutive_failures: NonZeroU32,
    /// How long the first time; each further time longer by as much.
    pub ejection: Duration,
    /// Of the pool's backends, by number; more are not ejected at once.
    pub max_ejected_percent: u32,
}

impl From<Balance> for Policy {
    /// The rest as if there were no health, no limits and no drain.
    fn from(balance: Balance) -> Self {
        Self {
            balance,
            fail_open: 0.0,
            slow_start: Duration::ZERO,
            outlier: None,
            capacity: Capacity::default(),
            drain_timeout: Duration::ZERO,
        }
    }
}
