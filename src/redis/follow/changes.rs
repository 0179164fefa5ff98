//! Which pools are to be read, and why: marks, set by Redis's messages, by timers and after refused reads,
//! and taken by the reader.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::balance::pool::lua_pick::PoolId;
use crate::redis::schema::companion::Companions;
use crate::redis::schema::followed::Followed;

/// Why a pool is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A keyspace notification came.
    Notified = 1,
    /// The server sent an invalidation (client tracking) for a key that was read.
    Invalidated = 2,
    /// The server sent an invalidation of all keys: FLUSHALL, FLUSHDB, or a full resync of a replica.
    Flushed = 4,
    /// Events may have been missed: the connection is new, the server was not ready, or the watch mode has
    /// changed.
    Missed = 8,
    /// The pool is to be read again whether or not it changed: a poll, a full read, or a retry of a refused
    /// read.
    Due = 16,
}

impl Cause {
    /// The causes that the server's messages set. Such a message may itself be caused by a read.
    pub(super) const EVENTS: [Self; 3] = [Self::Notified, Self::Invalidated, Self::Flushed];
}

/// A set of causes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Causes(u8);

impl Causes {
    pub(super) fn has(self, cause: Cause) -> bool {
        self.0 & cause as u8 != 0
    }

    #[must_use]
    pub(super) fn with(self, cause: Cause) -> Self {
        Self(self.0 | cause as u8)
    }
}

impl From<Cause> for Causes {
    fn from(cause: Cause) -> Self {
        Self(cause as u8)
    }
}

/// The mark of a pool that is to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    /// The time of the first cause.
    pub(super) since: Instant,
    pub(super) causes: Causes,
}

/// The marks of the pools that share a connection.
#[derive(Debug)]
pub(super) struct Changes {
    pools: Vec<PoolId>,
    /// The pools that use the key of each notification channel.
    channels: HashMap<Vec<u8>, Vec<PoolId>>,
    /// The channels of admin states, among `channels`: a user may have no right to subscribe to them.
    of_states: HashSet<Vec<u8>>,
    marks: Mutex<HashMap<PoolId, Mark>>,
    /// Wakes the reader when a pool is marked or the connection is lost.
    pub(super) noticed: Notify,
}

impl Changes {
    pub(super) fn new(pools: &[Followed], database: u32) -> Self {
        let mut channels: HashMap<Vec<u8>, Vec<PoolId>> = HashMap::new();
        let mut of_states = HashSet::new();
        for Followed { id, key, .. } in pools {
            channels.entry(channel(database, key).into_bytes()).or_default().push(*id);
            let states = channel(database, &Companions::of(key).states).into_bytes();
            channels.entry(states.clone()).or_default().push(*id);
            of_states.insert(states);
        }
        let pools = pools.iter().map(|pool| pool.id).collect();
        Self { pools, channels, of_states, marks: Mutex::default(), noticed: Notify::new() }
    }

    /// Returns the channels of all weights keys, each once.
    pub(super) fn channels(&self) -> impl Iterator<Item = &[u8]> {
        self.channels.keys().map(Vec::as_slice).filter(|channel| !self.of_states.contains(*channel))
    }

    /// Returns the channels of all admin states, each once.
    pub(super) fn channels_of_states(&self) -> impl Iterator<Item = &[u8]> {
        self.of_states.iter().map(Vec::as_slice)
    }

    /// Marks the pools that use the key of `channel`. Returns false where no pool does.
    pub(super) fn notice(&self, channel: &[u8], cause: Cause) -> bool {
        let Some(pools) = self.channels.get(channel) else { return false };
        self.mark(pools, cause);
        true
    }

    /// Marks every pool.
    pub(super) fn notice_all(&self, cause: Cause) {
        self.mark(&self.pools, cause);
    }

    pub(super) fn mark(&self, pools: &[PoolId], cause: Cause) {
        let (now, mut is_news) = (Instant::now(), false);
        let mut marks = self.marks();
        for pool in pools {
            let mark = marks.entry(*pool).or_insert(Mark { since: now, causes: Causes::default() });
            is_news |= !mark.causes.has(cause);
            mark.causes = mark.causes.with(cause);
        }
        drop(marks);
        // A flood of events about a pool that rests wakes the reader once for each cause.
        if is_news {
            self.noticed.notify_one();
        }
    }

    pub(super) fn take(&self, pool: PoolId) -> Option<Mark> {
        self.marks().remove(&pool)
    }

    /// Returns the marks of all pools that are marked now.
    pub(super) fn marked(&self) -> HashMap<PoolId, Mark> {
        self.marks().clone()
    }

    fn marks(&self) -> MutexGuard<'_, HashMap<PoolId, Mark>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn channel(database: u32, key: &str) -> String {
    format!("__keyspace@{database}__:{key}")
}

/// Waits until a pool is marked or the connection is lost, and until `rest_ends` at most, the end of a
/// marked pool's rest. Cancel safe.
pub(super) async fn changed(changes: &Changes, rest_ends: Option<Instant>) {
    match rest_ends {
        Some(rest_ends) => drop(timeout_at(rest_ends, changes.noticed.notified()).await),
        None => changes.noticed.notified().await,
    }
}
