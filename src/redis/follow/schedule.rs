//! Decides when each pool is read, how many pools are read at once, and which pools are known to be
//! unchanged without a read.
//!
//! `rest.rs` and `event_rest.rs` compute how long a pool rests; `sync.rs` reads.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::changes::{Cause, Causes, Changes, Mark};
use super::event_rest::{EventRests, Longest};
use crate::balance::pool::lua_pick::PoolId;
use crate::redis::status::WatchMode;

/// The most pools that are read at once. Redis answers so many small tables in less than a millisecond.
const MOST_AT_ONCE: usize = 32;
/// The most members that the tables read at once are expected to have together: some 100 kB. A table with
/// more members is read alone.
const MOST_MEMBERS_AT_ONCE: usize = 2_000;
/// The number of members expected of a table that was not read yet.
const EXPECTED_MEMBERS: usize = MOST_MEMBERS_AT_ONCE / 8;
/// For how long fewer tables are read at once after a connection ended while several tables were read.
const READS_FEWER: Duration = Duration::from_secs(60);
/// After a connection ended, the number of tables read at once is divided by this. It is not set to 1,
/// because the server may only have restarted, and one table at a time would be slow.
const FEWER: usize = 4;

/// When the pools of one connection are read.
#[derive(Debug)]
pub(super) struct Schedule {
    longest: Longest,
    /// The pools in the order of the config.
    order: Vec<PoolId>,
    pools: HashMap<PoolId, Pool>,
    /// The lowered number of tables read at once, and until when it holds.
    fewer: Option<(usize, Instant)>,
}

/// What to do next, by [`Schedule::next`].
#[derive(Debug)]
pub(super) enum Next {
    /// Read these pools now: at least one, and not too many at once.
    Read(Vec<PoolId>),
    /// Wait until this time, when a rest ends, or until a pool is marked. `None`: no marked pool rests.
    Wait(Option<Instant>),
}

#[derive(Clone, Debug)]
struct Pool {
    rests_until: Option<Instant>,
    event_rests: EventRests,
    /// Redis has answered a read of the pool, or refused it.
    was_tried: bool,
    /// When the last read that returned the table was sent, whatever its cause.
    read_at: Option<Instant>,
    /// The table's size when it was last read.
    members: usize,
}

impl Pool {
    fn new() -> Self {
        Self {
            rests_until: None,
            event_rests: EventRests::default(),
            was_tried: false,
            read_at: None,
            members: EXPECTED_MEMBERS,
        }
    }
}

impl Schedule {
    pub(super) fn new(pools: impl IntoIterator<Item = PoolId>, longest: Longest) -> Self {
        let order: Vec<PoolId> = pools.into_iter().collect();
        let pools = order.iter().map(|pool| (*pool, Pool::new())).collect();
        Self { longest, order, pools, fewer: None }
    }

    /// Changes are noticed by `mode` from now on.
    pub(super) fn watch_by(&mut self, mode: WatchMode) {
        if self.longest.set_mode(mode) {
            // The rests of the mode before may be longer than any rest of the new mode.
            self.pools.values_mut().for_each(|pool| pool.event_rests = EventRests::default());
        }
    }

    /// Returns true if Redis has answered or refused a read of each pool.
    pub(super) fn has_tried_all(&self) -> bool {
        self.pools.values().all(|pool| pool.was_tried)
    }

