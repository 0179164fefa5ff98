//! What a pool makes of its table, beside the weights: the same for as long as the process lives.

use std::num::NonZeroU32;
use std::time::Duration;

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

/// How many sessions a backend may have, and who waits for a place: `pools.*.max_connections` and `queue`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Of one backend; 0: any number.
    pub max_connections: u32,
    /// Sessions of the pool that wait at most.
    pub queue_size: u32,
    /// How long each waits at most.
    pub queue_timeout: Duration,
}

/// How a pool chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Each pick is independent.
    WeightedRandom,
    /// Picks are spread evenly: after any number of them each backend is within a few sessions of its exact share.
    WeightedRoundRobin,
    /// The backend with the fewest active sessions for its weight: of all, or in large pools of some that are drawn by weight.
    LeastConn,
    /// A client's address always leads to the same backend, on every proxy of the fleet.
    SourceHash,
}

impl Balance {
    /// As in config.yaml.
    pub const NAMES: [(&'static str, Self); 4] = [
        (Self::WeightedRandom.name(), Self::WeightedRandom),
        (Self::WeightedRoundRobin.name(), Self::WeightedRoundRobin),
        (Self::LeastConn.name(), Self::LeastConn),
        (Self::SourceHash.name(), Self::SourceHash),
    ];

    /// As in config.yaml.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WeightedRandom => "weighted_random",
            Self::WeightedRoundRobin => "weighted_round_robin",
            Self::LeastConn => "least_conn",
            Self::SourceHash => "source_hash",
        }
    }
}
