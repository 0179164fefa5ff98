//! One attempt to connect to one backend: to its address, or to the usable addresses of its name in turn.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::time::Instant;
use tracing::debug;

use super::Context;
use super::report::Report;
use crate::balance::Address;
use crate::balance::backend::{Backend, Cause, Endpoint, Failure};
use crate::config::Congestion;
use crate::net::descriptors::{User, is_reserved};
use crate::net::errors::exhausted;
use crate::reactor::{Elapsed, sleep, timeout_at};
use crate::relay::{Opening, Stream, StreamSocket};

/// Between two tries where a descriptor, or a place in a unix socket's queue, may become free at any moment.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("its name has not been resolved")]
    Unresolved,
    #[error("no answer in time")]
    TimedOut,
    /// Refused, unreachable, reset: its fault, and another backend may do better.
    #[error(transparent)]
    Failed(io::Error),
    #[error("the kernel connected the socket to itself: nothing listens on that port of this machine")]
    ToItself,
    /// Ours, but only towards this address: every destination has local ports of its own, and IPv4 has addresses where
    /// IPv6 has none.
    #[error("no local port or address for a connection there: {0}")]
    NoLocalPort(io::Error),
    /// Ours: no backend can be reached without a descriptor.
    #[error("no descriptor or memory left: {0}")]
    Exhausted(io::Error),
}

impl ConnectError {
    pub(super) fn cause(&self) -> Cause {
        match self {
            Self::Unresolved => Cause::UNRESOLVED,
            Self::TimedOut => Cause::TIMED_OUT,
            Self::ToItself => Cause::TO_ITSELF,
            Self::Failed(error) | Self::NoLocalPort(error) | Self::Exhausted(error) => error.into(),
        }
    }
}

/// Connects to `backend` once: to its own address, or to the usable addresses of its name in turn. `now` is when that begins.
pub(super) async fn connect_to(
    report: &mut Report,
    backend: &Backend,
    context: &Context,
    mut now: Instant,
    deadline: Instant,
) -> Result<Stream, ConnectError> {
    let destination = match backend.id().address() {
        Address::Socket(address) => Destination::Tcp(address),
        Address::Unix(path) => Destination::Unix(path),
        // Boxed: what a name needs would make the allocation of each session larger.
        Address::Name { .. } => {
            return Box::pin(connect_to_name(report, backend, context, now, deadline)).await;
        }
    };
    connect_once(report, destination, context, &mut now, context.settings.connect.timeout, deadline).await
}

/// The usable addresses of a backend's name in turn, each with its part of `connect.timeout`.
async fn connect_to_name(
    report: &mut Report,
    backend: &Backend,
    context: &Context,
    mut now: Instant,
    deadline: Instant,
) -> Result<Stream, ConnectError> {
    let mut route = backend.route(report.trial_permit());
    let limit = context.settings.connect.timeout / u32::try_from(route.len().max(1)).unwrap_or(u32::MAX);
    let mut error = ConnectError::Unresolved;
    while !route.is_empty() {
        let permit = route.take_permit();
        report.set_address(route.address(), permit);
        let Some(endpoint) = route.endpoint() else { break };
        error = match connect_once(report, endpoint.into(), context, &mut now, limit, deadline).await {
            Ok(stream) => return Ok(stream),
            Err(error @ ConnectError::Exhausted(_)) => return Err(error),
            Err(error) => error,
        };
        route.advance();
    }
    Err(error)
}

