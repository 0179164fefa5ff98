//! Hands a connection to a worker that has far fewer sessions than the one that accepted it.
//!
//! The kernel chooses a listening socket by a hash of the client's address. That spreads many sessions evenly and costs
//! nothing, but of two long ones it puts both on one worker every other time, and half of the machine idles. So each worker
//! compares itself with others at every accept (a look at two counters each), and hands over what would widen a gap that
//! chance alone does not make among many.
//!
//! Only what was just accepted changes hands: a session never moves. Next: `worker.rs` offers and takes over.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::listeners::ListenerId;
use crate::observe::counters::{PerWorker, WorkerId};
use crate::session::SessionCounters;

/// Up to so many sessions of its own a worker compares itself with all others: they are few, and each place counts. Above it
/// with one of them at a time, since a look at another core's counters costs some 50 ns.
const FEW_SESSIONS: u64 = 16;
/// Connections that wait for a worker to take them; above this the one that accepted them keeps them.
const INBOX_CONNECTIONS: usize = 64;

/// A connection that was accepted, and that any worker may serve. Dropped, it is reset: nobody may take it for a session
/// that was complete.
#[derive(Debug)]
pub struct Connection {
    /// The listener that accepted it.
    pub listener: ListenerId,
    /// Its other end.
    pub client: SocketAddr,
    /// Watched by no runtime.
    socket: Option<Socket>,
}

impl Connection {
    /// `socket` was accepted by this listener.
    #[must_use]
    pub fn new(listener: ListenerId, socket: Socket, client: SocketAddr) -> Self {
        Self { listener, client, socket: Some(socket) }
    }

    /// For the worker that serves it.
    #[must_use]
    pub fn into_socket(mut self) -> Socket {
        self.socket.take().expect("it is there until now")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // A failure means that it is gone already.
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
    }
}

/// What is handed to a worker. Ends when no other worker accepts any more.
pub type Inbox = mpsc::Receiver<Connection>;

/// The other workers, as one of them sees them.
#[derive(Debug)]
pub struct Neighbours {
    own: WorkerId,
    sessions: Arc<PerWorker<SessionCounters>>,
    inboxes: Vec<(WorkerId, mpsc::Sender<Connection>)>,
    next: Cell<usize>,
}

/// For each of `workers`: the others, and what they hand to it.
#[must_use]
pub fn between(workers: usize, sessions: &Arc<PerWorker<SessionCounters>>) -> Vec<(Neighbours, Inbox)> {
    let (senders, inboxes): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(INBOX_CONNECTIONS)).unzip();
    let neighbours = (0..workers).map(|own| Neighbours {
        own: WorkerId(own),
        sessions: Arc::clone(sessions),
        inboxes: (0..workers)
            .filter(|other| *other != own)
            .map(|other| (WorkerId(other), senders[other].clone()))
            .collect(),
        next: Cell::new(own),
    });
    neighbours.zip(inboxes).collect()
}

impl Neighbours {
    /// Hands a connection over if another worker is to have it; else gives it back.
    pub fn offer(&self, connection: Connection) -> Option<Connection> {
        let Some(inbox) = self.less_loaded() else { return Some(connection) };
        // Full, or its worker has died.
        inbox.try_send(connection).err().map(TrySendError::into_inner)
    }

    /// A worker that has so much less to do.
    fn less_loaded(&self) -> Option<&mpsc::Sender<Connection>> {
        let own = self.sessions.of(self.own).open();
        // Without a session of its own it cannot have too many.
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
            let turn = self.next.replace(self.next.get().wrapping_add(1));
            let other = &self.inboxes[turn % self.inboxes.len()];
            (load(other), &other.1)
        };
        is_lopsided(own, other).then_some(inbox)
    }
}

/// More than half as many again: with few sessions the workers differ by two at most; with many, chance alone hardly ever
/// makes such a gap, and nothing is handed over.
fn is_lopsided(own: u64, other: u64) -> bool {
    own > other + other / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sessions_are_kept_even_and_chance_among_many_is_left_alone() {
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
