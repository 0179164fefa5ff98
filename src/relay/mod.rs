//! Copies bytes both ways between a client and a backend until both have ended, one fails, or neither speaks.
//!
//! It knows nothing of pools or weights: two [`Stream`]s, their [`Limits`], what the worker's sessions have [`Shared`], and
//! a [`Meter`]. Half-close, reset, silence and shutdown mean the same whether bytes are copied or spliced;
//! `tests/relay.rs` holds both to that, scenario by scenario.

mod direction;
mod idle;
mod opening;
mod pipe;
mod socket;
mod stream;

pub use opening::Opening;
pub use socket::StreamSocket;
pub use stream::Stream;

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::TcpKeepalive;

use self::direction::{Broken, Direction, errno};
pub use self::idle::IdleClock;
use self::idle::{Idle, Over};
use self::pipe::Pipes;
use crate::telemetry::counters::{BackendCounters, Counter};

/// What all sessions of a worker share.
#[derive(Debug)]
pub struct Shared {
    buffers: Buffers,
    /// Must be run for timeouts to fire.
    pub clock: IdleClock,
}

impl Shared {
    /// `shortest_limit`: of all that any session will have.
    #[must_use]
    pub fn new(shortest_limit: Duration) -> Self {
        Self { buffers: Buffers::default(), clock: IdleClock::new(shortest_limit) }
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

/// Relays until the session is over. The streams are closed by their drop: cleanly if no byte was lost, else by a reset.
/// Before a reset, what was written has up to `limits.half_closed` to arrive.
///
/// # Cancel safety
/// Dropping the future and the streams resets both connections.
pub fn relay<'a>(
    client: &'a mut Stream,
    backend: &'a mut Stream,
    limits: &'a Limits,
    shared: &'a Shared,
    meter: Meter<'a>,
) -> impl Future<Output = Ended> + 'a {
    let pair = Pair { client, backend, to_backend: Direction::default(), to_client: Direction::default() };
    let idle = shared.clock.enter(limits.settle_time, meter.backend.mark());
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
    idle: Idle<'a>,
    limits: &'a Limits,
    shared: &'a Shared,
    meter: Meter<'a>,
}

impl Relaying<'_> {
    /// Moves what can be moved, then looks whether the session has been silent for too long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let Self { pair, idle, limits, shared, meter } = self;
        let progress = meter.session.bytes();
        let was_open = pair.is_open();
        if let Poll::Ready(ended) = pair.poll(cx, &shared.buffers, meter) {
            return Poll::Ready(ended);
        }
        pair.backend.poll_opening(cx);
        let is_open = pair.is_open();
        if is_open != was_open {
            meter.half_closed.add(1);
            meter.session.half_closed = true;
            idle.touch();
        } else if meter.session.bytes() != progress {
            idle.touch();
        }
        if idle.settles() {
            pair.backend.keep_alive(&limits.keepalive);
        }
        let stalled = pair.holds_bytes();
        if stalled
            && idle.looks()
            && let Some(side) = pair.broken_source()
        {
            meter.session.errno = pair.errno(side);
            return Poll::Ready(Ended::Reset(side));
        }
        let limit = if is_open { limits.idle } else { Some(limits.half_closed) };
        let over = ready!(idle.poll_over(cx, limit, stalled));
        Poll::Ready(match over {
            Over::Told => Ended::Drained,
            Over::Silent if is_open => Ended::IdleTimeout,
            Over::Silent => Ended::HalfCloseTimeout(pair.awaited()),
        })
    }

    /// Where one side is about to be reset because the other was: until it has what was written to it.
    fn delivered(&self, ended: Ended) -> Option<Pin<Box<impl Future<Output = ()>>>> {
        let Self { pair, meter, limits, .. } = self;
        let stream = match ended {
            Ended::Reset(Side::Client) if meter.session.to_backend > 0 => &*pair.backend,
            Ended::Reset(Side::Backend) if meter.session.to_client > 0 => &*pair.client,
            _ => return None,
        };
        // Boxed: few sessions come here, and its timer would make all of them larger.
        Some(Box::pin(stream.delivered(limits.half_closed)))
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

/// Both directions of a session.
struct Pair<'a> {
    client: &'a mut Stream,
    backend: &'a mut Stream,
    to_backend: Direction,
    to_client: Direction,
}

