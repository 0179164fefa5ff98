//! The settings of one pool.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use super::{Congestion, Keepalive};
use crate::balance::queue::Capacity;
use crate::balance::{BackendId, Balance, Outlier, Policy, Weight};

/// One entry of `pools`.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The key it stands under.
    pub name: Arc<str>,
    /// The sorted set in Redis.
    pub weights_key: String,
    /// Used until Redis has answered; each backend once.
    pub backends: Vec<(BackendId, Weight)>,
    /// How a backend is chosen.
    pub balance: Balance,
    /// How a backend is reached.
    pub connect: Connect,
    /// A session that moves no byte for this long is closed; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// The same, once one side has closed its half.
    pub half_close_timeout: Duration,
    /// TCP keepalive on both sides.
    pub keepalive: Keepalive,
    /// Towards the backends; `None`: the system's.
    pub tcp_congestion: Option<Congestion>,
    /// How backends are asked whether they live; `None`: they are not.
    pub health_check: Option<HealthCheck>,
    /// When a backend that fails sessions gets none for a while; `None`: never.
    pub outlier: Option<Outlier>,
    /// Where less of the weight than this (0 to 1) is on healthy backends, health is ignored.
    pub fail_open: f64,
    /// How long a backend that joined or recovered takes to its whole weight; zero: it has it at once.
    pub slow_start: Duration,
    /// How many sessions a backend may have, and who waits for a place.
    pub capacity: Capacity,
    /// After so long the sessions of a backend that was removed, or has weight 0, are closed; zero: never.
    pub drain_timeout: Duration,
}

impl Pool {
    /// What the pool makes of its table.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let Self { balance, outlier, fail_open, slow_start, capacity, drain_timeout, .. } = *self;
        Policy { balance, fail_open, slow_start, outlier, capacity, drain_timeout }
    }
}

/// How a backend is asked whether it lives: `pools.*.health_check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// From the begin of a check to the next one's, or up to a fifth less.
    pub interval: Duration,
    /// For connecting, sending and what is expected together, at each address of a name.
    pub timeout: Duration,
    /// So many checks in a row must pass before a backend that failed is healthy.
    pub rise: NonZeroU32,
    /// So many must fail before one that passed is not.
    pub fall: NonZeroU32,
    /// Asked instead of the backend's own.
    pub port: Option<u16>,
    /// Sent after the connect.
    pub send: Option<Arc<[u8]>>,
    /// To be found in what the backend says then; `None`: it passes once it has connected.
    pub expect: Option<Arc<[u8]>>,
}

/// How a backend is reached: `pools.*.connect`.
#[derive(Clone, Copy, Debug)]
pub struct Connect {
    /// For one attempt.
    pub timeout: Duration,
    /// Backends tried for one session.
    pub attempts: NonZeroU32,
    /// For all attempts together.
    pub deadline: Duration,
}
