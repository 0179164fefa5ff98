//! When each pool is read, how many of them at once, and which need not be read to be known as unchanged.
//!
//! `rest.rs` and `event_rest.rs` say how long a pool rests, `sync.rs` reads.

use std::time::Duration;

use tokio::time::Instant;

use super::changes::{Cause, Causes, Changes, Mark};
use super::event_rest::{EventRests, Longest};
use crate::redis::status::WatchMode;

/// Pools that are asked for at once. Redis answers so many small tables in less than a millisecond.
const MOST_AT_ONCE: usize = 32;
/// Members that the tables asked for at once are expected to have, unless one alone has more: some 100 kB.
const MOST_MEMBERS_AT_ONCE: usize = 2_000;
/// Members that a table is expected to have before it was read for the first time.
const EXPECTED_MEMBERS: usize = MOST_MEMBERS_AT_ONCE / 8;
/// How long fewer tables are asked for at once, after a connection ended while several were asked for.
const READS_FEWER: Duration = Duration::from_secs(60);
/// The number asked for is divided by this. It is not reduced to 1 at once: after a server that only restarted,
/// the next reads would run one table at a time.
const FEWER: usize = 4;

/// The turns of all pools of one connection.
#[derive(Debug)]
pub(in crate::redis) struct Schedule {
    longest: Longest,
    pools: Vec<Pool>,
    /// So many tables at once, and until when.
    fewer: Option<(usize, Instant)>,
}

/// See [`Schedule::next`].
#[derive(Debug)]
pub(in crate::redis) enum Next {
    /// These pools, which are not none and not too many at once.
    Read(Vec<usize>),
    /// Until then, or until something is marked.
    Wait(Option<Instant>),
}

#[derive(Clone, Debug)]
struct Pool {
    rests_until: Option<Instant>,
    event_rests: EventRests,
    /// Redis has answered for it once, or refused to.
    was_tried: bool,
    /// When the last full read was asked for.
    read_at: Option<Instant>,
    /// The table's size when it was last read.
    members: usize,
}

impl Schedule {
    /// For so many pools.
    pub(in crate::redis) fn new(pools: usize, longest: Longest) -> Self {
        let pool = Pool {
            rests_until: None,
            event_rests: EventRests::default(),
            was_tried: false,
            read_at: None,
            members: EXPECTED_MEMBERS,
        };
        Self { longest, pools: vec![pool; pools], fewer: None }
    }

    /// Changes are noticed by `mode` from now on.
    pub(in crate::redis) fn watch_by(&mut self, mode: WatchMode) {
        if self.longest.set_mode(mode) {
            // A rest of another mode may be longer than any of this one.
            self.pools.iter_mut().for_each(|pool| pool.event_rests = EventRests::default());
        }
    }

    /// True where Redis has answered for each pool, or refused to.
    pub(in crate::redis) fn has_tried_all(&self) -> bool {
        self.pools.iter().all(|pool| pool.was_tried)
    }

    /// What to do next. Of pools that may be read, changed ones come first.
    pub(in crate::redis) fn next(&self, changes: &Changes) -> Next {
        let now = Instant::now();
        let (mut ready, mut next) = (Vec::new(), None::<Instant>);
        for (place, mark) in changes.marked() {
            let pool = &self.pools[place];
            match pool.rests_until.max(pool.event_rests.end_for(mark.causes)).filter(|rest| *rest > now) {
                Some(rest) => next = Some(next.map_or(rest, |other| other.min(rest))),
                None => ready.push((mark.causes == Cause::Due.into(), mark.since, place)),
            }
        }
        if ready.is_empty() {
            return Next::Wait(next);
        }
        ready.sort_unstable();
        let fewer = self.fewer.filter(|(_, until)| *until > now);
        ready.truncate(fewer.map_or(MOST_AT_ONCE, |(most, _)| most));
        let mut members = 0;
        let fits = |place: &usize| {
            let is_first = members == 0;
            members += self.pools[*place].members.max(1);
            is_first || members <= MOST_MEMBERS_AT_ONCE
        };
        Next::Read(ready.into_iter().map(|(_, _, place)| place).take_while(fits).collect())
    }

    /// A connection ended while so many tables were asked for. Any of them, or their sum, may be too large for it, so fewer
    /// are asked for at once, and in the end one alone.
    pub(in crate::redis) fn read_fewer(&mut self, asked: usize) {
        self.fewer = Some(((asked / FEWER).max(1), Instant::now() + READS_FEWER));
    }

    /// The table of `place` was read, as of the moment `asked`.
    pub(in crate::redis) fn was_read(&mut self, place: usize, members: usize, asked: Instant) {
        let pool = &mut self.pools[place];
        (pool.members, pool.read_at) = (members, Some(asked));
    }