impl Pair<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, buffers: &Buffers, meter: &mut Meter<'_>) -> Poll<Ended> {
        let errno = &mut meter.session.errno;
        let to_backend = self.poll_towards(Side::Backend, cx, buffers, errno, |bytes| {
            meter.session.to_backend += bytes;
            meter.backend.bytes_sent.add(bytes);
        });
        if let Some(ended) = to_backend {
            return Poll::Ready(ended);
        }
        let errno = &mut meter.session.errno;
        let to_client = self.poll_towards(Side::Client, cx, buffers, errno, |bytes| {
            if meter.session.to_client == 0 {
                meter.backend.answered.add(1);
            }
            meter.session.to_client += bytes;
            meter.backend.bytes_received.add(bytes);
        });
        if let Some(ended) = to_client {
            return Poll::Ready(ended);
        }
        if self.to_backend.is_done() && self.to_client.is_done() {
            Poll::Ready(self.refused_by().map_or(Ended::Finished, Ended::Reset))
        } else {
            Poll::Pending
        }
    }

    /// Moves what can be moved to `target_side`, and closes that half when its source has ended. `Some`: the session is
    /// over. `broken` is set to the errno of a socket that broke.
    fn poll_towards(
        &mut self,
        target_side: Side,
        cx: &mut Context<'_>,
        buffers: &Buffers,
        broken: &mut u16,
        moved: impl FnMut(u64),
    ) -> Option<Ended> {
        let (direction, opposite, source, source_side, target) = match target_side {
            Side::Backend => {
                (&mut self.to_backend, &self.to_client, &mut *self.client, Side::Client, &mut *self.backend)
            }
            Side::Client => {
                (&mut self.to_client, &self.to_backend, &mut *self.backend, Side::Backend, &mut *self.client)
            }
        };
        if direction.is_done() {
            return None;
        }
        match direction.poll_move(cx, source, target, buffers, moved) {
            Poll::Pending => {}
            Poll::Ready(Err(Broken::Source(errno))) => {
                *broken = errno;
                return Some(Ended::Reset(source_side));
            }
            Poll::Ready(Err(Broken::Target(errno))) => {
                if *broken == 0 {
                    *broken = errno;
                }
                // What the target sent before it went away still waits in its socket: the other direction fetches it.
                direction.abandon();
            }
            // Where both have ended, closing says the same and costs one system call less.
            Poll::Ready(Ok(())) if opposite.is_done() => {}
            Poll::Ready(Ok(())) => {
                if let Err(error) = target.shutdown() {
                    if *broken == 0 {
                        *broken = errno(&error);
                    }
                    direction.abandon();
                }
            }
        }
        None
    }

    /// A side that would not take our bytes; the client where neither did. What it sent before was still passed on.
    fn refused_by(&self) -> Option<Side> {
        if self.to_client.is_abandoned() {
            Some(Side::Client)
        } else {
            self.to_backend.is_abandoned().then_some(Side::Backend)
        }
    }

    /// Both halves are open.
    fn is_open(&self) -> bool {
        !self.to_backend.is_done() && !self.to_client.is_done()
    }

    /// Bytes were read that the other side has not taken.
    fn holds_bytes(&self) -> bool {
        self.to_backend.holds_bytes() || self.to_client.holds_bytes()
    }

    /// A side that was reset while nobody reads it, because its last bytes still wait for the other side.
    fn broken_source(&self) -> Option<Side> {
        if self.to_backend.holds_bytes() && self.client.is_broken() {
            Some(Side::Client)
        } else if self.to_client.holds_bytes() && self.backend.is_broken() {
            Some(Side::Backend)
        } else {
            None
        }
    }

    /// Why the connection to `side` broke; 0 if the kernel does not say.
    fn errno(&self, side: Side) -> u16 {
        let stream = if side == Side::Client { &self.client } else { &self.backend };
        stream.error().as_ref().map_or(0, errno)
    }

    /// Whose bytes a half-closed session still waits for.
    fn awaited(&self) -> Side {
        if self.to_backend.is_done() { Side::Backend } else { Side::Client }
    }
}
