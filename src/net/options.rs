//! Options of sockets.

use std::num::NonZeroU32;
use std::time::Duration;

use socket2::TcpKeepalive;

/// In the socket library's terms.
#[must_use]
pub fn tcp_keepalive(idle: Duration, interval: Duration, probes: NonZeroU32) -> TcpKeepalive {
    TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes.get())
}
