//! Tells when a session has been silent for too long, when it has lived long enough to be worth some care, and when it is to end
//! for another's sake.
//!
//! One clock for all sessions of a worker. A timer each would cost every short session a place in the reactor's sorted map,
//! and every session that moves bytes another one for each move. Here activity is one store, and once a tick the worker looks over all its sessions (3 ns each). The price is precision: a session may be closed up
//! to two ticks late, never early.

use std::cell::{Cell, RefCell, RefMut};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;

use crate::reactor::sleep;

const LONGEST_TICK: Duration = Duration::from_secs(1);
const SHORTEST_TICK: Duration = Duration::from_millis(10);
/// Between two looks of a stalled session at the socket that it does not read.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// A session that was silent for so long owes nobody anything that we know of.
const QUIET_TIME: Duration = Duration::from_secs(1);
/// The clock stops when there was no session for so many ticks, so that an idle proxy sleeps.
const TICKS_WITHOUT_SESSIONS: u32 = 5;

/// A worker's clock, and the sessions that it looks over.
#[derive(Debug)]
pub struct IdleClock {
    tick: Duration,
    now: Cell<Tick>,
    entries: RefCell<Vec<Entry>>,
    /// Entries without a session.
    free: RefCell<Vec<u32>>,
    entered: Notify,
}

/// Counted from the clock's start; it wraps, and only differences are used.
type Tick = u32;
/// A longer silence is as good as any: 248 days at the shortest tick, 68 years at the longest.
const NO_LIMIT: Tick = Tick::MAX / 2;

/// One session, or none. There is one for each idle session, so its size counts.
#[derive(Debug, Default)]
struct Entry {
    waker: Option<Waker>,
    /// The tick of its last activity.
    last_activity: Tick,
    /// Ticks of silence that it is allowed, or [`NO_LIMIT`].
    limit: Tick,
    /// The tick at which it is woken once, whatever it does.
    settles_at: Tick,
    settled: bool,
    /// It waits for a socket to take bytes, and is woken now and then to look after the other one.
    stalled: bool,
    /// It is told to end.
    ends: bool,
    /// The mark of its backend.
    whose: usize,
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// It was silent for too long.
    Silent,
    /// It was told to end.
    Told,
}

impl IdleClock {
    /// Precise to a tenth of `shortest_limit`, within reason.
    #[must_use]
    pub fn new(shortest_limit: Duration) -> Self {
        Self {
            tick: (shortest_limit / 10).clamp(SHORTEST_TICK, LONGEST_TICK),
            now: Cell::new(0),
            entries: RefCell::default(),
            free: RefCell::default(),
            entered: Notify::new(),
        }
    }

    /// Ticks while there are sessions. Never ends.
    pub async fn run(&self) {
        let mut without_sessions = 0;
        loop {
            if without_sessions >= TICKS_WITHOUT_SESSIONS {
                self.entered.notified().await;
                without_sessions = 0;
            }
            sleep(self.tick).await;
            let some = self.look();
            without_sessions = if some { 0 } else { without_sessions + 1 };
        }
    }

    /// Wakes every session whose time has come. Returns false if there is no session.
    fn look(&self) -> bool {
        let now = self.now.get().wrapping_add(1);
        self.now.set(now);
        let looks = self.ticks(LOOK_INTERVAL);
        let entries = self.entries.borrow();
        for entry in entries.iter() {
            if let Some(waker) = &entry.waker
                && (entry.is_expired(now)
                    || entry.settles_at == now
                    || (entry.stalled && now.is_multiple_of(looks)))
            {
                waker.wake_by_ref();
            }
        }
        entries.len() > self.free.borrow().len()
    }

    /// Ticks that are over only after `duration`, wherever within a tick it begins; at most [`NO_LIMIT`].
    fn ticks(&self, duration: Duration) -> Tick {
        let ticks = duration.as_nanos().div_ceil(self.tick.as_nanos()) + 1;
        Tick::try_from(ticks).unwrap_or(NO_LIMIT).min(NO_LIMIT)
    }

