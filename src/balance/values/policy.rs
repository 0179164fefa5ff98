//! The settings of a pool that decide how its table is used. They stay the same for as long as the process
//! lives.

use std::num::NonZeroU32;
use std::time::Duration;

/// How a pool uses its table.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// How a backend is chosen for a session.
    pub balance: Balance,
    /// Health is ignored while the healthy backends have less than this part (0 to 1) of the weight. 0: only
    /// while no backend is healthy.
    pub fail_open: f64,
    /// The time over which the weight of a backend that joined or recovered grows to its whole. Zero: it has
    /// its whole weight at once.
    pub slow_start: Duration,
    /// When a backend is ejected because sessions failed at it. `None`: never.
    pub outlier: Option<Outlier>,
    /// How many sessions a backend may have, and how many may wait.
    pub capacity: Capacity,
    /// The sessions of a draining backend are closed after this time. Zero: never.
    pub drain_timeout: Duration,
}

/// When a backend is ejected because its sessions failed, and for how long: `pools.*.outlier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlier {
    /// The number of failures in a row that ejects.
    pub consecutive_failures: NonZeroU32,
    /// How long the first ejection lasts. The second in succession lasts twice as long, the third three
    /// times, and so on up to 30 times.
    pub ejection: Duration,
    /// An ejection must not make more than this part of the pool's addresses unusable. Addresses that are
    /// unusable for another reason count too, and a DNS name counts with each of its addresses.
    pub max_ejected_percent: u32,
}

impl From<Balance> for Policy {
    /// A pool without health settings, limits and drain.
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

/// How many sessions a backend may have, and how many sessions wait while all are full:
/// `pools.*.max_connections` and `queue`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// The limit of one backend. 0: no limit.
    pub max_connections: u32,
    /// The number of sessions of the pool that may wait.
    pub queue_size: u32,
    /// The longest time that a session waits.
    pub queue_timeout: Duration,
}

/// How a pool chooses a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Each pick is independent.
    WeightedRandom,
    /// Picks are spread evenly: after any number of them, each backend is within a few sessions of its exact
    /// share.
    WeightedRoundRobin,
    /// The backend with the fewest active sessions for its weight is picked: of all backends, or in large
    /// pools of some that are drawn by weight.
    LeastConn,
    /// The address of a client leads to the same backend on every proxy of the fleet, as long as the
    /// effective weights are the same.
    SourceHash,
}

impl Balance {
    /// The names in config.yaml.
    pub const NAMES: [(&'static str, Self); 4] = [
        (Self::WeightedRandom.name(), Self::WeightedRandom),
        (Self::WeightedRoundRobin.name(), Self::WeightedRoundRobin),
        (Self::LeastConn.name(), Self::LeastConn),
        (Self::SourceHash.name(), Self::SourceHash),
    ];

    /// The name in config.yaml.
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
