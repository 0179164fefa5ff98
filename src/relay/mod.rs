//! Copies bytes both ways between a client and a backend until both have ended, one fails, or neither speaks.
//!
//! It knows nothing of pools or weights: two [`Stream`]s, their [`Limits`], what the worker's sessions have [`Shared`], and
//! a [`Meter`]. Half-close, reset, silence and shutdown mean the same whether bytes are copied or spliced;
//! `tests/relay.rs` holds both to that, scenario by scenario.

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

/// The errno of a connection whose peer has vanished: the kernel would say the same, a quarter of an hour later.
const ERRNO_VANISHED: u16 = Errno::TIMEDOUT.raw_os_error() as u16;

/// What all sessions of a worker share.
#[derive(Debug)]
pub struct Shared {
    buffers: Buffers,
    /// `None`: see [`Shared::new`].
    diag: Option<SockDiag>,
    /// Must be run for timeouts to fire.
    pub clock: IdleClock,
}

impl Shared {
    /// `shortest_limit`: of all that any session will have. The second value is why the kernel does not tell the state of
    /// connections, if so: then bytes that move in its buffers alone are not seen, and neither are peers that vanish while bytes
    /// are unacknowledged.
    #[must_use]
    pub fn new(shortest_limit: Duration) -> (Self, Option<io::Error>) {
        let (diag, error) = match SockDiag::open() {
            Ok(diag) => (Some(diag), None),
            Err(error) => (None, Some(error)),
        };
        (Self { buffers: Buffers::default(), diag, clock: IdleClock::new(shortest_limit) }, error)
    }
}

/// What is lent to the sessions whose bytes are just moving.
#[derive(Debug)]
struct Buffers {
    /// Bytes are copied through it.
    copy: RefCell<Box<[u8]>>,
    /// Bulk is spliced through them.
    pipes: Pipes,
}

/// Large enough to empty a default receive buffer in two reads, small enough to stay in a core's second-level cache.
const BUFFER_BYTES: usize = 64 * 1024;

impl Default for Buffers {
    fn default() -> Self {
        Self { copy: RefCell::new(vec![0; BUFFER_BYTES].into()), pipes: Pipes::default() }
    }
}

/// How long a session may be silent, and how its backend is watched meanwhile.
#[derive(Clone, Debug)]
pub struct Limits {
    /// While both halves are open; `None`: for ever.
    pub idle: Option<Duration>,
    /// Once one half is closed.
    pub half_closed: Duration,
    /// How the backend is asked whether it still lives; the client's socket has inherited its own from the listening one.
    pub keepalive: TcpKeepalive,
    /// Of that: the silence before the first question.
    pub keepalive_idle: Duration,
    /// A peer that answers neither keepalive probes nor retransmissions for so long has vanished.
    pub peer_timeout: Duration,
    /// Before this, a session is not worth the four system calls that keepalive costs: most end sooner.
    pub settle_time: Duration,
}

/// Where a session is counted while it is relayed.
#[derive(Debug)]
pub struct Meter<'a> {
    /// Of all sessions of its backend on this worker.
    pub backend: &'a BackendCounters,
    /// Of all sessions of this worker: those of which a half was closed.
    pub half_closed: &'a Counter,
    /// Of this session.
    pub session: &'a mut Tally,
}

/// What is counted of one session while it is relayed.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes taken by the backend.
    pub to_backend: u64,
    /// Bytes taken by the client.
    pub to_client: u64,
    /// It was counted among the half-closed ones.
    pub half_closed: bool,
    /// Of the socket that broke first: why, for the log. 0: none broke, or the kernel did not say why.
    pub errno: u16,
}

impl Tally {
    /// No byte was passed on.
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
    /// Who connected to us.
    Client,
    /// Whom we connected to.
    Backend,
}

/// How a session's relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both sides closed their half, and every byte was passed on.
    Finished,
    /// A side reset its connection, or it broke.
    Reset(Side),
    /// No byte moved for `idle`.
    IdleTimeout,
    /// The worker has ended it: see [`IdleClock::end_sessions`].
    Drained,
    /// One half was closed, and this side, whose turn it was, stayed silent for `half_closed`.
    HalfCloseTimeout(Side),
}

/// Relays until the session is over. `backend_key` identifies the backend for [`IdleClock::end_sessions`]. The streams are closed by their drop: cleanly if no byte was lost, else by a reset.
/// Before a reset, what was written has up to `limits.half_closed` to arrive.
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
    // A block, not an async function: that would keep each of its arguments twice.
    async move {
        let ended = poll_fn(|cx| relaying.poll(cx)).await;
        if let Some(delivered) = relaying.delivered(ended) {
            delivered.await;
        }
        relaying.close(ended);
        ended
    }
}

/// All that a relay needs from poll to poll, in one place: what a future refers to from outside it pays for with a pointer
/// each.
struct Relaying<'a> {
    pair: Pair<'a>,
    idle: IdleHandle<'a>,
    limits: &'a Limits,
    shared: &'a Shared,
    meter: Meter<'a>,
}

impl Relaying<'_> {
    /// Moves what can be moved, then sees to what is due though nothing moves.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if let Poll::Ready(ended) = self.advance(cx) {
            return Poll::Ready(ended);
        }
        if self.idle.has_just_settled(self.limits.peer_timeout) {
            self.pair.backend.keep_alive(&self.limits.keepalive);
        }
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

    /// Moves what can be moved.
    // Inlined into the poll, where it runs nearly always: a call costs a request some 60 instructions.
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

    /// Writes once more what waits for a socket of which no event tells when a slow reader takes bytes.
    #[inline(never)]
    fn retry(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.pair.retry_writes() { self.advance(cx) } else { Poll::Pending }
    }

    /// True where bytes have moved on the wire since the clock last heard of any: below us, out of the kernel's buffers. Bytes
    /// that only lie there, retransmissions and probes are no moves.
    fn has_moved(&mut self) -> bool {
        let Some(diag) = &self.shared.diag else { return false };
        let moved = [&*self.pair.client, &*self.pair.backend]
            .map(|stream| stream.wire(diag).map(|wire| wire.since_bytes_moved(self.limits.keepalive_idle)));
        let last = moved.into_iter().flatten().min();
        last.is_some_and(|ago| self.idle.record_move(ago))
    }

    /// A side that has vanished while bytes for it are unacknowledged, of which keepalive would say nothing.
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

    /// Where one side is about to be reset because the other was: until it has what was written to it.
    fn delivered(&self, ended: Ended) -> Option<Pin<Box<impl Future<Output = ()> + '_>>> {
        let Self { pair, meter, limits, shared, .. } = self;
        let stream = match ended {
            Ended::Reset(Side::Client) if meter.session.to_backend > 0 => &*pair.backend,
            Ended::Reset(Side::Backend) if meter.session.to_client > 0 => &*pair.client,
            _ => return None,
        };
        // Boxed: few sessions come here, and its timer would make all of them larger.
        let is_lost = || {
            let wire = shared.diag.as_ref().and_then(|diag| stream.wire(diag));
            wire.is_some_and(|wire| wire.is_vanished(limits.peer_timeout))
        };
        Some(Box::pin(stream.delivered(limits.half_closed, is_lost)))
    }

    /// Silence ends a session cleanly only where nothing says that somebody was cut short: nothing waits, and the backend did not
    /// still owe the answer to a request that had ended.
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
