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
/// A writer that flips between a good table and a bad one makes thousands of changes a second, each of them news.
const LOG_WINDOW: Duration = Duration::from_secs(10);
/// Reports of members left out in one window, of up to 11 lines each.
const MOST_REPORTS: u32 = 1;
/// Lines in one window that say how a key can be read: enough to see a fault, its cure and one more of both at once.
const MOST_STATES: u32 = 4;
/// Members named in one report.
const MOST_NAMED: usize = 10;

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
#[derive(Clone, Debug)]
struct State {
    /// The newest snapshot is what Redis held when it was last read.
    in_step: bool,
    /// What was last said of it, so that it is said once.
    said: Option<Said>,
    states: Pace,
    /// The same of the members that were left out.
    rejected: Vec<Rejected>,
    reports: Pace,
    rest_until: Option<Instant>,
}

impl State {
    fn new() -> Self {
        Self {
            in_step: false,
            said: None,
            states: Pace::new(MOST_STATES),
            rejected: Vec::new(),
            reports: Pace::new(MOST_REPORTS),
            rest_until: None,
        }
    }
}

/// Allows so many lines in each [`LOG_WINDOW`], and counts the others. What is held back is not lost: whoever asks
/// compares with what was last *said*, so a later read says where it ended.
#[derive(Clone, Debug)]
struct Pace {
    most: u32,
    said: u32,
    window_ends: Option<Instant>,
    held_back: u64,
}

impl Pace {
    fn new(most: u32) -> Self {
        Self { most, said: 0, window_ends: None, held_back: 0 }
    }

    /// `None`: not now. Otherwise what was held back since the last time, for the line.
    fn may_say(&mut self, now: Instant) -> Option<HeldBack> {
        if self.window_ends.is_none_or(|ends| ends <= now) {
            (self.window_ends, self.said) = (Some(now + LOG_WINDOW), 0);
        }
        if self.said >= self.most {
            self.held_back += 1;
            return None;
        }
        self.said += 1;
        Some(Some(std::mem::take(&mut self.held_back)).filter(|count| *count > 0))
    }
}

