//! Relays bytes between a client and a backend, in both directions, until both sides have ended, a
//! connection breaks, a limit of silence expires, or the worker ends the session.
//!
//! - `pair.rs`: both directions of a session, and half-closes.
//! - `direction.rs`: one direction and its three paths: copy, peek, splice.
//! - `stream.rs`, `socket.rs`: one side of a session, and its system calls.
//! - `opening.rs`: packets that the kernel holds back at the beginning.
//! - `pipe.rs`: the worker's pipes.
//! - `idle.rs`: the worker's clock.
//! - `wire.rs`, `sock_diag.rs`: what the kernel reports about a connection.
//!
//! The relay does not know pools and weights. Its parameters are two [`Stream`]s, their [`Limits`], the
//! [`Shared`] state of the worker, and a [`Meter`]. Half-close, reset, silence and shutdown mean the same on
//! every path; `tests/relay.rs` runs the same scenarios over all of them.

mod direction;
mod idle;
mod opening;
mod pair;
mod pipe;
mod sock_diag;
mod socket;
mod stream;
mod wire;

pub use opening::Opening;
pub use socket::StreamSocket;
pub use stream::Stream;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use socket2::TcpKeepalive;

use self::direction::Direction;
pub use self::idle::IdleClock;
use self::idle::{Due, IdleHandle};
use self::pair::Pair;
use self::pipe::Pipes;
use self::sock_diag::SockDiag;
use crate::observe::counters::{BackendCounters, Counter};

/// The errno reported for a peer that has vanished. The kernel would report the same, a quarter of an hour
/// later.
const ERRNO_VANISHED: u16 = Errno::TIMEDOUT.raw_os_error() as u16;

/// What all sessions of a worker share.
#[derive(Debug)]
pub struct Shared {
    buffers: Buffers,
    /// `None` if the kernel does not report the state of connections.
    diag: Option<SockDiag>,
    /// The clock. [`IdleClock::run`] must be polled for limits to have an effect.
    pub clock: IdleClock,
}

impl Shared {
    /// `shortest_limit` is the shortest limit of silence that any session will have.
    ///
    /// The second value is the error if the kernel does not report the state of connections. In that case
    /// two things go unnoticed: bytes that leave the kernel's send buffer without an event, and peers that
    /// vanish while bytes for them are unacknowledged.
    #[must_use]
    pub fn new(shortest_limit: Duration) -> (Self, Option<io::Error>) {
        let (diag, error) = match SockDiag::open() {
            Ok(diag) => (Some(diag), None),
            Err(error) => (None, Some(error)),
        };
        (Self { buffers: Buffers::default(), diag, clock: IdleClock::new(shortest_limit) }, error)
    }
}

/// Memory that a session uses only while its bytes move.
#[derive(Debug)]
struct Buffers {
    /// The buffer that bytes are copied through.
    copy: RefCell<Box<[u8]>>,
    /// The pipes that bytes are spliced through.
    pipes: Pipes,
}

/// Large enough to empty a default receive buffer in two reads, and small enough to stay in the second-level
/// cache of a core.
const BUFFER_BYTES: usize = 64 * 1024;

impl Default for Buffers {
    fn default() -> Self {
        Self { copy: RefCell::new(vec![0; BUFFER_BYTES].into()), pipes: Pipes::default() }
    }
}

/// How long a session may be silent, and how vanished peers are found.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The longest silence while both halves are open. `None`: no limit.
    pub idle: Option<Duration>,
    /// The longest silence once one half is closed.
    pub half_closed: Duration,
    /// The keepalive settings of the backend's socket. The client's socket inherits its settings from the
    /// listening socket.
    pub keepalive: TcpKeepalive,
    /// The silence before the first of these probes.
    pub keepalive_idle: Duration,
    /// A peer that answers neither keepalive probes nor retransmissions for this long has vanished.
    pub peer_timeout: Duration,
    /// The lifetime after which keepalive is switched on at the backend's socket. Most sessions end sooner
    /// and save these four system calls.
    pub settle_time: Duration,
}