    /// What `causes` led to an answer, or a refusal, that was new or not. The pool rests.
    pub(in crate::redis) fn was_tried(
        &mut self,
        place: usize,
        causes: Causes,
        is_news: bool,
        rest: Duration,
    ) {
        let pool = &mut self.pools[place];
        pool.was_tried = true;
        pool.rests_until = Some(Instant::now() + rest);
        if is_news {
            pool.event_rests.found_news(causes);
        } else {
            pool.event_rests.found_nothing(causes, self.longest);
        }
    }

    /// The pool rests, after an answer that ended the connection.
    pub(in crate::redis) fn rest(&mut self, place: usize, rest: Duration) {
        self.pools[place].rests_until = Some(Instant::now() + rest);
    }

    /// True where a heartbeat of the moment `asked`, answered after every event before it, shows that the table has not
    /// changed: it is not marked, or its mark says nothing of a change and its last full read is recent.
    pub(in crate::redis) fn is_unchanged(&self, place: usize, mark: Option<Mark>, asked: Instant) -> bool {
        let Some(mark) = mark else { return true };
        let is_recent = self.pools[place].read_at.is_some_and(|read| asked < read + self.longest.resync());
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
    use crate::redis::Followed;

    const HEARTBEAT: Duration = Duration::from_secs(1);
    const RESYNC: Duration = Duration::from_secs(15);
    const POOLS: usize = 100;

    fn scene(mode: WatchMode) -> (Schedule, Changes) {
        let followed: Vec<Followed> = (0..POOLS)
            .map(|pool| Followed {
                id: PoolId::unique(),
                status: Arc::default(),
                pool: "web".into(),
                cell: Arc::new(Cell::new(Table::default(), Balance::WeightedRandom, 1)),
                key: format!("servers{pool}"),
            })
            .collect();
        let mut schedule = Schedule::new(POOLS, Longest::new(HEARTBEAT, RESYNC));
        schedule.watch_by(mode);
        (schedule, Changes::new(&followed, 0))
    }

    fn read_all(schedule: &mut Schedule, changes: &Changes, members: usize) -> Vec<usize> {
        let mut at_once = Vec::new();
        while let Next::Read(ready) = schedule.next(changes) {
            for place in &ready {
                let mark = changes.take(*place).expect("it is marked");
                schedule.was_read(*place, members, Instant::now());
                schedule.was_tried(*place, mark.causes, false, Duration::ZERO);
            }
            at_once.push(ready.len());
        }
        at_once
    }

    #[tokio::test(start_paused = true)]
    async fn small_tables_are_read_many_at_once_and_large_ones_alone() {
        let (mut schedule, changes) = scene(WatchMode::Notifications);
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
        let (schedule, changes) = scene(WatchMode::Notifications);
        changes.notice_all(Cause::Due);
        advance(HEARTBEAT).await;
        changes.mark(std::iter::once(POOLS - 1), Cause::Notified);
        changes.mark(std::iter::once(POOLS - 2), Cause::Invalidated);
        let Next::Read(ready) = schedule.next(&changes) else { panic!("all may be read") };
        assert_eq!(ready[..3], [POOLS - 2, POOLS - 1, 0]);
    }

    /// The promise: a table that is called fresh was read, or is known not to have changed, within the interval of full reads.
    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_full_read_is_unchanged_until_that_is_late() {
        for (mode, cause, is_unchanged) in [
            (WatchMode::Notifications, Cause::Due, true),
            (WatchMode::Notifications, Cause::Invalidated, true),
            (WatchMode::Tracking, Cause::Due, true),
            (WatchMode::Tracking, Cause::Invalidated, false),
            (WatchMode::Notifications, Cause::Notified, false),
            (WatchMode::Notifications, Cause::Flushed, false),
            (WatchMode::Notifications, Cause::Missed, false),
        ] {
            let (mut schedule, changes) = scene(mode);
            let is = |schedule: &Schedule| {
                schedule.is_unchanged(0, changes.of_all().into_iter().next().flatten(), Instant::now())
            };
            changes.notice_all(cause);
            assert!(!is(&schedule), "{mode:?}, {cause:?}: it was never read");
            changes.take(0);
            schedule.was_read(0, 10, Instant::now());
            changes.notice_all(cause);
            assert_eq!(is(&schedule), is_unchanged, "{mode:?}, {cause:?}");
            advance(RESYNC).await;
            assert!(!is(&schedule), "{mode:?}, {cause:?}: the full read is late");
            changes.take(0);
            assert!(is(&schedule), "{mode:?}: nothing is marked");
        }
    }
}
