//! The state of following Redis, for the metrics. Written by the control thread, read on a scrape.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;

use crate::observe::counters::{Counter, Histogram};

/// How changes in Redis are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchMode {
    /// Not connected.
    None = 0,
    /// Keyspace notifications.
    Notifications = 1,
    /// Client tracking: the server remembers what was read, and announces when it changes.
    Tracking = 2,
    /// A read every `poll_interval`.
    Poll = 3,
}

impl WatchMode {
    /// All modes, in the order of their declaration.
    pub const ALL: [Self; 4] = [Self::None, Self::Notifications, Self::Tracking, Self::Poll];

    /// The name in the metric's label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Notifications => "notifications",
            Self::Tracking => "tracking",
            Self::Poll => "poll",
        }
    }
}

/// A watching connection counts as hung after this many looks without a new round.
const HANG_LOOKS: u32 = 5;

/// The state of following Redis as a whole.
#[derive(Debug, Default)]
pub struct RedisStatus {
    /// The modes of the watching connections: one, or one for each node of a cluster that serves a pool's
    /// key.
    modes: Mutex<Vec<Arc<Mode>>>,
    /// Some pools have no server that serves their key.
    lacks_some: AtomicBool,
    /// Messages that announced that a key may have changed.
    pub notifications: Counter,
    /// Reads of whole tables that were begun, also those that fail later.
    pub resyncs: Counter,
    /// Watching connections for pools of which at least one had a connection before.
    pub reconnects: Counter,
    /// The time from the moment a pool is marked for reading, whatever the cause, to its new snapshot.
    /// Observed only where the read changes the table.
    pub propagation: Histogram,
}

impl RedisStatus {
    /// Adds a watching connection. It counts until the returned value is dropped.
    pub(super) fn watch(self: &Arc<Self>) -> Watching {
        let mode = Arc::new(Mode::default());
        self.modes().push(Arc::clone(&mode));
        Watching { status: Arc::clone(self), mode }
    }

    /// Sets whether some pools have no server, since no node of the cluster serves their key.
    pub(super) fn set_lacking(&self, lacks_some: bool) {
        self.lacks_some.store(lacks_some, Relaxed);
    }

    /// Returns the watch mode. With several connections it is the weakest of their modes;
    /// [`WatchMode::None`] if a pool has no server.
    #[must_use]
    pub fn mode(&self) -> WatchMode {
        if self.lacks_some.load(Relaxed) {
            return WatchMode::None;
        }
        let worst_first = [WatchMode::None, WatchMode::Poll, WatchMode::Tracking, WatchMode::Notifications];
        let modes = self.modes();
        let is_in_use = |wanted: &WatchMode| modes.iter().any(|mode| mode.get() == *wanted);
        worst_first.into_iter().find(is_in_use).unwrap_or(WatchMode::None)
    }

    /// Returns true if there is a watching connection, all of them are up, and each pool has a server.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.mode() != WatchMode::None
    }

    /// Waits until the task of a watching connection hangs: it has begun no round for `limit`.
    ///
    /// The time is measured by `HANG_LOOKS` looks, so a process that was stopped (SIGSTOP) does not count
    /// as hung.
    pub async fn hangs(&self, limit: Duration) {
        let mut seen: Vec<(Arc<Mode>, u64, u32)> = Vec::new();
        loop {
            sleep(limit / HANG_LOOKS).await;
            let modes = self.modes().clone();
            seen.retain(|(mode, ..)| modes.iter().any(|other| Arc::ptr_eq(mode, other)));
            for mode in modes {
                let rounds = mode.rounds.load(Relaxed);
                match seen.iter_mut().find(|(other, ..)| Arc::ptr_eq(&mode, other)) {
                    Some((_, before, looks)) if *before == rounds => *looks += 1,
                    Some((_, before, looks)) => (*before, *looks) = (rounds, 0),
                    None => seen.push((mode, rounds, 0)),
                }
            }
            if seen.iter().any(|(.., looks)| *looks >= HANG_LOOKS) {
                return;
            }
        }
    }

    fn modes(&self) -> MutexGuard<'_, Vec<Arc<Mode>>> {
        self.modes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watch mode of one connection, and how many rounds its task has begun.
#[derive(Debug, Default)]
pub(super) struct Mode {
    mode: AtomicU8,
    /// Counts the rounds of the task that watches.
    rounds: AtomicU64,
}

impl Mode {
    pub(super) fn get(&self) -> WatchMode {
        WatchMode::ALL[usize::from(self.mode.load(Relaxed))]
    }
}

/// One watching connection.
#[derive(Debug)]
pub(super) struct Watching {
    status: Arc<RedisStatus>,
    mode: Arc<Mode>,
}

impl Watching {
    /// Sets the watch mode. [`WatchMode::None`] means that the connection is down.
    pub(super) fn set(&self, mode: WatchMode) {
        self.mode.mode.store(mode as u8, Relaxed);
    }

    /// Counts a round of the connection's task, which shows that the task does not hang.
    pub(super) fn begins_round(&self) {
        self.mode.rounds.fetch_add(1, Relaxed);
    }

    pub(super) fn is_up(&self) -> bool {
        self.mode.get() != WatchMode::None
    }

    /// Returns a shared handle to the mode, for the handler of the connection's messages.
    pub(super) fn mode(&self) -> Arc<Mode> {
        Arc::clone(&self.mode)
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.status.modes().retain(|mode| !Arc::ptr_eq(mode, &self.mode));
    }
}

/// The state of one pool's table.
#[derive(Debug, Default)]
pub struct TableStatus {
    /// Members that were left out when a table was last decoded. A failed read does not change it.
    pub rejected_members: AtomicU64,
    /// Reads whose answer was refused, too large or not decodable. A lost connection does not count.
    pub failed_reads: Counter,
    /// Redis holds no weights, and the last table is kept (`redis.on_empty`).
    pub is_kept: AtomicBool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_connections_are_as_good_as_the_worst_of_them() {
        let status = Arc::new(RedisStatus::default());
        assert!(!status.is_connected(), "there is none");
        let (one, other) = (status.watch(), status.watch());
        one.set(WatchMode::Notifications);
        assert!(!status.is_connected(), "one of two");
        other.set(WatchMode::Poll);
        assert_eq!(status.mode(), WatchMode::Poll);
        other.set(WatchMode::Tracking);
        assert_eq!(status.mode(), WatchMode::Tracking);
        drop(other);
        assert_eq!(status.mode(), WatchMode::Notifications);
        status.set_lacking(true);
        assert!(!status.is_connected(), "a pool has no server");
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_begins_no_round_for_the_limit_hangs_though_others_go_on() {
        let (status, limit) = (Arc::new(RedisStatus::default()), Duration::from_secs(10));
        let (first, second) = (status.watch(), status.watch());
        let hangs = |time| tokio::time::timeout(time, status.hangs(limit));
        let runs = |watching: Watching| async move {
            loop {
                watching.begins_round();
                sleep(Duration::from_secs(1)).await;
            }
        };
        let first_runs = runs(first);
        tokio::pin!(first_runs);
        tokio::select! {
            hung = hangs(3 * limit) => assert!(hung.is_ok(), "the second one hangs"),
            () = &mut first_runs => {}
        }
        drop(second);
        tokio::select! {
            hung = hangs(10 * limit) => assert!(hung.is_err(), "one that is gone does not hang"),
            () = &mut first_runs => {}
        }
    }
}