/// The counters of a session while it is relayed.
#[derive(Debug)]
pub struct Meter<'a> {
    /// The counters of the session's backend on this worker.
    pub backend: &'a BackendCounters,
    /// Counts this worker's sessions in which one side ended its half.
    pub half_closed: &'a Counter,
    /// Counters of this session.
    pub session: &'a mut Tally,
}

/// The counters of one session.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes taken by the backend.
    pub to_backend: u64,
    /// Bytes taken by the client.
    pub to_client: u64,
    /// The session was counted as half-closed.
    pub half_closed: bool,
    /// The errno of a socket that broke, for the log. 0: none broke, or the kernel gave no reason.
    pub errno: u16,
}

impl Tally {
    /// True if no byte was passed on.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    fn bytes(&self) -> u64 {
        self.to_backend + self.to_client
    }
}

/// A side of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The side that connected to us.
    Client,
    /// The side that we connected to.
    Backend,
}

/// How a session's relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both sides closed their half, and every byte was passed on.
    Finished,
    /// This side reset its connection, or the connection to it broke.
    Reset(Side),
    /// No byte moved for `limits.idle`.
    IdleTimeout,
    /// The worker ended it: see [`IdleClock::end_sessions`].
    Drained,
    /// One side ended its half. For `limits.half_closed` no byte moved and this side did not end its own
    /// half.
    HalfCloseTimeout(Side),
}

/// Relays until the session is over. `backend_key` identifies the backend for [`IdleClock::end_sessions`].
/// The streams are closed when they are dropped: cleanly if no byte was lost, else by a reset. If one side
/// was reset, the other gets up to `limits.half_closed` to acknowledge what was written to it, before it is
/// reset, too.
///
/// # Cancel safety
/// Dropping the future and the streams resets both connections.
pub fn relay<'a>(
    client: &'a mut Stream,
    backend: &'a mut Stream,
    limits: &'a Limits,
    shared: &'a Shared,
    backend_key: u64,
    meter: Meter<'a>,
) -> impl Future<Output = Ended> + 'a {
    let pair = Pair { client, backend, to_backend: Direction::default(), to_client: Direction::default() };
    let idle = shared.clock.enter(limits.settle_time, backend_key);
    let mut relaying = Relaying { pair, idle, limits, shared, meter };
    // A block, because an async function would keep each of its arguments twice.
    async move {
        let ended = poll_fn(|cx| relaying.poll(cx)).await;
        if let Some(delivered) = relaying.delivered(ended) {
            delivered.await;
        }
        relaying.close(ended);
        ended
    }
}

/// The whole state of a relay. It is one struct, because a future that borrows from outside of it stores a
/// pointer for each borrow.
struct Relaying<'a> {
    pair: Pair<'a>,
    idle: IdleHandle<'a>,
    limits: &'a Limits,
    shared: &'a Shared,
    meter: Meter<'a>,
}

