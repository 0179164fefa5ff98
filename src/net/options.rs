//! Socket options that several parts set.

use std::num::NonZeroU32;
use std::time::Duration;

use socket2::TcpKeepalive;

/// Returns keepalive settings: the first probe after `idle` of silence, then one every `interval`, until
/// `probes` of them were not answered.
#[must_use]
pub fn tcp_keepalive(idle: Duration, interval: Duration, probes: NonZeroU32) -> TcpKeepalive {
    TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes.get())
}
