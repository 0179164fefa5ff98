//! One attempt to connect to one backend: to its address, or to the usable addresses of its name in turn.
//!
//! Which backend is tried, and what follows a failure, is decided in `connect.rs`.

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

/// The pause before a try is repeated, while a descriptor or room in a unix socket's queue may become free.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("the backend's name has not been resolved")]
    Unresolved,
    #[error("no answer in time")]
    TimedOut,
    /// The backend refused or reset the connection or cannot be reached. Another backend may work.
    #[error(transparent)]
    Failed(io::Error),
    #[error("the kernel connected the socket to itself: nothing listens on that port of this machine")]
    ToItself,
    /// This machine lacks something, but only for connections to this address: each destination has local
    /// ports of its own, and IPv4 may have a local address where IPv6 has none.
    #[error("no local port or address for a connection there: {0}")]
    NoLocalPort(io::Error),
    /// This machine lacks something that a connection to any backend needs.
    #[error("no descriptor or memory left: {0}")]
    Exhausted(io::Error),
}

impl ConnectError {
    /// The cause as the metrics and the access log name it.
    pub(super) fn cause(&self) -> Cause {
        match self {
            Self::Unresolved => Cause::UNRESOLVED,
            Self::TimedOut => Cause::TIMED_OUT,
            Self::ToItself => Cause::TO_ITSELF,
            Self::Failed(error) | Self::NoLocalPort(error) | Self::Exhausted(error) => error.into(),
        }
    }
}

/// Connects to `backend` once: to its address, or to the usable addresses of its name in turn. `now` is the
/// time of the call.
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
        // Boxed, so that sessions with plain addresses allocate less.
        Address::Name { .. } => {
            return Box::pin(connect_to_name(report, backend, context, now, deadline)).await;
        }
    };
    connect_once(report, destination, context, &mut now, context.settings.connect.timeout, deadline).await
}

/// Tries the usable addresses of a backend's name in turn. Each gets an equal part of `connect.timeout`.
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

/// Connects to one address, within `limit` from `now`. After a failed attempt, `now` is the time at which
/// it ended.
///
/// Reports a failure that is the fault of the address. If no descriptor is left, waits for one until
/// `deadline`, because another backend would need one, too.
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
            // Boxed: its address and its timer would make the allocation of all sessions too large for the
            // allocator's cache.
            Destination::Unix(path) => Box::pin(timeout_at(until, open_unix(path))).await,
        };
        let error = match opened {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(ConnectError::Exhausted(error))) => {
                context.worker.begin_starvation();
                // Now and not only at the deadline: meanwhile no worker accepts.
                report.warn_exhausted(&error);
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
        // Two failures are not the fault of the address: a timeout after less than `limit`, and a lack of
        // local ports.
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

/// The address of one attempt.
///
/// Borrowed, because each future of a session's connect stage has a copy.
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

/// Opens a TCP connection to `address`.
async fn open_tcp(address: &SocketAddr, congestion: Option<&Congestion>) -> Result<Stream, ConnectError> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
        .map_err(classify)?;
    check_not_reserved(&socket)?;
    if let Some(congestion) = congestion {
        // The kernel had this congestion control at the start. If it was removed since, the session only
        // loses speed.
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
    // From here on, dropping the stream resets the connection, which may be established by the time the
    // client is reset.
    let mut stream = Stream::opened(StreamSocket::tcp(socket).map_err(classify)?, opening);
    if let Err(error) = stream.connected().await {
        stream.finish();
        return Err(classify(error));
    }
    // A socket can connect to itself only if the kernel chooses the called port as its local port. So the
    // system call is made only for ports that the kernel chooses from.
    if address.port() >= *FIRST_LOCAL_PORT && stream.local_address() == Some(*address) {
        return Err(ConnectError::ToItself);
    }
    Ok(stream)
}

/// Fails like the kernel without a free descriptor (EMFILE), if the descriptor of `socket` is reserved for
/// the control plane.
fn check_not_reserved(socket: &Socket) -> Result<(), ConnectError> {
    if is_reserved(socket, User::Sessions) {
        return Err(ConnectError::Exhausted(Errno::MFILE.into()));
    }
    Ok(())
}

/// Opens a connection to the unix socket at `path`. While the socket's queue is full, connect fails at
/// once, where TCP would repeat its handshake. So this function repeats the connect.
async fn open_unix(path: &Path) -> Result<Stream, ConnectError> {
    let address = SockAddr::unix(path).map_err(classify)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(classify)?;
    check_not_reserved(&socket)?;
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

/// The lowest port that the kernel chooses for outgoing connections, or 0 if it is not known.
static FIRST_LOCAL_PORT: LazyLock<u16> = LazyLock::new(|| {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
});

/// Sorts the errors of the socket calls by what the session does after them.
fn classify(error: io::Error) -> ConnectError {
    match error.kind() {
        _ if exhausted(&error) => ConnectError::Exhausted(error),
        io::ErrorKind::AddrNotAvailable => ConnectError::NoLocalPort(error),
        io::ErrorKind::TimedOut => ConnectError::TimedOut,
        _ => ConnectError::Failed(error),
    }
}
