//! What may have changed: marks set by messages, taken by whoever reads.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::Followed;
use super::companion::Companions;

/// Which keys may have changed, set from the connection's reader.
#[derive(Debug)]
pub(super) struct Changes {
    /// Channel → the places of the pools that follow its key.
    channels: HashMap<Vec<u8>, Vec<usize>>,
    /// Those of `channels` that tell of admin states: a user may have no right to hear them.
    of_states: HashSet<Vec<u8>>,
    /// For each pool: since when its key may have changed.
    since: Mutex<Vec<Option<Instant>>>,
    pub(super) noticed: Notify,
}

impl Changes {
    pub(super) fn new(followed: &[Followed], database: u32) -> Self {
        let mut channels: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        let mut of_states = HashSet::new();
        for (place, Followed { key, .. }) in followed.iter().enumerate() {
            channels.entry(channel(database, key).into_bytes()).or_default().push(place);
            let states = channel(database, &Companions::of(key).states).into_bytes();
            channels.entry(states.clone()).or_default().push(place);
            of_states.insert(states);
        }
        Self { channels, of_states, since: Mutex::new(vec![None; followed.len()]), noticed: Notify::new() }
    }

    /// The channels of all weights, each once.
    pub(super) fn channels(&self) -> impl Iterator<Item = &[u8]> {
        self.channels.keys().map(Vec::as_slice).filter(|channel| !self.of_states.contains(*channel))
    }

    /// The channels of all admin states, each once.
    pub(super) fn channels_of_states(&self) -> impl Iterator<Item = &[u8]> {
        self.of_states.iter().map(Vec::as_slice)
    }

    /// A message came in on `channel`. Returns false if nobody follows it.
    pub(super) fn notice(&self, channel: &[u8]) -> bool {
        let Some(places) = self.channels.get(channel) else { return false };
        self.mark(places.iter().copied());
        true
    }

    /// Every key may have changed.
    pub(super) fn notice_all(&self) {
        let count = self.since.lock().unwrap_or_else(PoisonError::into_inner).len();
        self.mark(0..count);
    }

    pub(super) fn mark(&self, places: impl Iterator<Item = usize>) {
        let now = Instant::now();
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        for place in places {
            since[place].get_or_insert(now);
        }
        drop(since);
        self.noticed.notify_one();
    }

    pub(super) fn take(&self, place: usize) -> Option<Instant> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)[place].take()
    }

    pub(super) fn is_marked(&self, place: usize) -> bool {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)[place].is_some()
    }
}

fn channel(database: u32, key: &str) -> String {
    format!("__keyspace@{database}__:{key}")
}

/// Waits for a change, at most until `rest_ends`, when something that changed before has rested. Cancel safe.
pub(super) async fn changed(changes: &Changes, rest_ends: Option<Instant>) {
    match rest_ends {
        Some(rest_ends) => drop(timeout_at(rest_ends, changes.noticed.notified()).await),
        None => changes.noticed.notified().await,
    }
}
