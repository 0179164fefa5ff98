//! Hands a new connection to a worker that has far fewer sessions than the one that accepted it.
//!
//! The kernel chooses a listening socket by a hash of the client's address. That spreads many sessions
//! evenly at no cost. But a few long sessions may all get the same worker (of two workers and two sessions:
//! in half of the cases), while other workers idle. So each worker compares its number of sessions with
//! those of others at every accept, which reads two counters for each. It hands the connection over if the
//! gap is larger than chance makes it among many sessions.
//!
//! Only a connection that was just accepted is handed over. A session never changes its worker.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::listeners::ListenerId;
use crate::observe::counters::{PerWorker, WorkerId};
use crate::session::SessionCounters;

/// Up to this many sessions, a worker compares itself with all others, since each session matters. With
/// more, it compares itself with one other worker at a time, since reading another core's counters costs
/// about 50 ns.
const FEW_SESSIONS: u64 = 16;
/// The capacity of a worker's inbox. If it is full, the worker that accepted the connection keeps it.
const INBOX_CONNECTIONS: usize = 64;

/// An accepted connection that any worker may serve. Dropping it resets the connection, so that the client
/// does not take it for a complete session.
#[derive(Debug)]
pub struct Connection {
    /// The listener that accepted it.
    pub listener: ListenerId,
    /// The client's address.
    pub client: SocketAddr,
    /// Registered with no reactor yet. `None` once a worker has taken it.
    socket: Option<Socket>,
}

impl Connection {
    /// Creates a connection from a `socket` that `listener` accepted from `client`.
    #[must_use]
    pub fn new(listener: ListenerId, socket: Socket, client: SocketAddr) -> Self {
        Self { listener, client, socket: Some(socket) }
    }

    /// Takes the socket out, for the worker that serves it.
    #[must_use]
    pub fn into_socket(mut self) -> Socket {
        self.socket.take().expect("only this takes it, and consumes the connection")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // A failure means that the connection is gone already.
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
    }
}

/// The connections handed to a worker by other workers. The inbox outlives the worker: the worker that
/// replaces it serves the waiting connections.
#[derive(Clone, Debug)]
pub struct Inbox(Arc<Mutex<mpsc::Receiver<Connection>>>);

impl Inbox {
    pub(super) fn new(connections: mpsc::Receiver<Connection>) -> Self {
        Self(Arc::new(Mutex::new(connections)))
    }

    /// Waits until no other thread has the inbox open, and opens it for the thread that takes the
    /// connections. Its connections end when no other worker accepts any more.
    pub async fn open(self) -> OwnedMutexGuard<mpsc::Receiver<Connection>> {
        self.0.lock_owned().await
    }

    /// Returns the number of connections that wait in the inbox; 0 while a thread takes them.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.try_lock().map_or(0, |connections| connections.len())
    }
}

/// The other workers, from the view of one of them.
#[derive(Clone, Debug)]
pub struct Neighbours {
    own: WorkerId,
    sessions: Arc<PerWorker<SessionCounters>>,
    inboxes: Vec<(WorkerId, mpsc::Sender<Connection>)>,
    next: Cell<usize>,
}

/// Returns for each of `workers` workers the other workers, and its own inbox.
#[must_use]
pub fn between(workers: usize, sessions: &Arc<PerWorker<SessionCounters>>) -> Vec<(Neighbours, Inbox)> {
    let inbox = |_| mpsc::channel(INBOX_CONNECTIONS);
    let (senders, inboxes): (Vec<_>, Vec<_>) = (0..workers).map(inbox).unzip();
    let neighbours = (0..workers).map(|own| Neighbours {
        own: WorkerId(own),
        sessions: Arc::clone(sessions),
        inboxes: (0..workers)
            .filter(|other| *other != own)
            .map(|other| (WorkerId(other), senders[other].clone()))
            .collect(),
        next: Cell::new(own),
    });
    neighbours.zip(inboxes.into_iter().map(Inbox::new)).collect()
}

impl Neighbours {
    /// Hands the connection to a worker with far fewer sessions. Returns it if there is no such worker, or
    /// if that worker's inbox is full or closed.
    pub fn offer(&self, connection: Connection) -> Option<Connection> {
        let Some(inbox) = self.less_loaded() else { return Some(connection) };
        // An error means that the inbox is full or its worker has died.
        inbox.try_send(connection).err().map(TrySendError::into_inner)
    }

    /// The inbox of a worker with far fewer sessions.
    fn less_loaded(&self) -> Option<&mpsc::Sender<Connection>> {
        let own = self.sessions.of(self.own).open();
        // A worker without sessions cannot have too many.
        if own == 0 || self.inboxes.is_empty() {
            return None;
        }
        let load = |(other, inbox): &(WorkerId, mpsc::Sender<Connection>)| {
            let waiting = (inbox.max_capacity() - inbox.capacity()) as u64;
            self.sessions.of(*other).open() + waiting
        };
        let (other, inbox) = if own <= FEW_SESSIONS {
            self.inboxes.iter().map(|other| (load(other), &other.1)).min_by_key(|(load, _)| *load)?
        } else {
            let next = self.next.replace(self.next.get().wrapping_add(1));
            let other = &self.inboxes[next % self.inboxes.len()];
            (load(other), &other.1)
        };
        is_lopsided(own, other).then_some(inbox)
    }
}

/// True if `own` is more than 1.5 times `other`. Between workers with few sessions this allows a gap of
/// only a few. With many sessions, chance hardly ever makes such a gap, so nothing is handed over.
fn is_lopsided(own: u64, other: u64) -> bool {
    own > other + other / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sessions_are_kept_even_and_chance_among_many_hands_nothing_over() {
        for (own, other, expected) in [
            (1, 0, true),
            (1, 1, false),
            (2, 1, true),
            (3, 2, false),
            (4, 2, true),
            (36, 28, false),
            (43, 28, true),
        ] {
            assert_eq!(is_lopsided(own, other), expected, "{own} here, {other} there");
        }
    }
}