    /// Returns what to do next. Of the pools that may be read, pools with a sign of a change come before
    /// pools that are only due.
    pub(super) fn next(&self, changes: &Changes) -> Next {
        let (now, marked) = (Instant::now(), changes.marked());
        let (mut ready, mut next) = (Vec::new(), None::<Instant>);
        for id in &self.order {
            let (Some(pool), Some(mark)) = (self.pools.get(id), marked.get(id)) else { continue };
            match pool.rests_until.max(pool.event_rests.end_for(mark.causes)).filter(|rest| *rest > now) {
                Some(rest) => next = Some(next.map_or(rest, |other| other.min(rest))),
                None => ready.push((mark.causes == Cause::Due.into(), mark.since, *id, pool.members)),
            }
        }
        if ready.is_empty() {
            return Next::Wait(next);
        }
        ready.sort_by_key(|(is_only_due, since, ..)| (*is_only_due, *since));
        let fewer = self.fewer.filter(|(_, until)| *until > now);
        ready.truncate(fewer.map_or(MOST_AT_ONCE, |(most, _)| most));
        let mut expected = 0;
        let fits = |(_, _, _, members): &(bool, Instant, PoolId, usize)| {
            let is_first = expected == 0;
            expected += (*members).max(1);
            is_first || expected <= MOST_MEMBERS_AT_ONCE
        };
        Next::Read(ready.into_iter().take_while(fits).map(|(_, _, id, _)| id).collect())
    }

    /// Reads fewer tables at once for a while, since a connection ended while `at_once` tables were read.
    /// One table or their sum may be too large. After some more such ends, tables are read one by one.
    pub(super) fn read_fewer(&mut self, at_once: usize) {
        self.fewer = Some(((at_once / FEWER).max(1), Instant::now() + READS_FEWER));
    }

    /// Records that the table of `pool` was read, with a command sent at `asked`.
    pub(super) fn was_read(&mut self, pool: PoolId, members: usize, asked: Instant) {
        if let Some(pool) = self.pools.get_mut(&pool) {
            (pool.members, pool.read_at) = (members, Some(asked));
        }
    }

    /// Records a read that was answered or refused, and lets the pool rest for `rest`. `is_news`: the read
    /// found something new, which ends the event rests of `causes`; otherwise they get longer.
    pub(super) fn was_tried(&mut self, pool: PoolId, causes: Causes, is_news: bool, rest: Duration) {
        let Some(pool) = self.pools.get_mut(&pool) else { return };
        pool.was_tried = true;
        pool.rests_until = Some(Instant::now() + rest);
        if is_news {
            pool.event_rests.found_news(causes);
        } else {
            pool.event_rests.found_nothing(causes, self.longest);
        }
    }

    /// Lets the pool rest for `rest`, after an answer that ended the connection.
    pub(super) fn rest(&mut self, pool: PoolId, rest: Duration) {
        if let Some(pool) = self.pools.get_mut(&pool) {
            pool.rests_until = Some(Instant::now() + rest);
        }
    }

