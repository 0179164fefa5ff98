//! One pool's table: decodes an answer, publishes it, and logs what changed about reading it.

use std::mem::{Discriminant, discriminant};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::states::States;
use super::table_log::TableLog;
use super::table_read::{Answer, Asked, Question};
use crate::balance::Table;
use crate::config::OnEmpty;
use crate::control::backoff::Backoff;
use crate::control::log_limiter::{HeldBack, LogLimiter};
use crate::control::supervised::text;
use crate::observe::counters::Histogram;
use crate::redis::schema::MAX_MEMBERS;
use crate::redis::schema::decode::{self, Decoded, Rejected};
use crate::redis::schema::followed::Followed;
use crate::redis::wire::error::RedisError;

/// The rest after a read that was refused.
pub(super) const REST_AFTER_REFUSAL: Duration = Duration::from_secs(1);
/// The longest rest after an answer that is too large: Redis computes the whole answer each time, for each
/// proxy.
const LONGEST_REST_AFTER_TOO_LARGE: Duration = Duration::from_secs(30);
/// Reports of ignored members in one window, of up to 11 lines each.
const MOST_REPORTS: u32 = 1;
/// Lines in one window about whether a key can be read: enough for two faults and the end of each.
const MOST_READABILITY_LINES: u32 = 4;
/// Members named in one report.
const MOST_NAMED: usize = 10;

/// Keeps one pool's snapshot equal to its table in Redis.
pub(super) struct PoolSync<'a> {
    followed: &'a Followed,
    on_empty: OnEmpty,
    /// The time from the mark that led to a read to the new snapshot.
    propagation: &'a Histogram,
    /// The last read published or confirmed the snapshot, so heartbeats may confirm the snapshot too.
    in_step: bool,
    /// What was logged last about reading the key, so that a repeat is not logged.
    last_logged: Option<LastLogged>,
    readability_lines: LogLimiter,
    /// The ignored members that were logged last.
    rejected: Vec<Rejected>,
    reports: LogLimiter,
    /// A fingerprint of the members that the last read ignored, whether or not they were logged.
    ignored: u64,
    /// The table had more than [`MAX_MEMBERS`] at the last read, so the next read counts the members first.
    had_too_many: bool,
    too_large: Backoff,
    /// How the connection ended during the last read (closed or too slow). `None` after a table was read.
    ended_by: Option<Discriminant<RedisError>>,
    admin: States,
    log: TableLog,
}

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// A table.
    Members {
        /// How many members Redis sent.
        count: usize,
        /// The admin states or the ignored entries have changed. A changed table shows by the snapshot's
        /// version.
        is_new: bool,
    },
    /// Redis refused, or what it sent is no table.
    Refused(RefusalEnd),
}

/// How the end of a refusal is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RefusalEnd {
    /// A write to the key ends the refusal. Such a write is noticed like any other change.
    Announced,
    /// No event announces a right that is granted, or a script that ends, so the key is read again. A key
    /// with too many members is also tried again, since counting the members is cheap.
    Unannounced,
}

/// What a log line said about reading the key. `None` instead of it means that the table can be read.
#[derive(Clone, Debug, PartialEq)]
enum LastLogged {
    Empty,
    Refused(String),
}

impl<'a> PoolSync<'a> {
    pub(super) fn new(followed: &'a Followed, on_empty: OnEmpty, propagation: &'a Histogram) -> Self {
        Self {
            followed,
            on_empty,
            propagation,
            in_step: false,
            last_logged: None,
            readability_lines: LogLimiter::new(MOST_READABILITY_LINES),
            rejected: Vec::new(),
            reports: LogLimiter::new(MOST_REPORTS),
            ignored: 0,
            had_too_many: false,
            too_large: Backoff::new(REST_AFTER_REFUSAL, LONGEST_REST_AFTER_TOO_LARGE),
            ended_by: None,
            admin: States::new(),
            log: TableLog::new(),
        }
    }

    /// Returns the version of the newest snapshot.
    pub(super) fn version(&self) -> u64 {
        self.followed.cell.load().version
    }

    /// Returns what the next read asks Redis for.
    pub(super) fn question(&self) -> Question {
        Question {
            followed: self.followed.clone(),
            counts_first: self.had_too_many,
            skips_states: self.admin.rest(),
        }
    }

