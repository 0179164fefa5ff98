//! The settings of one pool.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use super::{Congestion, Keepalive};
use crate::balance::Capacity;
use crate::balance::{BackendId, Balance, Outlier, Policy, Weight};

/// One entry of `pools`.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Its key in the file.
    pub name: Arc<str>,
    /// The key of the sorted set in Redis.
    pub weights_key: String,
    /// The table that is used without Redis, and until there is a table from Redis. Each backend occurs once.
    pub backends: Vec<(BackendId, Weight)>,
    /// How a backend is chosen.
    pub balance: Balance,
    /// How a backend is reached.
    pub connect: Connect,
    /// A session that moves no byte for this long is closed; `None` is no limit.
    pub idle_timeout: Option<Duration>,
    /// The idle limit of a session of which one side has closed its half.
    pub half_close_timeout: Duration,
    /// TCP keepalive on both sides.
    pub keepalive: Keepalive,
    /// The congestion control towards the backends; `None` leaves the system's.
    pub tcp_congestion: Option<Congestion>,
    /// The active health check; `None` is none.
    pub health_check: Option<HealthCheck>,
    /// When a backend that fails sessions is ejected for a while; `None` is never.
    pub outlier: Option<Outlier>,
    /// Health is ignored while healthy backends have less than this share (0 to 1) of the weight.
    pub fail_open: f64,
    /// How long a backend that joined or recovered takes to reach its whole weight; zero gives it at once.
    pub slow_start: Duration,
    /// How many sessions a backend may have, and how many may wait for a slot.
    pub capacity: Capacity,
    /// How long sessions of a draining backend may go on; zero is no limit. A backend drains when it was
    /// removed, has weight 0, or is in drain or maint.
    pub drain_timeout: Duration,
}

impl Pool {
    /// The settings by which the pool makes snapshots of its table.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let Self { balance, outlier, fail_open, slow_start, capacity, drain_timeout, .. } = *self;
        Policy { balance, fail_open, slow_start, outlier, capacity, drain_timeout }
    }
}

/// The active health check of a pool: `pools.*.health_check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The time from the start of one check to the start of the next, or up to a fifth less.
    pub interval: Duration,
    /// The limit for connecting, sending and the expected answer together, for each address of a name.
    pub timeout: Duration,
    /// How many checks in a row must pass before an unhealthy backend is healthy.
    pub rise: NonZeroU32,
    /// How many checks in a row must fail before a healthy backend is unhealthy.
    pub fall: NonZeroU32,
    /// The port to check, in place of the backend's own.
    pub port: Option<u16>,
    /// What is sent after the connect.
    pub send: Option<Arc<[u8]>>,
    /// What must be found in the backend's answer; `None` passes a backend that accepts the connection.
    pub expect: Option<Arc<[u8]>>,
}

/// How a backend is reached: `pools.*.connect`.
#[derive(Clone, Copy, Debug)]
pub struct Connect {
    /// The limit for one attempt.
    pub timeout: Duration,
    /// How many backends are tried for one session.
    pub attempts: NonZeroU32,
    /// The limit for all attempts together.
    pub deadline: Duration,
}
