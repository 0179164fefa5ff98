//! Reads whole tables at the syncer's own pace, and publishes them.
//!
//! A message from Redis only marks a pool; the table is then read from Redis. So a burst of a thousand
//! changes costs a few reads, and a lost or doubled message is made up for by the next read. `pool_sync.rs`
//! decodes and publishes the answer of one pool.

use std::collections::HashMap;

use tokio::time::Instant;

use super::changes::{Cause, Changes, Mark};
use super::event_rest::Longest;
use super::pool_sync::{PoolSync, REST_AFTER_REFUSAL, Read, RefusalEnd};
use super::rest::rest_after;
use super::schedule::{Next, Schedule};
use super::table_read::{self, Asked, Question};
use crate::balance::pool::lua_pick::PoolId;
use crate::config::OnEmpty;
use crate::control::backoff::jittered;
use crate::redis::schema::followed::Followed;
use crate::redis::status::{RedisStatus, WatchMode};
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// Follows the tables of all pools of a shard. Outlives its connections: `read_changed` gets the current
/// one.
pub(super) struct Syncer<'a> {
    pools: HashMap<PoolId, PoolSync<'a>>,
    status: &'a RedisStatus,
    schedule: Schedule,
}

impl<'a> Syncer<'a> {
    pub(super) fn new(
        pools: &'a [Followed],
        on_empty: OnEmpty,
        longest: Longest,
        status: &'a RedisStatus,
    ) -> Self {
        let schedule = Schedule::new(pools.iter().map(|pool| pool.id), longest);
        let pools = pools.iter().map(|pool| (pool.id, PoolSync::new(pool, on_empty, &status.propagation)));
        Self { pools: pools.collect(), status, schedule }
    }

    /// Changes are noticed by `mode` from now on.
    pub(super) fn watch_by(&mut self, mode: WatchMode) {
        self.schedule.watch_by(mode);
    }

    /// True where each pool was read, or refused to be read.
    pub(super) fn has_tried_all(&self) -> bool {
        self.schedule.has_tried_all()
    }

    /// Reads the marked pools whose rest is over, as many as may be read at once. If pools are still marked,
    /// returns the time from which the next one may be read; the caller does other due work first.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(super) async fn read_changed(
        &mut self,
        connection: &RoutedConnection,
        changes: &Changes,
    ) -> Result<Option<Instant>, RedisError> {
        let ready = match self.schedule.next(changes) {
            Next::Read(ready) => ready,
            Next::Wait(until) => return Ok(until),
        };
        let (marked, questions) = self.take_marked(&ready, changes);
        let at_once = marked.len();
        self.status.resyncs.add(at_once as u64);
        let answers = table_read::ask(connection, questions).await;
        for ((id, mark), asked) in marked.into_iter().zip(answers) {
            self.take_answer(id, mark, asked, at_once, changes)?;
        }
        Ok(match self.schedule.next(changes) {
            Next::Read(_) => Some(Instant::now()),
            Next::Wait(until) => until,
        })
    }

    /// Takes the marks of the pools `ready`, with the question for each. A mark is taken before the read, so
    /// a change during the read sets a new mark.
    fn take_marked(&self, ready: &[PoolId], changes: &Changes) -> (Vec<(PoolId, Mark)>, Vec<Question>) {
        let taken = ready.iter().filter_map(|id| {
            let pool = self.pools.get(id)?;
            Some(((*id, changes.take(*id)?), pool.question()))
        });
        taken.unzip()
    }

    /// Publishes the answer about the pool `id`, which was read as one of `at_once`, and schedules its next
    /// read.
    ///
    /// # Errors
    /// The connection is of no use any more.
    fn take_answer(
        &mut self,
        id: PoolId,
        mark: Mark,
        asked: Asked,
        at_once: usize,
        changes: &Changes,
    ) -> Result<(), RedisError> {
        let Some(pool) = self.pools.get_mut(&id) else { return Ok(()) };
        let (asked_at, answered_in, answered) = (asked.at, asked.took, Instant::now());
        let before = pool.version();
        let read = pool.take_answer(mark.since, asked, at_once == 1);
        pool.log_changes();
        let mut is_news = pool.version() != before;
        let rest = match read {
            Ok(Read::Members { count, is_new }) => {
                self.schedule.was_read(id, count, asked_at);
                is_news |= is_new;
                rest_after(count, answered_in + answered.elapsed())
            }
            Ok(Read::Refused(end)) => {
                if end == RefusalEnd::Unannounced {
                    changes.mark(&[id], Cause::Due);
                }
                jittered(REST_AFTER_REFUSAL)
            }
            Err(error) => return Err(self.end_connection(id, error, at_once)),
        };
        self.schedule.was_tried(id, mark.causes, is_news, rest);
        Ok(())
    }

    /// Handles the end of the connection while `at_once` tables were read. `id` is the first of these pools
    /// without an answer.
    ///
    /// The cause may be a table's size: Redis closes a subscribed connection that has more than 32 MB of
    /// output waiting, and logs that only in its own log; and a large table may take longer than the time
    /// limit. At the first such end, Redis may just as well have restarted or be busy. If several tables
    /// were read, any of them or their sum may be too large, so fewer are read at once for a while.
    fn end_connection(&mut self, id: PoolId, error: RedisError, at_once: usize) -> RedisError {
        if at_once > 1 {
            if error.is_closed() || error.is_timeout() || error.is_too_large() {
                self.schedule.read_fewer(at_once);
            }
            return error;
        }
        let Some(pool) = self.pools.get_mut(&id) else { return error };
        let error = pool.repeated(error);
        if error.is_too_large() {
            // The rest keeps the next connection from reading the table at once.
            self.schedule.rest(id, pool.refuse_too_large(&error));
        }
        error
    }

    /// Called when a heartbeat that was sent at `asked` has been answered. The answer comes after all
    /// earlier events, so each table that is in step and not known to have changed is confirmed as of
    /// `asked`.
    pub(super) fn confirm(&mut self, changes: &Changes, asked: Instant) {
        let marks = changes.marked();
        for (id, pool) in &mut self.pools {
            pool.log_held_back();
            if self.schedule.is_unchanged(*id, marks.get(id), asked) {
                pool.confirm(asked);
            }
        }
    }
}
