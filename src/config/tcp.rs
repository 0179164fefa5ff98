//! The settings of TCP itself: keepalive and congestion control.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

/// TCP keepalive: `pools.*.keepalive`.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    /// The silence before the first probe. Whole seconds, at least 1.
    pub idle: Duration,
    /// The time between probes. Whole seconds, at least 1.
    pub interval: Duration,
    /// How many probes may stay unanswered before the connection counts as dead.
    pub probes: NonZeroU32,
}

impl Keepalive {
    /// How long a peer that is probed may stay silent before it counts as vanished.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.idle.saturating_add(self.interval.saturating_mul(self.probes.get()))
    }
}

/// The name of a TCP congestion control algorithm, like `cubic` or `bbr`. The kernel may lack it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Congestion(Arc<str>);

/// TCP_CA_NAME_MAX in include/net/tcp.h, without the final zero.
const CONGESTION_MAX_BYTES: usize = 15;

impl Congestion {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Congestion {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_name = !text.is_empty()
            && text.len() <= CONGESTION_MAX_BYTES
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
        is_name.then(|| Self(text.into())).ok_or(())
    }
}
