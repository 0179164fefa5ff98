//! Finds a backend that takes the session: picks, connects, and on a failure that another backend may not share,
//! excludes the one that failed and picks again. All of it happens before the first byte was sent.

use std::io;
use std::net::SocketAddr;
use std::sync::LazyLock;

use socket2::SockRef;
use tokio::net::{TcpSocket, UnixStream};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::Context;
use super::report::{CloseReason, Report};
use crate::balance::backend::{Backend, Endpoint};
use crate::config::Keepalive;
use crate::listen::socket::{exhausted, tcp_keepalive};
use crate::relay::Stream;

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("its name has not been resolved")]
    Unresolved,
    #[error("no answer in time")]
    TimedOut,
    /// Refused, unreachable, reset: its fault, and another backend may do better.
    #[error(transparent)]
    Failed(io::Error),
    #[error("the kernel connected the socket to itself: nothing listens on that port of this machine")]
    ToItself,
    /// Ours, not the backend's: the next attempt would fail too.
    #[error("no local port or descriptor left: {0}")]
    Exhausted(io::Error),
}

/// Connects to a backend of the session's pool, trying up to `connect.attempts` different ones until
/// `connect.deadline`.
///
/// # Errors
/// Why there is none; each failed attempt was counted.
///
/// # Cancel safety
/// Dropping the future closes a half-open socket.
pub(super) async fn connect(context: &Context, report: &mut Report) -> Result<Stream, CloseReason> {
    let settings = &context.settings.connect;
    let begun = Instant::now();
    let deadline = begun + settings.deadline;
    let mut tried = Vec::new();
    let mut reason = CloseReason::NoBackend;

    for attempt in 0..settings.attempts.get() {
        let asked = Instant::now();
        let pick = context.pool.pick(&tried, context.worker.random(), asked).await;
        report.queue_time += asked.elapsed();
        let Some(pick) = pick else { break };
        let backend = pick.backend.clone();
        report.retries = attempt;
        report.picked(pick);

        let started = Instant::now();
        let result =
            connect_once(&backend, (started + settings.timeout).min(deadline), context.settings.keepalive)
                .await;
        report.connect_time = begun.elapsed().saturating_sub(report.queue_time);
        let error = match result {
            Ok(stream) => {
                report.connected(started.elapsed());
                return Ok(stream);
            }
            Err(error) => error,
        };

        let counters = backend.counters.of(context.worker.id);
        debug!(pool = %context.pool.name, backend = %backend.id(), %error, "connect failed");
        reason = match error {
            ConnectError::Exhausted(error) => {
                context.worker.warn_exhausted(&error);
                return Err(CloseReason::Exhausted);
            }
            ConnectError::TimedOut => CloseReason::ConnectTimeout,
            _ => CloseReason::ConnectFailed,
        };
        counters.connect_failures.add(1);
        if Instant::now() >= deadline {
            break;
        }
        if attempt + 1 < settings.attempts.get() {
            counters.retries.add(1);
            tried.push(backend.id().clone());
        }
    }
    Err(reason)
}

async fn connect_once(
    backend: &Backend,
    deadline: Instant,
    keepalive: Keepalive,
) -> Result<Stream, ConnectError> {
    let connecting = async {
        match backend.endpoint() {
            None => Err(ConnectError::Unresolved),
            Some(Endpoint::Tcp(address)) => connect_tcp(address, keepalive).await,
            Some(Endpoint::Unix(path)) => Ok(UnixStream::connect(path).await.map_err(classify)?.into()),
        }
    };
    timeout_at(deadline, connecting).await.unwrap_or(Err(ConnectError::TimedOut))
}

async fn connect_tcp(address: SocketAddr, keepalive: Keepalive) -> Result<Stream, ConnectError> {
    let socket =
        if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(classify)?;
    socket.set_nodelay(true).map_err(classify)?;
    SockRef::from(&socket).set_tcp_keepalive(&tcp_keepalive(keepalive)).map_err(classify)?;
    let stream = socket.connect(address).await.map_err(classify)?;
    // A simultaneous open with oneself needs the kernel to choose the very port that is called, so only ports of its
    // own range are worth the system call.
    if address.port() >= *FIRST_LOCAL_PORT && stream.local_addr().is_ok_and(|local| local == address) {
        return Err(ConnectError::ToItself);
    }
    Ok(stream.into())
}

/// The lowest port that the kernel chooses for outgoing connections by itself; 0 if it does not say.
static FIRST_LOCAL_PORT: LazyLock<u16> = LazyLock::new(|| {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
});

fn classify(error: io::Error) -> ConnectError {
    if exhausted(&error) || error.kind() == io::ErrorKind::AddrNotAvailable {
        ConnectError::Exhausted(error)
    } else if error.kind() == io::ErrorKind::TimedOut {
        ConnectError::TimedOut
    } else {
        ConnectError::Failed(error)
    }
}
