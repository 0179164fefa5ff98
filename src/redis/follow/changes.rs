//! What may have changed: marks set by messages, taken by whoever reads.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::redis::schema::companion::Companions;
use crate::redis::schema::followed::Followed;

/// Why a pool is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::redis) enum Cause {
    /// A keyspace notification came.
    Notified = 1,
    /// The server no longer tracks a key that was read.
    Invalidated = 2,
    /// The server says that everything is gone: FLUSHALL, FLUSHDB, or a replica that is filled anew.
    Flushed = 4,
    /// Events may have been missed: the connection is new, or the server was not ready.
    Missed = 8,
    /// It is time to read it again, whether or not anything changed.
    Due = 16,
}

impl Cause {
    /// What the server tells by itself, so that it may be an echo of a read.
    pub(in crate::redis) const EVENTS: [Self; 3] = [Self::Notified, Self::Invalidated, Self::Flushed];
}

/// A set of causes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::redis) struct Causes(u8);

impl Causes {
    pub(in crate::redis) fn has(self, cause: Cause) -> bool {
        self.0 & cause as u8 != 0
    }

    #[must_use]
    pub(in crate::redis) fn with(self, cause: Cause) -> Self {
        Self(self.0 | cause as u8)
    }
}

impl From<Cause> for Causes {
    fn from(cause: Cause) -> Self {
        Self(cause as u8)
    }
}

/// A pool that is to be read.
#[derive(Clone, Copy, Debug)]
pub(in crate::redis) struct Mark {
    /// The time of the first cause.
    pub(in crate::redis) since: Instant,
    pub(in crate::redis) causes: Causes,
}

/// Which keys may have changed, set from the connection's reader.
#[derive(Debug)]
pub(in crate::redis) struct Changes {
    /// Channel → the places of the pools that follow its key.
    channels: HashMap<Vec<u8>, Vec<usize>>,
    /// Those of `channels` that tell of admin states: a user may have no right to hear them.
    of_states: HashSet<Vec<u8>>,
    /// By pool.
    marks: Mutex<Vec<Option<Mark>>>,
    pub(in crate::redis) noticed: Notify,
}

impl Changes {
    pub(in crate::redis) fn new(followed: &[Followed], database: u32) -> Self {
        let mut channels: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        let mut of_states = HashSet::new();
        for (place, Followed { key, .. }) in followed.iter().enumerate() {
            channels.entry(channel(database, key).into_bytes()).or_default().push(place);
            let states = channel(database, &Companions::of(key).states).into_bytes();
            channels.entry(states.clone()).or_default().push(place);
            of_states.insert(states);
        }
        Self { channels, of_states, marks: Mutex::new(vec![None; followed.len()]), noticed: Notify::new() }
    }

    /// The channels of all weights, each once.
    pub(in crate::redis) fn channels(&self) -> impl Iterator<Item = &[u8]> {
        self.channels.keys().map(Vec::as_slice).filter(|channel| !self.of_states.contains(*channel))
    }

    /// The channels of all admin states, each once.
    pub(in crate::redis) fn channels_of_states(&self) -> impl Iterator<Item = &[u8]> {
        self.of_states.iter().map(Vec::as_slice)
    }

    /// An event told of the key that `channel` belongs to. Returns false where no pool follows it.
    pub(in crate::redis) fn notice(&self, channel: &[u8], cause: Cause) -> bool {
        let Some(places) = self.channels.get(channel) else { return false };
        self.mark(places.iter().copied(), cause);
        true
    }

    /// Every pool is to be read.
    pub(in crate::redis) fn notice_all(&self, cause: Cause) {
        let count = self.marks().len();
        self.mark(0..count, cause);
    }

    pub(in crate::redis) fn mark(&self, places: impl Iterator<Item = usize>, cause: Cause) {
        let (now, mut is_news) = (Instant::now(), false);
        let mut marks = self.marks();
        for place in places {
            let mark = marks[place].get_or_insert(Mark { since: now, causes: Causes::default() });
            is_news |= !mark.causes.has(cause);
            mark.causes = mark.causes.with(cause);
        }
        drop(marks);
        // A flood of events about a pool that rests wakes the reader once.
        if is_news {
            self.noticed.notify_one();
        }
    }

    pub(in crate::redis) fn take(&self, place: usize) -> Option<Mark> {
        self.marks()[place].take()
    }

    /// The pools that are marked.
    pub(in crate::redis) fn marked(&self) -> Vec<(usize, Mark)> {
        self.marks().iter().enumerate().filter_map(|(place, mark)| Some((place, (*mark)?))).collect()
    }

    /// By pool.
    pub(in crate::redis) fn of_all(&self) -> Vec<Option<Mark>> {
        self.marks().clone()
    }

    fn marks(&self) -> MutexGuard<'_, Vec<Option<Mark>>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn channel(database: u32, key: &str) -> String {
    format!("__keyspace@{database}__:{key}")
}

/// Waits for a change, at most until `rest_ends`, when something that changed before has rested. Cancel safe.
pub(in crate::redis) async fn changed(changes: &Changes, rest_ends: Option<Instant>) {
    match rest_ends {
        Some(rest_ends) => drop(timeout_at(rest_ends, changes.noticed.notified()).await),
        None => changes.noticed.notified().await,
    }
}