    /// Tells sessions to end, those first that have been silent for longest: of the backends whose marks are in `whose`, which is sorted, and of
    /// those sessions the ones that began `age` ago or earlier (to a tick). `most` says how many of so many; `settle_time` is theirs.
    /// Returns how many are left of these.
    pub fn end_sessions(
        &self,
        whose: &[usize],
        age: Duration,
        settle_time: Duration,
        most: impl FnOnce(usize) -> usize,
    ) -> usize {
        let (now, settles) = (self.now.get(), self.ticks(settle_time));
        let age = Tick::try_from(age.as_nanos() / self.tick.as_nanos()).unwrap_or(NO_LIMIT).min(NO_LIMIT);
        let mut entries = self.entries.borrow_mut();
        let is_meant = |entry: &Entry| {
            let began = entry.settles_at.wrapping_sub(settles);
            !entry.ends
                && whose.binary_search(&entry.whose).is_ok()
                && now.wrapping_sub(began).saturating_add(1) >= age
        };
        let meant = entries.iter().enumerate().filter(|(_, entry)| is_meant(entry));
        let mut meant: Vec<_> = meant.map(|(n, entry)| (now.wrapping_sub(entry.last_activity), n)).collect();
        let most = most(meant.len()).min(meant.len());
        if most < meant.len() {
            meant.select_nth_unstable_by(most, |a, b| b.cmp(a));
        }
        for (_, n) in &meant[..most] {
            entries[*n].ends = true;
            if let Some(waker) = &entries[*n].waker {
                waker.wake_by_ref();
            }
        }
        meant.len() - most
    }

    /// Begins to look over a session, active now, of the backend with the mark `whose`, that settles after `settle_time`.
    pub(super) fn enter(&self, settle_time: Duration, whose: usize) -> Idle<'_> {
        let now = self.now.get();
        let entry = Entry {
            waker: None,
            last_activity: now,
            limit: NO_LIMIT,
            settles_at: now.wrapping_add(self.ticks(settle_time)),
            settled: false,
            stalled: false,
            ends: false,
            whose,
        };
        let mut entries = self.entries.borrow_mut();
        let place = match self.free.borrow_mut().pop() {
            Some(place) => {
                entries[place as usize] = entry;
                place
            }
            None => {
                entries.push(entry);
                u32::try_from(entries.len() - 1).expect("descriptors are fewer")
            }
        };
        self.entered.notify_one();
        Idle { clock: self, place, last_look: now }
    }
}

impl Entry {
    fn is_expired(&self, now: Tick) -> bool {
        self.limit != NO_LIMIT && now.wrapping_sub(self.last_activity) >= self.limit
    }
}

/// One session's place at its worker's clock; given back when dropped.
#[derive(Debug)]
pub(super) struct Idle<'a> {
    clock: &'a IdleClock,
    place: u32,
    last_look: Tick,
}