    /// Returns true if the answer to a heartbeat that was sent at `asked` shows that the table has not
    /// changed: the pool is not marked, or its mark is no sign of a change and its last read is recent. The
    /// answer comes after all earlier events.
    pub(super) fn is_unchanged(&self, pool: PoolId, mark: Option<&Mark>, asked: Instant) -> bool {
        let Some(mark) = mark else { return true };
        let read_at = self.pools.get(&pool).and_then(|pool| pool.read_at);
        let is_recent = read_at.is_some_and(|read| asked < read + self.longest.resync());
        is_recent && !self.longest.tells_of_a_change(mark.causes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::time::advance;

    use crate::balance::pool::Cell;
    use crate::balance::pool::lua_pick::PoolId;
    use crate::balance::{Balance, Table};
    use crate::redis::schema::followed::Followed;

    const HEARTBEAT: Duration = Duration::from_secs(1);
    const RESYNC: Duration = Duration::from_secs(15);
    const POOLS: usize = 100;

    fn unread_pools(mode: WatchMode) -> (Schedule, Changes, Vec<PoolId>) {
        let followed: Vec<Followed> = (0..POOLS)
            .map(|pool| Followed {
                id: PoolId::unique(),
                status: Arc::default(),
                pool: "web".into(),
                cell: Arc::new(Cell::new(Table::default(), Balance::WeightedRandom, 1)),
                key: format!("servers{pool}"),
            })
            .collect();
        let mut schedule =
            Schedule::new(followed.iter().map(|pool| pool.id), Longest::new(HEARTBEAT, RESYNC));
        schedule.watch_by(mode);
        let ids = followed.iter().map(|pool| pool.id).collect();
        (schedule, Changes::new(&followed, 0), ids)
    }

    fn read_all(schedule: &mut Schedule, changes: &Changes, members: usize) -> Vec<usize> {
        let mut at_once = Vec::new();
        while let Next::Read(ready) = schedule.next(changes) {
            for pool in &ready {
                let mark = changes.take(*pool).expect("it is marked");
                schedule.was_read(*pool, members, Instant::now());
                schedule.was_tried(*pool, mark.causes, false, Duration::ZERO);
            }
            at_once.push(ready.len());
        }
        at_once
    }

    #[tokio::test(start_paused = true)]
    async fn small_tables_are_read_many_at_once_and_large_ones_alone() {
        let (mut schedule, changes, _) = unread_pools(WatchMode::Notifications);
        assert!(!schedule.has_tried_all());
        changes.notice_all(Cause::Missed);
        let unknown = read_all(&mut schedule, &changes, 10);
        assert_eq!(unknown, [vec![8; 12], vec![4]].concat());
        assert!(schedule.has_tried_all());
        changes.notice_all(Cause::Due);
        assert_eq!(read_all(&mut schedule, &changes, 50_000), [32, 32, 32, 4]);
        changes.notice_all(Cause::Due);
        assert_eq!(read_all(&mut schedule, &changes, 0), [1; POOLS]);
        changes.notice_all(Cause::Due);
        schedule.read_fewer(32);
        assert_eq!(read_all(&mut schedule, &changes, 0), unknown);
        changes.notice_all(Cause::Due);
        schedule.read_fewer(2);
        assert_eq!(read_all(&mut schedule, &changes, 0), [1; POOLS]);
        advance(READS_FEWER).await;
        changes.notice_all(Cause::Due);
        assert_eq!(read_all(&mut schedule, &changes, 0), [32, 32, 32, 4]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_read_before_what_is_only_due() {
        let (schedule, changes, ids) = unread_pools(WatchMode::Notifications);
        changes.notice_all(Cause::Due);
        advance(HEARTBEAT).await;
        changes.mark(&[ids[POOLS - 1]], Cause::Notified);
        changes.mark(&[ids[POOLS - 2]], Cause::Invalidated);
        let Next::Read(ready) = schedule.next(&changes) else { panic!("all may be read") };
        assert_eq!(ready[..3], [ids[POOLS - 2], ids[POOLS - 1], ids[0]]);
    }

    /// A table that counts as fresh was read, or is known not to have changed, within the interval of full
    /// reads.
    #[tokio::test(start_paused = true)]
    async fn a_pool_that_waits_for_a_full_read_is_unchanged_until_that_is_late() {
        for (mode, cause, is_unchanged) in [
            (WatchMode::Notifications, Cause::Due, true),
            (WatchMode::Notifications, Cause::Invalidated, true),
            (WatchMode::Tracking, Cause::Due, true),
            (WatchMode::Tracking, Cause::Invalidated, false),
            (WatchMode::Notifications, Cause::Notified, false),
            (WatchMode::Notifications, Cause::Flushed, false),
            (WatchMode::Notifications, Cause::Missed, false),
        ] {
            let (mut schedule, changes, ids) = unread_pools(mode);
            let is = |schedule: &Schedule| {
                schedule.is_unchanged(ids[0], changes.marked().get(&ids[0]), Instant::now())
            };
            changes.notice_all(cause);
            assert!(!is(&schedule), "{mode:?}, {cause:?}: it was never read");
            changes.take(ids[0]);
            schedule.was_read(ids[0], 10, Instant::now());
            changes.notice_all(cause);
            assert_eq!(is(&schedule), is_unchanged, "{mode:?}, {cause:?}");
            advance(RESYNC).await;
            assert!(!is(&schedule), "{mode:?}, {cause:?}: the full read is late");
            changes.take(ids[0]);
            assert!(is(&schedule), "{mode:?}: nothing is marked");
        }
    }
}
