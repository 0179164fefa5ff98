//! Accepts connections from one listening socket until the drain begins, and then all that the kernel has
//! accepted already.
//!
//! It hands each connection to its caller and knows nothing of sessions.

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

/// The pause after an accept that failed for want of descriptors or memory. The connection stays queued and
/// the socket readable, so a loop without a pause would use up the CPU time that sessions need to free
/// descriptors.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// The pause while accepted sessions lack descriptors. More clients can wait in the kernel's queue as well.
const STARVED_PAUSE: Duration = Duration::from_millis(10);
/// The shortest time between two log lines about a lack of descriptors or memory.
const EXHAUSTED_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Failed accepts in a row after which the loop pauses, because the socket may be broken and would use up
/// the CPU. A client can cause single failures at will, so those must not slow down the others.
const FAILURES_BEFORE_PAUSE: u32 = 100;
/// Accepts after which the sessions of this worker run, however long the queue. With a small batch few
/// sessions are under way at once, and their data is still in the CPU's caches. The other clients wait in
/// the kernel's queue.
const BATCH: u32 = 8;
/// After this many accepts without EAGAIN the worker counts as busy. Its clients have then waited in the
/// kernel's queue for some iterations of the reactor, so that their first bytes have probably arrived.
const BUSY_ACCEPTS: u32 = 64;
/// How long a handshake that was under way when the drain began may take: a round trip around the world.
const HANDSHAKE_TIME: Duration = Duration::from_millis(300);

/// A listening socket that this thread's reactor watches.
#[derive(Debug)]
pub struct Listening {
    socket: Watched<TcpListener>,
    /// Accepts since the kernel's queue was empty.
    accepts_in_a_row: Cell<u32>,
}

impl Listening {
    /// Registers `socket`, which must be non-blocking, with this thread's reactor.
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    pub fn watch(socket: TcpListener) -> io::Result<Self> {
        let socket = Watched::new(socket, EventFlags::IN).map_err(|(_, error)| error)?;
        Ok(Self { socket, accepts_in_a_row: Cell::default() })
    }

    /// Waits for the next connection. No reactor watches it yet; the worker that serves it registers it.
    /// Cancel safe.
    async fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            poll_fn(|cx| self.socket.poll_ready(cx, Ready::READ)).await;
            let (socket, client) = match acceptfrom_with(self.socket.socket(), flags) {
                Err(Errno::AGAIN) => {
                    self.socket.clear(Ready::READ);
                    self.accepts_in_a_row.set(0);
                    reactor::set_busy(false);
                    continue;
                }
                result => result?,
            };
            self.accepts_in_a_row.set(self.accepts_in_a_row.get().saturating_add(1));
            reactor::set_busy(self.accepts_in_a_row.get() > BUSY_ACCEPTS);
            let client = client.and_then(|client| SocketAddr::try_from(client).ok());
            // The client's address is missing only if the connection is gone already.
            return Ok((socket.into(), client.ok_or(io::ErrorKind::ConnectionAborted)?));
        }
    }
}

/// Accepts until `drain` begins, with pauses while `is_starved`. Then accepts what the kernel has accepted
/// already, and closes the socket.
///
/// # Cancel safety
/// Dropping the future closes the socket; the kernel resets connections that were still in its queue.
pub async fn run(
    listener: Listening,
    name: &str,
    counters: &ListenerCounters,
    drain: &Drain,
    is_starved: impl Fn() -> bool,
    on_connection: impl Fn(Socket, SocketAddr),
) {
    let mut exhausted_since: Option<Instant> = None;
    // When the last warning was logged. A successful accept does not reset this: while a single descriptor
    // comes and goes, each accept ends one outage and begins the next.
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
                // The client has gone already (ECONNABORTED), or a signal came (EINTR). The next accept may
                // work.
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
        warn!(
            listener = name, %error,
            "connections that complete their handshake while the listener closes will be reset"
        );
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
                // If the filter for new handshakes failed, the queue may never become empty.
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

/// The number of accepts left until the sessions run.
struct Batch(u32);

impl Batch {
    /// Counts one accept. After the last one of the batch it lets the sessions run and returns true.
    async fn accepted(&mut self) -> bool {
        self.0 -= 1;
        if self.0 > 0 {
            return false;
        }
        // This task, and the sessions that it has just begun, run after the reactor's next wait. By then
        // the reactor knows which of the clients were reset in the kernel's queue, and their sessions open
        // no connection to a backend.
        reactor::defer_due_tasks_until_next_wait();
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

    /// A session that always wants to run sees at most one batch of accepts between two of its polls.
    #[tokio::test]
    async fn a_flood_of_connections_starves_no_session() {
        // The standard library asks for a queue of 128.
        const FLOOD: u32 = 120;
        let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = socket.local_addr().expect("bound");
        let _clients: Vec<_> = (0..FLOOD).map(|_| TcpStream::connect(address).expect("room")).collect();
        socket.set_nonblocking(true).expect("a socket");

        let (control, drain) = drain::channel();
        control.advance(Phase::Serving);
        let (accepted, counters) = (Cell::new(0), ListenerCounters::default());
        let _reactor = beside_tokio::install();
        let listening = Listening::watch(socket).expect("a reactor");
        let on_connection = |_, _| {
            accepted.set(accepted.get() + 1);
            assert_eq!(reactor::is_busy(), accepted.get() > BUSY_ACCEPTS);
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
        // Polled in this order, so that between two polls of the session the accept loop is polled exactly
        // once.
        let most = tokio::select! {
            biased;
            () = accepting => unreachable!("it accepts until the drain"),
            most = session => most,
        };
        assert!((1..=BATCH).contains(&most), "{most} in one go");
    }
}
