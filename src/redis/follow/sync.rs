//! Reads whole tables, at its own pace, and publishes them.
//!
//! A notification only ever sets a flag: what changed is read, never told. So a burst of a thousand changes costs as
//! many reads as there is time for, and a lost or doubled notification can do no harm that the next read does not mend.

use std::mem::{Discriminant, discriminant};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::changes::{Cause, Changes, Mark};
use super::event_rest::Longest;
use super::rest::rest_after;
use super::schedule::{Next, Schedule};
use super::states::States;
use super::table_log::TableLog;
use super::table_read::{self, Answer, Asked, Question};
use crate::balance::Table;
use crate::config::OnEmpty;
use crate::control::backoff::{Backoff, jittered};
use crate::control::log_limiter::{HeldBack, LogLimiter};
use crate::redis::schema::decode::{self, Decoded, Rejected};
use crate::redis::schema::followed::Followed;
use crate::redis::status::{RedisStatus, WatchMode};
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// A table of this size is read in some 50 ms and picked from in 20 ns; one that is larger is a mistake or an attack.
pub(in crate::redis) const MAX_MEMBERS: usize = 100_000;
/// Between two tries at a key that cannot be read.
const REST_AFTER_REFUSAL: Duration = Duration::from_secs(1);
/// The same of an answer that is too large: Redis makes up the whole of it each time, for each proxy.
const LONGEST_REST_AFTER_TOO_LARGE: Duration = Duration::from_secs(30);
/// Reports of members left out in one window, of up to 11 lines each.
const MOST_REPORTS: u32 = 1;
/// Lines in one window that say how a key can be read: enough to see a fault, its cure and one more of both at once.
const MOST_STATES: u32 = 4;
/// Members named in one report.
const MOST_NAMED: usize = 10;

/// Follows the tables of all pools over one connection after the other.
pub(in crate::redis) struct Syncer<'a> {
    followed: &'a [Followed],
    on_empty: OnEmpty,
    status: &'a RedisStatus,
    states: Vec<State>,
    schedule: Schedule,
}

/// What is known of one pool's key.
#[derive(Clone, Debug)]
struct State {
    /// The newest snapshot is what Redis held when it was last read.
    in_step: bool,
    /// What was last said of it, so that it is said once.
    said: Option<Said>,
    states: LogLimiter,
    /// The same of the members that were left out.
    rejected: Vec<Rejected>,
    reports: LogLimiter,
    /// The members that were left out of the last read, whether or not they were reported.
    left_out: u64,
    /// It had more than [`MAX_MEMBERS`] when it was last read: they are counted before it is read again.
    had_too_many: bool,
    /// After answers that are too large.
    too_large: Backoff,
    /// Why the last read ended with the connection.
    cut_off: Option<Discriminant<RedisError>>,
    admin: States,
    log: TableLog,
}

impl State {
    fn new() -> Self {
        Self {
            had_too_many: false,
            too_large: Backoff::new(REST_AFTER_REFUSAL, LONGEST_REST_AFTER_TOO_LARGE),
            cut_off: None,
            admin: States::new(),
            log: TableLog::new(),
            in_step: false,
            said: None,
            states: LogLimiter::new(MOST_STATES),
            rejected: Vec::new(),
            reports: LogLimiter::new(MOST_REPORTS),
            left_out: 0,
        }
    }
}

/// What came of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// A table, for which Redis sent so many members.
    Members {
        count: usize,
        /// It, or the admin states beside it, hold something else than before.
        is_new: bool,
    },
    /// Redis refused, or what it sent is no table.
    Refused(RefusalEnd),
}

/// How the end of a refusal is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusalEnd {
    /// The key has to be written, which is noticed like any other change.
    Announced,
    /// No event tells of a right that is granted, or of a script that ends: the key is tried again. So is one that has too
    /// many members, which costs no more than to count them.
    Unannounced,
}

#[derive(Clone, Debug, PartialEq)]
enum Said {
    Empty,
    Refused(String),
}

impl<'a> Syncer<'a> {
    pub(in crate::redis) fn new(
        followed: &'a [Followed],
        on_empty: OnEmpty,
        longest: Longest,
        status: &'a RedisStatus,
    ) -> Self {
        let states = vec![State::new(); followed.len()];
        Self { followed, on_empty, status, states, schedule: Schedule::new(followed.len(), longest) }
    }

    /// Changes are noticed by `mode` from now on.
    pub(in crate::redis) fn watch_by(&mut self, mode: WatchMode) {
        self.schedule.watch_by(mode);
    }

    /// True where each pool was read, or refused to be read.
    pub(in crate::redis) fn has_tried_all(&self) -> bool {
        self.schedule.has_tried_all()
    }