    /// Decodes and publishes an answer. `is_alone`: no other table was read at the same time.
    ///
    /// A panic counts as a refusal: a table that meets a defect must not hold back the tables of other
    /// pools.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(super) fn take_answer(
        &mut self,
        since: Instant,
        answered: Asked,
        is_alone: bool,
    ) -> Result<Read, RedisError> {
        let takes = AssertUnwindSafe(|| self.take_whole_answer(since, answered, is_alone));
        catch_unwind(takes).unwrap_or_else(|panic| {
            self.refuse(format!("the table meets a defect, please report it: {}", text(&*panic)));
            Ok(Read::Refused(RefusalEnd::Unannounced))
        })
    }

    fn take_whole_answer(
        &mut self,
        since: Instant,
        answered: Asked,
        is_alone: bool,
    ) -> Result<Read, RedisError> {
        let Asked { at: asked, table: answer, states: admin, .. } = answered;
        // If both answers are errors of the connection, the error of the table's answer is returned.
        let answer = match answer {
            Err(error) if !error.is_refusal() => return Err(error),
            Ok(Answer::TooMany) => {
                self.refuse(too_many());
                return Ok(Read::Refused(RefusalEnd::Unannounced));
            }
            Ok(Answer::Members(answer)) => Ok(answer),
            Err(error) => Err(error),
        };
        let mut is_new = false;
        if let Some(read) = admin {
            is_new = self.admin.take(self.followed, read, is_alone)?;
        }
        let is_no_table = matches!(&answer, Err(error) if error.code() == Some("WRONGTYPE"));
        let members = answer.as_ref().map_or(0, decode::members);
        self.had_too_many = members > MAX_MEMBERS;
        let read = match answer {
            Ok(_) if members > MAX_MEMBERS => Err(too_many()),
            Ok(answer) => decode::table(answer).map_err(|malformed| malformed.to_string()),
            Err(error) => {
                let cure = if is_no_table {
                    "the key holds something else than a sorted set: delete it and ZADD the members again"
                } else {
                    error.cure()
                };
                Err(format!("{error}: {cure}"))
            }
        };
        match read {
            Ok(mut decoded) => {
                self.too_large.reset();
                self.ended_by = None;
                let ignored = decoded.fingerprint_of_rejected();
                is_new |= std::mem::replace(&mut self.ignored, ignored) != ignored;
                decoded.table = decoded.table.with_states(self.admin.known(&self.followed.cell));
                self.publish(decoded, asked, since);
                Ok(Read::Members { count: members, is_new })
            }
            Err(reason) => {
                let cell = &self.followed.cell;
                cell.set_states(self.admin.known(cell));
                // The key was overwritten, so the table is gone. Any other refusal says nothing about the
                // table.
                if is_no_table && self.on_empty == OnEmpty::Refuse {
                    cell.publish_as_of(Table::default(), asked);
                    self.log_refused(reason, "refusing sessions (redis.on_empty)");
                } else {
                    self.refuse(reason);
                }
                Ok(Read::Refused(if is_no_table { RefusalEnd::Announced } else { RefusalEnd::Unannounced }))
            }
        }
    }

    /// Returns the error to report for `error`, which ended the connection during a read of this table. The
    /// second time in a row it names the table as the cause: closed during the read, or too slow.
    pub(super) fn repeated(&mut self, error: RedisError) -> RedisError {
        let repeated = match error {
            _ if error.is_closed() => RedisError::ClosedDuringRead,
            _ if error.is_timeout() => RedisError::TableTooSlow,
            _ => return error,
        };
        let cause = discriminant(&repeated);
        if self.ended_by.replace(cause) == Some(cause) { repeated } else { error }
    }

    /// Logs and counts an answer that was too large and ended the connection. Returns how long the pool is
    /// to rest.
    pub(super) fn refuse_too_large(&mut self, error: &RedisError) -> Duration {
        self.refuse(format!("{error}: {}", error.cure()));
        self.too_large.pause()
    }

    /// Confirms the snapshot as of `asked`, if it is in step.
    pub(super) fn confirm(&self, asked: Instant) {
        if self.in_step {
            self.followed.cell.confirm_as_of(asked);
        }
    }

    /// Logs what has changed in the table, after a read.
    pub(super) fn log_changes(&mut self) {
        self.log.look(self.followed);
    }

    /// Logs changes that were held back before.
    pub(super) fn log_held_back(&mut self) {
        if self.log.holds_back() {
            self.log.look(self.followed);
        }
    }

    /// Logs and counts a read that failed and says nothing about the table, so the last table stays.
    fn refuse(&mut self, reason: String) {
        self.log_refused(reason, "keeping the last table");
    }

    fn log_refused(&mut self, reason: String, then: &str) {
        self.followed.status.failed_reads.add(1);
        self.in_step = false;
        if let Some((_, held_back)) = self.permit_line(Some(LastLogged::Refused(reason.clone()))) {
            let Followed { pool, key, .. } = self.followed;
            error!(pool = %pool, key, reason, held_back, "cannot read the weights, {then}");
        }
    }

    fn publish(&mut self, decoded: Decoded, asked: Instant, since: Instant) {
        let Followed { pool, cell, key, status, .. } = self.followed;
        let Decoded { table, rejected } = decoded;
        status.rejected_members.store(rejected.len() as u64, Relaxed);
        self.log_rejected(rejected);
        self.in_step = true;
        if table.is_empty() {
            return self.publish_empty(table, asked);
        }
        status.is_kept.store(false, Relaxed);
        let mut held_back = None;
        match self.permit_line(None) {
            Some((Some(LastLogged::Empty), held)) => {
                self.log.was_empty();
                held_back = held;
            }
            Some((_, held_back)) => info!(pool = %pool, key, held_back, "the table can be read again"),
            None => {}
        }
        let backends = table.members().len();
        if cell.publish_as_of(table, asked) {
            self.propagation.observe(since.elapsed());
            debug!(pool = %pool, key, backends, version = cell.load().version, "new weights");
        }
        self.log.loaded(self.followed, backends, held_back);
    }

    fn log_rejected(&mut self, rejected: Vec<Rejected>) {
        if self.rejected == rejected {
            return;
        }
        if !rejected.is_empty() {
            let Some(held_back) = self.reports.permit(Instant::now()) else { return };
            let Followed { pool, key, .. } = self.followed;
            for Rejected { member, reason } in rejected.iter().take(MOST_NAMED) {
                warn!(pool = %pool, key, member, %reason, "a member is left out");
            }
            if rejected.len() > MOST_NAMED || held_back.is_some() {
                let count = rejected.len().saturating_sub(MOST_NAMED);
                warn!(pool = %pool, key, count, held_back, "more members are left out");
            }
        }
        self.rejected = rejected;
    }

    fn publish_empty(&mut self, empty: Table, asked: Instant) {
        let Followed { pool, cell, key, status, .. } = self.followed;
        let line = self.permit_line(Some(LastLogged::Empty));
        status.is_kept.store(self.on_empty == OnEmpty::KeepLast, Relaxed);
        match self.on_empty {
            OnEmpty::KeepLast => {
                // The same command may have deleted the admin states, so an empty hash does not replace the
                // states in use.
                if !empty.states().is_empty() {
                    cell.set_states(empty.states().to_vec());
                }
                cell.confirm_as_of(asked);
                if let Some((_, held_back)) = line {
                    let last = cell.load().origin.name();
                    warn!(
                        pool = %pool, key, last, held_back,
                        "redis holds no weights, keeping the last table: ZADD members, or set \
                         redis.on_empty: refuse"
                    );
                }
            }
            OnEmpty::Refuse => {
                cell.publish_as_of(empty, asked);
                if let Some((_, held_back)) = line {
                    error!(
                        pool = %pool, key, held_back,
                        "redis holds no weights, refusing sessions (redis.on_empty)"
                    );
                }
            }
        }
    }

    /// Asks to log `line` about reading the key. Returns `Some` if `line` differs from the last one and the
    /// limiter permits it, with the last line and the number of lines held back.
    fn permit_line(&mut self, line: Option<LastLogged>) -> Option<(Option<LastLogged>, HeldBack)> {
        if self.last_logged == line {
            return None;
        }
        let held_back = self.readability_lines.permit(Instant::now())?;
        Some((std::mem::replace(&mut self.last_logged, line), held_back))
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
    async fn the_last_state_after_many_changes_is_logged_when_the_window_has_passed() {
        let cell = Arc::new(Cell::new(Table::default(), Balance::WeightedRandom, 1));
        let (id, status) = (PoolId::unique(), Arc::default());
        let followed = Followed { id, pool: "web".into(), cell, key: "servers".into(), status };
        let propagation = Histogram::default();
        let mut pool = PoolSync::new(&followed, OnEmpty::KeepLast, &propagation);
        let logged = (0..1_000).filter(|change| {
            let line = (change % 2 == 0).then_some(LastLogged::Empty);
            pool.permit_line(line).is_some()
        });
        assert_eq!(logged.count(), MOST_READABILITY_LINES as usize);
        // The last state is a readable table, which the last line says already.
        assert_eq!(pool.permit_line(None), None);

        assert_eq!(pool.permit_line(Some(LastLogged::Empty)), None, "held back");
        advance(LOG_WINDOW).await;
        let news = pool.permit_line(Some(LastLogged::Empty));
        assert!(matches!(news, Some((None, Some(held_back))) if held_back > 400), "{news:?}");
    }
}
