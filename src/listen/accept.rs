//! Accepts connections from one listening socket until the drain begins, and then loses none that the kernel took.
//!
//! It hands each connection on and knows nothing of what becomes of it.

use std::cell::Cell;
use std::fmt::Display;
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::Socket;
use tokio::task::yield_now;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::held;
use super::socket::ignore_new_handshakes;
use crate::drain::{Drain, Phase};
use crate::net::descriptors::{User, is_reserved};
use crate::net::errors::exhausted;
use crate::observe::counters::ListenerCounters;
use crate::reactor::{self, Ready, Watched, sleep, timeout_at};

/// Without a descriptor the next accept fails too, and the connection stays queued, so the socket stays readable: a
/// loop without a pause would eat the core that could free descriptors.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// Sessions that were accepted wait for descriptors, which this socket's clients can do as well in the kernel's queue.
const STARVED_PAUSE: Duration = Duration::from_millis(10);
/// One line an outage, not one a pause.
const EXHAUSTED_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// A listening socket that only ever fails is broken, and asking it again at once would eat the core. Single failures
/// are a client's, and anyone may cause as many as he likes: they must not slow down the others.
const FAILURES_BEFORE_PAUSE: u32 = 100;
/// After so many connections the sessions of this worker get their turn, however long the queue: few are under way at once then,
/// and what they touch is still in the processor's caches. The others wait in the kernel's queue.
const BATCH: u32 = 8;
/// So many without an empty queue in between, and whoever comes has waited there for some turns, so that his first bytes are
/// likely to be there already.
const CROWD: u32 = 64;
/// How long a handshake that was under way when the drain began may take: a round trip around the world.
const HANDSHAKE_TIME: Duration = Duration::from_millis(300);

/// A listening socket that this thread's reactor watches.
#[derive(Debug)]
pub struct Listening {
    socket: Watched<TcpListener>,
    /// Connections since its queue was empty.
    in_a_row: Cell<u32>,
}

impl Listening {
    /// Begins to watch `socket`, which must not block.
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    pub fn watch(socket: TcpListener) -> io::Result<Self> {
        let socket = Watched::new(socket, EventFlags::IN).map_err(|(_, error)| error)?;
        Ok(Self { socket, in_a_row: Cell::default() })
    }

    /// The next connection, which nobody watches yet: whoever is to serve it does. Cancel safe.
    async fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            poll_fn(|cx| self.socket.poll_ready(cx, Ready::READ)).await;
            let (socket, client) = match acceptfrom_with(self.socket.socket(), flags) {
                Err(Errno::AGAIN) => {
                    self.socket.clear(Ready::READ);
                    self.in_a_row.set(0);
                    reactor::set_busy(false);
                    continue;
                }
                result => result?,
            };
            self.in_a_row.set(self.in_a_row.get().saturating_add(1));
            reactor::set_busy(self.in_a_row.get() > CROWD);
            let client = client.and_then(|client| SocketAddr::try_from(client).ok());
            // Only where the connection is gone already.
            return Ok((socket.into(), client.ok_or(io::ErrorKind::ConnectionAborted)?));
        }
    }
}

/// Accepts until `drain` begins, pausing while `is_starved`; then until all that the kernel took is accepted, and closes
/// the socket.
///
/// # Cancel safety
/// Dropping the future closes the socket; connections that it had not accepted are reset by the kernel.
pub async fn run(
    listener: Listening,
    name: &str,
    counters: &ListenerCounters,
    drain: &Drain,
    is_starved: impl Fn() -> bool,
    on_connection: impl Fn(Socket, SocketAddr),
) {
    let mut exhausted_since: Option<Instant> = None;
    // Kept through short recoveries: with one descriptor coming and going, each accept ends an outage and begins one.
    let mut warned: Option<Instant> = None;
    let mut draining = std::pin::pin!(drain.started());
    let mut batch = Batch(BATCH);
    let mut failures = 0u32;
    loop {
        while is_starved() && drain.phase() < Phase::Draining {
            sleep(STARVED_PAUSE).await;
        }
        let result = tokio::select! {
            biased;
            () = &mut draining => break,
            result = listener.accept() => result,
        };
        match result {
            Ok((stream, client)) => {
                let stream = if is_reserved(&stream, User::Sessions) {
                    exhausted_since.get_or_insert_with(Instant::now);
                    warn_exhausted(name, &held::Reserved, &mut warned);
                    let goes_on = || drain.phase() < Phase::Draining;
                    held::until_not_reserved(stream, counters, &is_starved, goes_on).await
                } else {
                    stream
                };
                if let Some(since) = exhausted_since.take()
                    && warned.is_some_and(|warned| warned >= since)
                {
                    info!(listener = name, outage = ?since.elapsed(), "accepting again");
                }
                failures = 0;
                on_connection(stream, client);
                batch.accepted().await;
            }
            Err(error) if exhausted(&error) => {
                counters.accept_exhausted.add(1);
                exhausted_since.get_or_insert_with(Instant::now);
                warn_exhausted(name, &error, &mut warned);
                tokio::select! {
                    biased;
                    () = &mut draining => break,
                    () = sleep(EXHAUSTED_PAUSE) => {}
                }
            }
            Err(error) => {
                // The client went away before we came (ECONNABORTED), or a signal: the next one is as good as any.
                counters.accept_failed.add(1);
                debug!(listener = name, %error, "a connection was gone before it was accepted");
                failures += 1;
                if failures.is_multiple_of(FAILURES_BEFORE_PAUSE) {
                    warn!(listener = name, %error, failures, "accept keeps failing");
                    sleep(EXHAUSTED_PAUSE).await;
                }
            }
        }
    }
    accept_the_rest(&listener, name, counters, &on_connection).await;
}