impl Relaying<'_> {
    /// Moves bytes, then handles what the clock reports.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if let Poll::Ready(ended) = self.advance(cx) {
            return Poll::Ready(ended);
        }
        if self.idle.has_just_settled(self.limits.peer_timeout) {
            self.pair.backend.keep_alive(&self.limits.keepalive);
        }
        // While bytes wait for one side, the other side is not read. This check finds out whether it was
        // reset.
        if self.pair.holds_bytes() && self.idle.is_stall_check_due() {
            if let Some(side) = self.pair.broken_source() {
                self.meter.session.errno = self.pair.errno(side);
                return Poll::Ready(Ended::Reset(side));
            }
            if let Poll::Ready(ended) = self.retry(cx) {
                return Poll::Ready(ended);
            }
        }
        loop {
            let is_open = self.pair.is_open();
            let limit = if is_open { self.limits.idle } else { Some(self.limits.half_closed) };
            let ended = match ready!(self.idle.poll_due(cx, limit, self.pair.holds_bytes())) {
                Due::Check => self.vanished().map(|side| {
                    self.meter.session.errno = ERRNO_VANISHED;
                    Ended::Reset(side)
                }),
                Due::EndRequested => {
                    let is_active = self.has_moved() && !self.idle.is_quiet();
                    (!(is_active && self.idle.defer())).then_some(Ended::Drained)
                }
                Due::Silent => match self.retry(cx) {
                    Poll::Ready(ended) => Some(ended),
                    Poll::Pending if self.idle.is_active(limit) || self.has_moved() => None,
                    Poll::Pending if is_open => Some(Ended::IdleTimeout),
                    Poll::Pending => Some(Ended::HalfCloseTimeout(self.pair.awaited())),
                },
            };
            if let Some(ended) = ended {
                return Poll::Ready(ended);
            }
        }
    }

    /// Moves bytes in both directions, and records activity.
    // Inlined, because nearly every poll runs it: a call costs a request some 60 instructions.
    #[inline(always)]
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let Self { pair, idle, shared, meter, .. } = self;
        let progress = meter.session.bytes();
        let was_open = pair.is_open();
        if let Poll::Ready(ended) = pair.poll(cx, &shared.buffers, meter) {
            return Poll::Ready(ended);
        }
        pair.backend.poll_opening(cx);
        if pair.is_open() != was_open {
            meter.half_closed.add(1);
            meter.session.half_closed = true;
            idle.touch();
        } else if meter.session.bytes() != progress {
            idle.touch();
        }
        Poll::Pending
    }

    /// Tries once more to write refused bytes to a unix socket, which takes bytes before epoll calls it
    /// writable.
    #[inline(never)]
    fn retry(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.pair.retry_writes() { self.advance(cx) } else { Poll::Pending }
    }

    /// True if bytes have moved on the wire since the last activity that the idle clock has recorded;
    /// records that move. The kernel may send bytes of its send buffer without an event. Bytes that only
    /// wait there, retransmissions and probes do not count.
    fn has_moved(&mut self) -> bool {
        let Some(diag) = &self.shared.diag else { return false };
        let moved = [&*self.pair.client, &*self.pair.backend]
            .map(|stream| stream.wire(diag).map(|wire| wire.since_bytes_moved(self.limits.keepalive_idle)));
        let last = moved.into_iter().flatten().min();
        last.is_some_and(|ago| self.idle.record_move(ago))
    }

    /// Returns the side whose peer has vanished while bytes for it are unacknowledged. In that state the
    /// kernel sends no keepalive probes.
    fn vanished(&mut self) -> Option<Side> {
        let diag = self.shared.diag.as_ref()?;
        let mut is_confirmed = true;
        for (stream, side) in [(&*self.pair.client, Side::Client), (&*self.pair.backend, Side::Backend)] {
            let Some(wire) = stream.wire(diag) else { continue };
            if wire.is_vanished(self.limits.peer_timeout) {
                return Some(side);
            }
            is_confirmed &= wire.unacknowledged_bytes == 0;
        }
        if is_confirmed {
            self.idle.confirm();
        }
        None
    }

    /// If one side was reset: a future that waits until the other side has acknowledged what was written to
    /// it, for up to `limits.half_closed`. `None` if there is nothing to wait for.
    fn delivered(&self, ended: Ended) -> Option<Pin<Box<impl Future<Output = ()> + '_>>> {
        let Self { pair, meter, limits, shared, .. } = self;
        let stream = match ended {
            Ended::Reset(Side::Client) if meter.session.to_backend > 0 => &*pair.backend,
            Ended::Reset(Side::Backend) if meter.session.to_client > 0 => &*pair.client,
            _ => return None,
        };
        // Boxed: few sessions wait here, and the timer would make all sessions larger.
        let is_lost = || {
            let wire = shared.diag.as_ref().and_then(|diag| stream.wire(diag));
            wire.is_some_and(|wire| wire.is_vanished(limits.peer_timeout))
        };
        Some(Box::pin(stream.delivered(limits.half_closed, is_lost)))
    }

    /// Lets both streams close cleanly if neither side can lose data: both sides have ended, or the session
    /// was silent, holds no bytes, and no client that ended its half waits for an answer of the backend.
    fn close(&mut self, ended: Ended) {
        let pair = &mut self.pair;
        let silent = match ended {
            Ended::IdleTimeout | Ended::HalfCloseTimeout(Side::Client) => true,
            Ended::Drained => self.idle.is_quiet() && (pair.is_open() || pair.awaited() == Side::Client),
            _ => false,
        };
        if ended == Ended::Finished || (silent && !pair.holds_bytes()) {
            pair.client.finish();
            pair.backend.finish();
        }
    }
}