/// How many lines were not written; a field of a log line that is left out where there are none.
type HeldBack = Option<u64>;

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
        Self { followed, on_empty, status, tables, states: vec![State::new(); followed.len()] }
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
        let Followed { pool, cell, key } = &self.followed[place];
        let answer: Result<Value, RedisError> = redis::cmd("ZRANGE")
            .arg(key)
            .arg(0)
            .arg(MAX_MEMBERS)
            .arg("WITHSCORES")
            .query_async(connection)
            .await;
        self.status.resyncs.add(1);
        let is_no_table = matches!(&answer, Err(error) if error.code() == Some("WRONGTYPE"));
        let read = match answer {
            Ok(answer) => decode::table(answer).map_err(|malformed| malformed.to_string()),
            Err(error) if connection::is_refusal(&error) => {
                let cure = if is_no_table {
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
                // Whatever was written over it, the table is gone. Any other refusal says nothing of the table.
                let refuses = is_no_table && self.on_empty == OnEmpty::Refuse;
                if refuses {
                    cell.publish(Table::default());
                }
                if let Some((_, held_back)) = self.says(place, Some(Said::Refused(reason.clone()))) {
                    let then = if refuses {
                        "cannot read the weights, refusing sessions (redis.on_empty)"
                    } else {
                        "cannot read the weights, keeping the last table"
                    };
                    error!(pool = %pool, key, reason, held_back, "{then}");
                }
                Ok(None)
            }
        }
    }

    fn take(&mut self, place: usize, decoded: Decoded, since: Instant) {
        let Followed { pool, cell, key } = &self.followed[place];
        let Decoded { table, rejected } = decoded;
        self.tables[place].rejected_members.store(rejected.len() as u64, Relaxed);
        let state = &mut self.states[place];
        if state.rejected != rejected {
            if rejected.is_empty() {
                state.rejected = rejected;
            } else if let Some(held_back) = state.reports.may_say(Instant::now()) {
                for Rejected { member, reason } in rejected.iter().take(MOST_NAMED) {
                    warn!(pool = %pool, key, member, %reason, "a member is left out");
                }
                if rejected.len() > MOST_NAMED || held_back.is_some() {
                    let count = rejected.len().saturating_sub(MOST_NAMED);
                    warn!(pool = %pool, key, count, held_back, "more members are left out");
                }
                state.rejected = rejected;
            }
        }
        state.in_step = true;
        if table.is_empty() {
            return self.take_empty(place, table);
        }
        match self.says(place, None) {
            Some((Some(Said::Empty), held_back)) => {
                info!(pool = %pool, key, held_back, "redis holds weights again");
            }
            Some((_, held_back)) => info!(pool = %pool, key, held_back, "the table can be read again"),
            None => {}
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
                if let Some((_, held_back)) = news {
                    let origin = cell.load().origin;
                    warn!(
                        pool = %pool, key, last = origin.name(), held_back,
                        "redis holds no weights, going on with the last table: ZADD members, or set redis.on_empty: refuse"
                    );
                }
            }
            OnEmpty::Refuse => {
                cell.publish(empty);
                if let Some((_, held_back)) = news {
                    error!(pool = %pool, key, held_back, "redis holds no weights, refusing sessions (redis.on_empty)");
                }
            }
        }
    }

    /// `Some` if `said` is news of a pool and may be said now: then it is to be said, and this is what was said before.
    fn says(&mut self, place: usize, said: Option<Said>) -> Option<(Option<Said>, HeldBack)> {
        let state = &mut self.states[place];
        if state.said == said {
            return None;
        }
        let held_back = state.states.may_say(Instant::now())?;
        Some((std::mem::replace(&mut state.said, said), held_back))
    }
}

/// Waits for a change, at most until `rest_ends`, when something that changed before has rested. Cancel safe.
pub(super) async fn changed(changes: &Changes, rest_ends: Option<Instant>) {
    match rest_ends {
        Some(rest_ends) => drop(timeout_at(rest_ends, changes.noticed.notified()).await),
        None => changes.noticed.notified().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::cell::Cell;
    use std::sync::Arc;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn a_window_has_its_lines_and_the_next_one_tells_what_was_held_back() {
        let mut pace = Pace::new(2);
        let mut says = || pace.may_say(Instant::now());
        assert_eq!((says(), says(), says(), says()), (Some(None), Some(None), None, None));
        advance(LOG_WINDOW - Duration::from_millis(1)).await;
        assert_eq!(says(), None);
        advance(Duration::from_millis(1)).await;
        assert_eq!((says(), says(), says()), (Some(Some(3)), Some(None), None));
    }

    #[tokio::test(start_paused = true)]
    async fn the_state_in_which_flips_end_is_said_when_the_window_has_passed() {
        let cell = Arc::new(Cell::new(Table::default(), 1));
        let followed = [Followed { pool: "web".into(), cell, key: "servers".into() }];
        let (status, tables) = (RedisStatus::default(), [TableStatus::default()]);
        let mut syncer = Syncer::new(&followed, OnEmpty::KeepLast, &status, &tables);
        let said = (0..1_000).filter(|flip| {
            let state = (flip % 2 == 0).then_some(Said::Empty);
            syncer.says(0, state).is_some()
        });
        assert_eq!(said.count(), MOST_STATES as usize);
        // It ended in a good table, and the last line says so already.
        assert_eq!(syncer.says(0, None), None);

        assert_eq!(syncer.says(0, Some(Said::Empty)), None, "held back");
        advance(LOG_WINDOW).await;
        let news = syncer.says(0, Some(Said::Empty));
        assert!(matches!(news, Some((None, Some(held_back))) if held_back > 400), "{news:?}");
    }
}