fn warn_exhausted(name: &str, error: &dyn Display, warned: &mut Option<Instant>) {
    let now = Instant::now();
    if warned.is_none_or(|warned| now - warned >= EXHAUSTED_LOG_INTERVAL) {
        warn!(listener = name, %error, "cannot accept: raise `ulimit -n` (LimitNOFILE) or memory");
        *warned = Some(now);
    }
}

async fn accept_the_rest(
    listener: &Listening,
    name: &str,
    counters: &ListenerCounters,
    on_connection: &impl Fn(Socket, SocketAddr),
) {
    if let Err(error) = ignore_new_handshakes(listener.socket.socket()) {
        warn!(listener = name, %error, "handshakes that complete while the listener closes will be reset");
    }
    let end = Instant::now() + HANDSHAKE_TIME;
    let mut batch = Batch(BATCH);
    while let Ok(result) = timeout_at(end, listener.accept()).await {
        match result {
            Ok((stream, client)) => {
                let stream = if is_reserved(&stream, User::Sessions) {
                    held::until_not_reserved(stream, counters, || false, || Instant::now() < end).await
                } else {
                    stream
                };
                on_connection(stream, client);
                // Where new handshakes could not be ignored, the queue may never be empty.
                if batch.accepted().await && Instant::now() >= end {
                    break;
                }
            }
            Err(error) => {
                count(counters, &error);
                sleep(Duration::from_millis(1)).await;
            }
        }
    }
}

/// How many are left until the sessions get their turn.
struct Batch(u32);

impl Batch {
    /// One more. True after the last one, once the sessions had their turn.
    async fn accepted(&mut self) -> bool {
        self.0 -= 1;
        if self.0 > 0 {
            return false;
        }
        // This task runs again after the next look at the sockets. The sessions that it has just begun run after that look, too: a
        // client that was reset in the listener's queue is known by then, and costs no backend a connection.
        reactor::look_first();
        yield_now().await;
        self.0 = BATCH;
        true
    }
}

fn count(counters: &ListenerCounters, error: &io::Error) {
    if exhausted(error) { counters.accept_exhausted.add(1) } else { counters.accept_failed.add(1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain;
    use crate::reactor::beside_tokio;
    use std::net::TcpStream;

    /// A session that wants to run every time sees no more than a batch accepted in between, and is told whether others wait.
    #[tokio::test]
    async fn a_flood_of_connections_starves_no_session() {
        // As many as the standard library's queue surely has places.
        const FLOOD: u32 = 120;
        let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = socket.local_addr().expect("bound");
        let _clients: Vec<_> = (0..FLOOD).map(|_| TcpStream::connect(address).expect("a place")).collect();
        socket.set_nonblocking(true).expect("a socket");

        let (control, drain) = drain::channel();
        control.advance(Phase::Serving);
        let (accepted, counters) = (Cell::new(0), ListenerCounters::default());
        let _reactor = beside_tokio::install();
        let listening = Listening::watch(socket).expect("a reactor");
        let on_connection = |_, _| {
            accepted.set(accepted.get() + 1);
            assert_eq!(reactor::is_busy(), accepted.get() > CROWD);
        };
        let accepting = run(listening, "web", &counters, &drain, || false, on_connection);
        let session = async {
            let (mut before, mut most) = (0, 0);
            while before < FLOOD {
                yield_now().await;
                most = most.max(accepted.get() - before);
                before = accepted.get();
            }
            while reactor::is_busy() {
                yield_now().await;
            }
            most
        };
        // In turn, so that what is accepted between two looks of the session is one poll's work, never two.
        let most = tokio::select! {
            biased;
            () = accepting => unreachable!("it accepts until the drain"),
            most = session => most,
        };
        assert!((1..=BATCH).contains(&most), "{most} in one go");
    }
}