    /// Reads pools that are marked and have rested, as many as may be asked for at once. Returns when the next one may be
    /// read, if some are still marked: the caller does what else is due before.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(in crate::redis) async fn read_changed(
        &mut self,
        connection: &RoutedConnection,
        changes: &Changes,
    ) -> Result<Option<Instant>, RedisError> {
        let ready = match self.schedule.next(changes) {
            Next::Read(ready) => ready,
            Next::Wait(until) => return Ok(until),
        };
        // Marks are taken before the read: a change that comes during it is a new one.
        let marked: Vec<(usize, Mark)> =
            ready.into_iter().filter_map(|place| Some((place, changes.take(place)?))).collect();
        self.status.resyncs.add(marked.len() as u64);
        let questions = marked.iter().map(|(place, _)| self.question(*place)).collect();
        let asked = table_read::ask(connection, questions).await;
        let at_once = marked.len();
        for ((place, mark), asked) in marked.into_iter().zip(asked) {
            let (answered_in, answered) = (asked.took, Instant::now());
            let before = self.followed[place].cell.load().version;
            let mut is_news = false;
            let read = self.take_answer(place, mark.since, asked, at_once == 1);
            self.states[place].log.look(&self.followed[place]);
            let rest = match read.map_err(|error| self.cut_off(place, error, at_once)) {
                Ok(Read::Members { count, is_new }) => {
                    is_news |= is_new;
                    rest_after(count, answered_in + answered.elapsed())
                }
                Ok(Read::Refused(end)) => {
                    if end == RefusalEnd::Unannounced {
                        changes.mark(std::iter::once(place), Cause::Due);
                    }
                    jittered(REST_AFTER_REFUSAL)
                }
                Err(error) if error.is_too_large() && at_once == 1 => {
                    // The next connection finds it resting.
                    let rest = self.states[place].too_large.pause();
                    self.schedule.rest(place, rest);
                    self.refuses(place, format!("{error}: {}", error.cure()));
                    return Err(error);
                }
                Err(error) => return Err(error),
            };
            is_news |= self.followed[place].cell.load().version != before;
            self.schedule.was_tried(place, mark.causes, is_news, rest);
        }
        Ok(match self.schedule.next(changes) {
            Next::Read(_) => Some(Instant::now()),
            Next::Wait(until) => until,
        })
    }

    fn question(&self, place: usize) -> Question {
        let state = &self.states[place];
        let followed = self.followed[place].clone();
        Question { followed, counts_first: state.had_too_many, skips_states: state.admin.rest() }
    }

    /// Redis cuts off a subscriber whom it owes more than 32 MB, and says so in its own log alone; and what is large may
    /// take longer than it has. Once, Redis may have ended, or be busy. Where several tables were asked for at once, it may be
    /// any of them, or their sum: fewer are asked for at once for a while.
    fn cut_off(&mut self, place: usize, error: RedisError, at_once: usize) -> RedisError {
        let is_of_size = error.is_closed() || error.is_timeout() || error.is_too_large();
        if at_once > 1 && is_of_size {
            self.schedule.read_fewer(at_once);
            return error;
        }
        let repeated = match error {
            _ if error.is_closed() => RedisError::ClosedDuringRead,
            _ if error.is_timeout() => RedisError::TableTooSlow,
            _ => return error,
        };
        let cause = discriminant(&repeated);
        if self.states[place].cut_off.replace(cause) == Some(cause) { repeated } else { error }
    }

    /// A heartbeat of the moment `asked` was answered after every event before it: what is in step and not known to have
    /// changed is confirmed.
    pub(in crate::redis) fn confirm(&mut self, changes: &Changes, asked: Instant) {
        let marks = changes.of_all();
        for (place, (state, followed)) in self.states.iter_mut().zip(self.followed).enumerate() {
            if state.log.owes() {
                state.log.look(followed);
            }
            if state.in_step && self.schedule.is_unchanged(place, marks[place], asked) {
                followed.cell.confirm_as_of(asked);
            }
        }
    }

    /// Takes an answer in. `is_alone`: nothing else was asked for at the same time.
    fn take_answer(
        &mut self,
        place: usize,
        since: Instant,
        answered: Asked,
        is_alone: bool,
    ) -> Result<Read, RedisError> {
        let Asked { at: asked, table: answer, states: admin, .. } = answered;
        let followed = &self.followed[place];
        // What ends the connection is told by the table, if it was its answer.
        let answer = match answer {
            Err(error) if !error.is_refusal() => return Err(error),
            Ok(Answer::TooMany) => {
                self.refuses(place, too_many());
                return Ok(Read::Refused(RefusalEnd::Unannounced));
            }
            Ok(Answer::Members(answer)) => Ok(answer),
            Err(error) => Err(error),
        };
        let mut is_new = false;
        if let Some(read) = admin {
            is_new = self.states[place].admin.take(followed, read, is_alone)?;
        }
        let is_no_table = matches!(&answer, Err(error) if error.code() == Some("WRONGTYPE"));
        let members = answer.as_ref().map_or(0, decode::members);
        self.states[place].had_too_many = members > MAX_MEMBERS;
        let read = match answer {
            Ok(_) if members > MAX_MEMBERS => Err(too_many()),
            Ok(answer) => decode::table(answer).map_err(|malformed| malformed.to_string()),
            Err(error) if error.is_refusal() => {
                let cure = if is_no_table {
                    "the key holds something else than a sorted set: delete it and ZADD the members again"
                } else {
                    error.cure()
                };
                Err(format!("{error}: {cure}"))
            }
            Err(error) => return Err(error),
        };
        match read {
            Ok(mut decoded) => {
                self.states[place].too_large.reset();
                self.states[place].cut_off = None;
                let left_out = decoded.fingerprint_of_rejected();
                is_new |= std::mem::replace(&mut self.states[place].left_out, left_out) != left_out;
                let known = self.states[place].admin.known(&self.followed[place].cell);
                decoded.table = decoded.table.with_states(known);
                self.take(place, decoded, asked, since);
                self.schedule.was_read(place, members, asked);
                Ok(Read::Members { count: members, is_new })
            }
            Err(reason) => {
                // Whatever was written over it, the table is gone. Any other refusal says nothing of the table.
                let Followed { cell, .. } = &self.followed[place];
                cell.set_states(self.states[place].admin.known(cell));
                if is_no_table && self.on_empty == OnEmpty::Refuse {
                    self.followed[place].cell.publish_as_of(Table::default(), asked);
                    self.says_refused(place, reason, "refusing sessions (redis.on_empty)");
                } else {
                    self.refuses(place, reason);
                }
                Ok(Read::Refused(if is_no_table { RefusalEnd::Announced } else { RefusalEnd::Unannounced }))
            }
        }
    }

    /// It cannot be read, which says nothing of the table.
    fn refuses(&mut self, place: usize, reason: String) {
        self.says_refused(place, reason, "keeping the last table");
    }

    fn says_refused(&mut self, place: usize, reason: String, then: &str) {
        self.followed[place].status.failed_reads.add(1);
        self.states[place].in_step = false;
        if let Some((_, held_back)) = self.says(place, Some(Said::Refused(reason.clone()))) {
            let Followed { pool, key, .. } = &self.followed[place];
            error!(pool = %pool, key, reason, held_back, "cannot read the weights, {then}");
        }
    }

    fn take(&mut self, place: usize, decoded: Decoded, asked: Instant, since: Instant) {
        let Followed { pool, cell, key, .. } = &self.followed[place];
        let Decoded { table, rejected } = decoded;
        self.followed[place].status.rejected_members.store(rejected.len() as u64, Relaxed);
        let state = &mut self.states[place];
        if state.rejected != rejected {
            if rejected.is_empty() {
                state.rejected = rejected;
            } else if let Some(held_back) = state.reports.permit(Instant::now()) {
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
            return self.take_empty(place, table, asked);
        }
        self.followed[place].status.is_kept.store(false, Relaxed);
        let mut held_back = None;
        match self.says(place, None) {
            Some((Some(Said::Empty), held)) => {
                self.states[place].log.was_empty();
                held_back = held;
            }
            Some((_, held_back)) => info!(pool = %pool, key, held_back, "the table can be read again"),
            None => {}
        }
        let backends = table.members().len();
        if cell.publish_as_of(table, asked) {
            self.status.propagation.observe(since.elapsed());
            debug!(pool = %pool, key, backends, version = cell.load().version, "new weights");
        }
        self.states[place].log.loaded(&self.followed[place], backends, held_back);
    }

    fn take_empty(&mut self, place: usize, empty: Table, asked: Instant) {
        let Followed { pool, cell, key, .. } = &self.followed[place];
        let news = self.says(place, Some(Said::Empty));
        self.followed[place].status.is_kept.store(self.on_empty == OnEmpty::KeepLast, Relaxed);
        match self.on_empty {
            OnEmpty::KeepLast => {
                // Whatever emptied the table may have taken the states along: those that are left are obeyed.
                if !empty.states().is_empty() {
                    cell.set_states(empty.states().to_vec());
                }
                cell.confirm_as_of(asked);
                if let Some((_, held_back)) = news {
                    let origin = cell.load().origin;
                    warn!(
                        pool = %pool, key, last = origin.name(), held_back,
                        "redis holds no weights, going on with the last table: ZADD members, or set redis.on_empty: refuse"
                    );
                }
            }
            OnEmpty::Refuse => {
                cell.publish_as_of(empty, asked);
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
        let held_back = state.states.permit(Instant::now())?;
        Some((std::mem::replace(&mut state.said, said), held_back))
    }
}

fn too_many() -> String {
    format!("the key has more than {MAX_MEMBERS} members: split the pool")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::Balance;
    use crate::balance::pool::Cell;
    use crate::balance::pool::lua_pick::PoolId;
    use crate::control::log_limiter::LOG_WINDOW;
    use std::sync::Arc;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn the_state_in_which_flips_end_is_said_when_the_window_has_passed() {
        let cell = Arc::new(Cell::new(Table::default(), Balance::WeightedRandom, 1));
        let (id, table_status) = (PoolId::unique(), Arc::default());
        let followed =
            [Followed { id, pool: "web".into(), cell, key: "servers".into(), status: table_status }];
        let status = RedisStatus::default();
        let longest = Longest::new(Duration::from_secs(1), Duration::from_secs(15));
        let mut syncer = Syncer::new(&followed, OnEmpty::KeepLast, longest, &status);
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