/// Connects to one address, within `limit` from `now` on, which becomes the time at which the attempt ended. A failure of the
/// address is counted. Where only a descriptor is missing it is waited for, until `deadline`: another backend would need one too.
async fn connect_once(
    report: &mut Report,
    destination: Destination<'_>,
    context: &Context,
    now: &mut Instant,
    limit: Duration,
    deadline: Instant,
) -> Result<Stream, ConnectError> {
    loop {
        let until = (*now + limit).min(deadline);
        let congestion = context.settings.congestion.as_ref();
        let opened = match destination {
            Destination::Tcp(address) => timeout_at(until, open_tcp(address, congestion)).await,
            // Boxed: its address and its timer would make what all sessions allocate too large for the allocator's cache.
            Destination::Unix(path) => Box::pin(timeout_at(until, open_unix(path))).await,
        };
        let error = match opened {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(ConnectError::Exhausted(error))) => {
                context.worker.begin_starvation();
                if Instant::now() + RETRY_PAUSE >= deadline {
                    return Err(ConnectError::Exhausted(error));
                }
                sleep(RETRY_PAUSE).await;
                *now = Instant::now();
                continue;
            }
            Ok(Err(error)) => error,
            Err(Elapsed) => ConnectError::TimedOut,
        };
        let ended = Instant::now();
        // An address that was given less time than it may take has shown nothing, nor has one that no local port was left for.
        let is_fault = match error {
            ConnectError::NoLocalPort(_) => false,
            ConnectError::TimedOut => ended - *now >= limit,
            _ => true,
        };
        if is_fault {
            report.report_failure(Failure::Connect, error.cause());
        }
        *now = ended;
        return Err(error);
    }
}

/// Where one attempt connects to.
///
/// Borrowed, since each future that a session's connect consists of has a copy.
#[derive(Clone, Copy, Debug)]
enum Destination<'a> {
    Tcp(&'a SocketAddr),
    Unix(&'a PathBuf),
}

impl<'a> From<&'a Endpoint> for Destination<'a> {
    fn from(endpoint: &'a Endpoint) -> Self {
        match endpoint {
            Endpoint::Tcp(address) => Self::Tcp(address),
            Endpoint::Unix(path) => Self::Unix(path),
        }
    }
}

async fn open_tcp(address: &SocketAddr, congestion: Option<&Congestion>) -> Result<Stream, ConnectError> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
        .map_err(classify)?;
    leave_reserve(&socket)?;
    if let Some(congestion) = congestion {
        // The start has checked that the kernel has it. One who takes it away later loses speed, not the pool.
        let _ = socket
            .set_tcp_congestion(congestion.name().as_bytes())
            .inspect_err(|error| debug!(%error, name = congestion.name(), "tcp_congestion cannot be set"));
    }
    let opening = Opening::before_connect(&socket);
    if let Err(error) = socket.connect(&SockAddr::from(*address))
        && Errno::from_io_error(&error) != Some(Errno::INPROGRESS)
    {
        return Err(classify(error));
    }
    // From here on a drop resets the connection. It may be established already when the client is reset.
    let mut stream = Stream::opened(StreamSocket::tcp(socket).map_err(classify)?, opening);
    if let Err(error) = stream.connected().await {
        stream.finish();
        return Err(classify(error));
    }
    // A simultaneous open with oneself needs the kernel to choose the very port that is called, so only ports of its
    // own range are worth the system call.
    if address.port() >= *FIRST_LOCAL_PORT && stream.local_address() == Some(*address) {
        return Err(ConnectError::ToItself);
    }
    Ok(stream)
}

/// Fails where `socket` has one of the last descriptors, which are the control plane's, as the kernel would without them.
fn leave_reserve(socket: &Socket) -> Result<(), ConnectError> {
    if is_reserved(socket, User::Sessions) {
        return Err(ConnectError::Exhausted(Errno::MFILE.into()));
    }
    Ok(())
}

/// A unix socket whose queue is full says so at once, where TCP would send its handshake again: so it is asked again.
async fn open_unix(path: &Path) -> Result<Stream, ConnectError> {
    let address = SockAddr::unix(path).map_err(classify)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(classify)?;
    leave_reserve(&socket)?;
    loop {
        match socket.connect(&address) {
            Ok(()) => {
                return Ok(Stream::opened(StreamSocket::unix(socket).map_err(classify)?, Opening::Over));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(RETRY_PAUSE).await,
            Err(error) => return Err(classify(error)),
        }
    }
}

/// The lowest port that the kernel chooses for outgoing connections by itself; 0 if it does not say.
static FIRST_LOCAL_PORT: LazyLock<u16> = LazyLock::new(|| {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
});

fn classify(error: io::Error) -> ConnectError {
    match error.kind() {
        _ if exhausted(&error) => ConnectError::Exhausted(error),
        io::ErrorKind::AddrNotAvailable => ConnectError::NoLocalPort(error),
        io::ErrorKind::TimedOut => ConnectError::TimedOut,
        _ => ConnectError::Failed(error),
    }
}
