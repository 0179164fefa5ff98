//! Reads whole tables, at its own pace, and publishes them.
//!
//! A notification only ever sets a flag: what changed is read, never told. So a burst of a thousand changes costs as
//! many reads as there is time for, and a lost or doubled notification can do no harm that the next read does not mend.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisError, Value};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, error, info, warn};

use super::decode::{self, Decoded, Rejected};
use super::status::{RedisStatus, TableStatus};
use super::{Followed, connection};
use crate::balance::Table;
use crate::config::OnEmpty;

/// A table of this size is read in some 50 ms and picked from in 20 ns; one that is larger is a mistake or an attack.
const MAX_MEMBERS: usize = 100_000;
/// Rest after a read, for each member that it gave: a read costs Redis 0.5 µs a member, so it is never busy with us for
/// more than a twentieth of its time.
const REST_PER_MEMBER: Duration = Duration::from_micros(10);
const LONGEST_REST: Duration = Duration::from_millis(100);
/// Between two tries at a key that cannot be read.
const REST_AFTER_REFUSAL: Duration = Duration::from_secs(1);

/// Which keys may have changed, set from the connection's reader.
#[derive(Debug)]
pub(super) struct Changes {
    /// Channel → the places of the pools that follow its key.
    channels: HashMap<Vec<u8>, Vec<usize>>,
    /// For each pool: since when its key may have changed.
    since: Mutex<Vec<Option<Instant>>>,
    pub(super) noticed: Notify,
}

impl Changes {
    pub(super) fn new(followed: &[Followed], database: u32) -> Self {
        let mut channels: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        for (place, Followed { key, .. }) in followed.iter().enumerate() {
            channels.entry(channel(database, key).into_bytes()).or_default().push(place);
        }
        Self { channels, since: Mutex::new(vec![None; followed.len()]), noticed: Notify::new() }
    }

    /// All channels, each once.
    pub(super) fn channels(&self) -> impl Iterator<Item = &[u8]> {
        self.channels.keys().map(Vec::as_slice)
    }

    /// A message came in on `channel`. Returns false if nobody follows it.
    pub(super) fn notice(&self, channel: &[u8]) -> bool {
        let Some(places) = self.channels.get(channel) else { return false };
        self.mark(places.iter().copied());
        true
    }

    /// Every key may have changed.
    pub(super) fn notice_all(&self) {
        let count = self.channels.values().map(Vec::len).sum();
        self.mark(0..count);
    }

    fn mark(&self, places: impl Iterator<Item = usize>) {
        let now = Instant::now();
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        for place in places {
            since[place].get_or_insert(now);
        }
        drop(since);
        self.noticed.notify_one();
    }

    fn take(&self, place: usize) -> Option<Instant> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)[place].take()
    }

    fn is_marked(&self, place: usize) -> bool {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)[place].is_some()
    }
}

fn channel(database: u32, key: &str) -> String {
    format!("__keyspace@{database}__:{key}")
}

/// Follows the tables of all pools over one connection after the other.
pub(super) struct Syncer<'a> {
    followed: &'a [Followed],
    on_empty: OnEmpty,
    status: &'a RedisStatus,
    tables: &'a [TableStatus],
    states: Vec<State>,
}

/// What is known of one pool's key.
#[derive(Clone, Debug, Default)]
struct State {
    /// The newest snapshot is what Redis held when it was last read.
    in_step: bool,
    /// What was last said of it, so that it is said once.
    said: Option<Said>,
    rejected: Vec<Rejected>,
    rest_until: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq)]
enum Said {
    Empty,
    Refused(String),
}

impl<'a> Syncer<'a> {
    pub(super) fn new(
        followed: &'a [Followed],
        on_empty: OnEmpty,
        status: &'a RedisStatus,
        tables: &'a [TableStatus],
    ) -> Self {
        Self { followed, on_empty, status, tables, states: vec![State::default(); followed.len()] }
    }