impl Idle<'_> {
    fn entry(&self) -> RefMut<'_, Entry> {
        RefMut::map(self.clock.entries.borrow_mut(), |entries| &mut entries[self.place as usize])
    }

    /// Bytes moved, or a half closed.
    pub(super) fn touch(&mut self) {
        self.entry().last_activity = self.clock.now.get();
    }

    /// Ready once the session is told to end or has been silent for `limit`; `None` never is. `limit` may differ from poll to poll. While it
    /// is `stalled`, it is polled at least every few seconds.
    pub(super) fn poll_over(
        &mut self,
        cx: &mut Context<'_>,
        limit: Option<Duration>,
        stalled: bool,
    ) -> Poll<Over> {
        let mut entry = self.entry();
        if entry.ends {
            return Poll::Ready(Over::Told);
        }
        entry.stalled = stalled;
        entry.limit = limit.map_or(NO_LIMIT, |limit| self.clock.ticks(limit));
        if entry.is_expired(self.clock.now.get()) {
            return Poll::Ready(Over::Silent);
        }
        if !entry.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            entry.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// True if it has moved nothing for a while.
    pub(super) fn is_quiet(&self) -> bool {
        self.clock.now.get().wrapping_sub(self.entry().last_activity) >= self.clock.ticks(QUIET_TIME)
    }

    /// True once every few seconds in which nothing moved: a stalled session is to look after the socket that it does not
    /// read. While bytes move, what the source sent before it broke is still to be passed on.
    pub(super) fn looks(&mut self) -> bool {
        let (now, interval) = (self.clock.now.get(), self.clock.ticks(LOOK_INTERVAL));
        let silent = now.wrapping_sub(self.entry().last_activity) >= interval;
        let due = silent && now.wrapping_sub(self.last_look) >= interval;
        if due {
            self.last_look = now;
        }
        due
    }

    /// True once: when the session has lived for its settle time.
    pub(super) fn settles(&mut self) -> bool {
        let mut entry = self.entry();
        let due = !entry.settled && self.clock.now.get().wrapping_sub(entry.settles_at) < NO_LIMIT;
        entry.settled |= due;
        due
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        *self.entry() = Entry::default();
        self.clock.free.borrow_mut().push(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::time::Instant;

    const LIMIT: Duration = Duration::from_secs(1);

    /// Polls a session until it expires, touching it `touches` times, each after half of its limit.
    async fn lives(clock: &IdleClock, touches: u32) -> Duration {
        let begun = Instant::now();
        let mut idle = clock.enter(Duration::from_secs(3600), 0);
        for _ in 0..touches {
            let silence = poll_fn(|cx| idle.poll_over(cx, Some(LIMIT), false));
            assert!(
                tokio::time::timeout(LIMIT / 2, silence).await.is_err(),
                "it expired although it was active"
            );
            idle.touch();
        }
        poll_fn(|cx| idle.poll_over(cx, Some(LIMIT), false)).await;
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_expires_soon_after_its_limit_and_never_before() {
        let clock = IdleClock::new(LIMIT);
        tokio::select! {
            () = clock.run() => unreachable!("it never ends"),
            () = async {
                for touches in [0, 1, 5] {
                    let lived = lives(&clock, touches).await;
                    let least = LIMIT + LIMIT / 2 * touches;
                    assert!(lived >= least && lived <= least + 3 * clock.tick, "{lived:?} after {touches}");
                }
            } => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_without_a_limit_lives_and_settles_once() {
        let clock = IdleClock::new(LIMIT);
        let session = async {
            let mut idle = clock.enter(Duration::from_secs(5), 0);
            let mut settled = 0;
            let silence = poll_fn(|cx| {
                settled += u32::from(idle.settles());
                idle.poll_over(cx, None, false)
            });
            assert!(tokio::time::timeout(Duration::from_secs(100_000), silence).await.is_err());
            assert_eq!(settled, 1);
        };
        tokio::select! {
            () = clock.run() => unreachable!("it never ends"),
            () = session => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn places_are_used_again_and_the_clock_stops_without_sessions() {
        let clock = IdleClock::new(LIMIT);
        let sessions: Vec<_> = (0..3).map(|_| clock.enter(LIMIT, 0)).collect();
        drop(sessions);
        let _session = clock.enter(LIMIT, 0);
        assert_eq!((clock.entries.borrow().len(), clock.free.borrow().len()), (3, 2));
        drop(_session);
        assert!(tokio::time::timeout(Duration::from_secs(60), clock.run()).await.is_err());
        assert!(clock.now.get() <= 2 * TICKS_WITHOUT_SESSIONS, "it ticks for nobody");
    }

    #[tokio::test(start_paused = true)]
    async fn those_silent_for_longest_are_ended_first_and_no_one_of_others_or_too_young() {
        let clock = IdleClock::new(LIMIT);
        let settle = Duration::from_secs(5);
        let is_over = |idle: &mut Idle<'_>| {
            let mut cx = Context::from_waker(Waker::noop());
            matches!(idle.poll_over(&mut cx, None, false), Poll::Ready(Over::Told))
        };
        let sessions = async {
            let mut of_other = clock.enter(settle, 7);
            let mut old: Vec<_> = (0..4).map(|_| clock.enter(settle, 8)).collect();
            for n in [2, 0, 3] {
                sleep(LIMIT).await;
                old[n].touch();
            }
            let mut young = clock.enter(settle, 8);
            let end = |most| {
                let mut found = 0;
                let left = clock.end_sessions(&[8, 9], 2 * LIMIT, settle, |n| {
                    found = n;
                    most
                });
                (found, left)
            };
            assert_eq!(end(1), (4, 3));
            assert_eq!(old.iter_mut().map(is_over).collect::<Vec<_>>(), [false, true, false, false]);
            assert_eq!(end(2), (3, 1));
            assert_eq!(old.iter_mut().map(is_over).collect::<Vec<_>>(), [true, true, true, false]);
            assert_eq!((end(9), end(9)), ((1, 0), (0, 0)));
            assert!(!is_over(&mut of_other) && !is_over(&mut young));
            drop(old);
            sleep(3 * LIMIT).await;
            assert_eq!(end(9), (1, 0), "it is old enough now");
            assert!(is_over(&mut young));
        };
        tokio::select! {
            () = clock.run() => unreachable!("it never ends"),
            () = sessions => {}
        }
    }

    /// Ticks are counted in 32 bits, which wrap after 1.3 years of the shortest.
    #[tokio::test(start_paused = true)]
    async fn a_clock_that_wraps_closes_nobody_early_and_nobody_late() {
        let clock = IdleClock::new(LIMIT);
        clock.now.set(Tick::MAX - 3);
        let mut settled = 0;
        let session = async {
            let mut idle = clock.enter(LIMIT / 2, 0);
            poll_fn(|cx| {
                settled += u32::from(idle.settles());
                idle.poll_over(cx, Some(LIMIT), false)
            })
            .await;
        };
        let begun = Instant::now();
        tokio::select! {
            () = clock.run() => unreachable!("it never ends"),
            () = session => {}
        }
        let lived = begun.elapsed();
        assert!(lived >= LIMIT && lived <= LIMIT + 3 * clock.tick, "{lived:?}");
        assert!(clock.now.get() < 100, "it has not wrapped");
        assert_eq!(settled, 1);
    }
}