    /// Reads what may have changed and has rested. Returns when the next rest ends, if something still waits.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(super) async fn read_changed(
        &mut self,
        connection: &mut MultiplexedConnection,
        changes: &Changes,
    ) -> Result<Option<Instant>, RedisError> {
        let mut next: Option<Instant> = None;
        for place in 0..self.followed.len() {
            if !changes.is_marked(place) {
                continue;
            }
            let now = Instant::now();
            if let Some(rest) = self.states[place].rest_until.filter(|rest| *rest > now) {
                next = Some(next.map_or(rest, |other| other.min(rest)));
                continue;
            }
            // Taken before the read: a change that comes during it is a new one.
            let Some(since) = changes.take(place) else { continue };
            let rest = match self.read(connection, place, since).await? {
                Some(members) => {
                    (REST_PER_MEMBER * u32::try_from(members).unwrap_or(u32::MAX)).min(LONGEST_REST)
                }
                None => {
                    // A right that is granted, or a script that ends, is announced by no event.
                    changes.mark(std::iter::once(place));
                    REST_AFTER_REFUSAL
                }
            };
            let rest_until = now + rest;
            self.states[place].rest_until = Some(rest_until);
            if changes.is_marked(place) {
                next = Some(next.map_or(rest_until, |other| other.min(rest_until)));
            }
        }
        Ok(next)
    }

    /// Nothing has changed, says a heartbeat that was answered after every notification before it: what is in step and
    /// not marked is confirmed.
    pub(super) fn confirm(&self, changes: &Changes) {
        for (place, (state, followed)) in self.states.iter().zip(self.followed).enumerate() {
            if state.in_step && !changes.is_marked(place) {
                followed.cell.confirm();
            }
        }
    }

    /// Returns the number of members that Redis sent; `None`: it refused, or what it sent is no table.
    async fn read(
        &mut self,
        connection: &mut MultiplexedConnection,
        place: usize,
        since: Instant,
    ) -> Result<Option<usize>, RedisError> {
        let Followed { pool, key, .. } = &self.followed[place];
        let answer: Result<Value, RedisError> = redis::cmd("ZRANGE")
            .arg(key)
            .arg(0)
            .arg(MAX_MEMBERS)
            .arg("WITHSCORES")
            .query_async(connection)
            .await;
        self.status.resyncs.add(1);
        let read = match answer {
            Ok(answer) => decode::table(answer).map_err(|malformed| malformed.to_string()),
            Err(error) if connection::is_refusal(&error) => {
                let cure = if error.code() == Some("WRONGTYPE") {
                    "the key holds something else than a sorted set: delete it and ZADD the members again"
                } else {
                    connection::cure(&error)
                };
                Err(format!("{error}: {cure}"))
            }
            Err(error) => return Err(error),
        };
        let members = read.as_ref().map_or(0, |d| d.table.members().len() + d.rejected.len());
        let read = read.and_then(|decoded| {
            if members > MAX_MEMBERS {
                return Err(format!("the key has more than {MAX_MEMBERS} members: split the pool"));
            }
            Ok(decoded)
        });
        match read {
            Ok(decoded) => {
                self.take(place, decoded, since);
                Ok(Some(members))
            }
            Err(reason) => {
                self.tables[place].failed_reads.add(1);
                self.states[place].in_step = false;
                if self.says(place, Some(Said::Refused(reason.clone()))) {
                    error!(pool = %pool, key, reason, "cannot read the weights, keeping the last table");
                }
                Ok(None)
            }
        }
    }

    fn take(&mut self, place: usize, decoded: Decoded, since: Instant) {
        let Followed { pool, cell, key } = &self.followed[place];
        let Decoded { table, rejected } = decoded;
        self.tables[place].rejected_members.store(rejected.len() as u64, Relaxed);
        if self.states[place].rejected != rejected {
            for Rejected { member, reason } in rejected.iter().take(10) {
                warn!(pool = %pool, key, member, %reason, "a member is left out");
            }
            if rejected.len() > 10 {
                warn!(pool = %pool, key, count = rejected.len() - 10, "more members are left out");
            }
            self.states[place].rejected = rejected;
        }
        self.states[place].in_step = true;
        if table.is_empty() {
            return self.take_empty(place, table);
        }
        if self.says(place, None) {
            info!(pool = %pool, key, "the table can be read again");
        }
        let backends = table.members().len();
        if cell.publish(table) {
            self.status.propagation.observe(since.elapsed());
            debug!(pool = %pool, key, backends, version = cell.load().version, "new weights");
        }
    }

    fn take_empty(&mut self, place: usize, empty: Table) {
        let Followed { pool, cell, key } = &self.followed[place];
        let news = self.says(place, Some(Said::Empty));
        match self.on_empty {
            OnEmpty::KeepLast => {
                cell.confirm();
                if news {
                    let origin = cell.load().origin;
                    warn!(
                        pool = %pool, key, last = ?origin,
                        "redis holds no weights, going on with the last table: ZADD members, or set redis.on_empty: refuse"
                    );
                }
            }
            OnEmpty::Refuse => {
                cell.publish(empty);
                if news {
                    error!(pool = %pool, key, "redis holds no weights, refusing sessions (redis.on_empty)");
                }
            }
        }
    }

    /// Notes what is to be said of a pool. True if that is news.
    fn says(&mut self, place: usize, said: Option<Said>) -> bool {
        let news = self.states[place].said != said;
        self.states[place].said = said;
        news
    }
}

/// Waits for a change, at most until `rest_ends`, when something that changed before has rested. Cancel safe.
pub(super) async fn changed(changes: &Changes, rest_ends: Option<Instant>) {
    match rest_ends {
        Some(rest_ends) => drop(timeout_at(rest_ends, changes.noticed.notified()).await),
        None => changes.noticed.notified().await,
    }
}
