//! A worker's clock: it wakes a session that was silent for too long, that is to end early, or whose peers
//! are to be checked.
//!
//! All sessions of a worker share one clock. A timer per session would cost every short session an insertion
//! into the reactor's sorted map, and every move of bytes another one. Here activity is one store, and once
//! per tick the worker goes over the table of its sessions (3 ns each). The price is precision: a session is
//! closed up to two ticks late, never early.

use std::cell::{Cell, RefCell, RefMut};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Notify;

use self::entry::{Entry, NO_LIMIT, State, Tick};
use crate::reactor::{is_mostly_free, shrink, shrink_table, sleep};

mod entry;
#[cfg(test)]
mod tests;

/// Bounds of a tick, which is a tenth of the shortest limit.
const LONGEST_TICK: Duration = Duration::from_secs(1);
const SHORTEST_TICK: Duration = Duration::from_millis(10);
/// How often a stalled session checks the socket that it does not read.
const STALL_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// How often the peers of a session are checked within their timeout. So a vanished peer is noticed at most
/// a quarter of its timeout late.
const CHECKS_PER_TIMEOUT: u32 = 4;
/// A session that was silent for this long is quiet: no answer seems to be under way.
const QUIET_TIME: Duration = Duration::from_secs(1);
/// Ticks without a session after which the clock stops, so that an idle proxy sleeps.
const TICKS_WITHOUT_SESSIONS: u32 = 5;
/// Ticks between two checks whether memory can be given back after a peak.
const SHRINK_TICKS: u32 = 20;

/// The clock of one worker, with an entry for each session.
#[derive(Debug)]
pub struct IdleClock {
    tick: Duration,
    now: Cell<Tick>,
    entries: RefCell<Vec<Entry>>,
    /// The indices of entries without a session.
    free: RefCell<Vec<u32>>,
    /// The indices of entries whose sessions have moved to lower entries. These entries are not used before
    /// the next check of the memory, so that the end of the table can become free.
    vacated: RefCell<Vec<u32>>,
    entered: Notify,
    /// Sessions whose requested end was delayed since the last call of [`IdleClock::end_sessions`].
    deferred: Cell<usize>,
}

/// Why the clock woke a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The session was silent for its limit, as far as the clock knows.
    Silent,
    /// [`IdleClock::end_sessions`] has chosen the session.
    EndRequested,
    /// The session has moved bytes, and the acknowledgements of its peers are to be checked.
    Check,
}

impl IdleClock {
    /// Creates a clock whose tick is a tenth of `shortest_limit`, between 10 ms and 1 s.
    #[must_use]
    pub fn new(shortest_limit: Duration) -> Self {
        Self {
            tick: (shortest_limit / 10).clamp(SHORTEST_TICK, LONGEST_TICK),
            now: Cell::new(0),
            entries: RefCell::default(),
            free: RefCell::default(),
            vacated: RefCell::default(),
            entered: Notify::new(),
            deferred: Cell::new(0),
        }
    }

    /// Ticks while there are sessions. Never ends.
    pub async fn run(&self) {
        let (mut without_sessions, mut until_shrink) = (0, SHRINK_TICKS);
        loop {
            if without_sessions >= TICKS_WITHOUT_SESSIONS {
                self.shrink();
                self.entered.notified().await;
                without_sessions = 0;
            }
            sleep(self.tick).await;
            let has_sessions = self.advance();
            until_shrink -= 1;
            if until_shrink == 0 {
                self.shrink();
                until_shrink = SHRINK_TICKS;
            }
            without_sessions = if has_sessions { 0 } else { without_sessions + 1 };
        }
    }

    /// Counts one tick and wakes the sessions for which something is due. Returns false if there is no
    /// session.
    fn advance(&self) -> bool {
        let now = self.now.get().wrapping_add(1);
        self.now.set(now);
        let checks_stalled = now.is_multiple_of(self.ticks(STALL_CHECK_INTERVAL));
        let mut entries = self.entries.borrow_mut();
        for (index, entry) in (0..).zip(entries.iter_mut()) {
            let checks = entry.is_check_due(now, index);
            entry.state.set(State::CHECK_DUE, checks);
            if let Some(waker) = &entry.waker
                && (checks
                    || entry.is_expired(now)
                    || entry.settles_at == now
                    || (checks_stalled && entry.state.has_any(State::STALLED)))
            {
                waker.wake_by_ref();
            }
        }
        entries.len() > self.free.borrow().len() + self.vacated.borrow().len()
    }

    /// Gives back memory of the clock and of the thread's other tables after a peak of sessions.
    fn shrink(&self) {
        let (mut entries, mut free) = (self.entries.borrow_mut(), self.free.borrow_mut());
        free.append(&mut self.vacated.take());
        if is_mostly_free(entries.len(), free.len()) {
            shrink_table(&mut entries, &mut free);
            // Sessions far behind in the table move to lower entries, so that its end becomes free. Each
            // moves when it is woken, because its handle holds the index.
            let most = 2 * (entries.len() - free.len());
            for entry in entries.iter_mut().skip(most) {
                if let Some(waker) = &entry.waker {
                    entry.state.set(State::MOVE_REQUESTED, true);
                    waker.wake_by_ref();
                }
            }
        }
        drop((entries, free));
        shrink();
    }

    /// The number of ticks after which at least `duration` has passed, wherever within a tick it began. At
    /// most [`NO_LIMIT`].
    fn ticks(&self, duration: Duration) -> Tick {
        let ticks = duration.as_nanos().div_ceil(self.tick.as_nanos()) + 1;
        Tick::try_from(ticks).unwrap_or(NO_LIMIT).min(NO_LIMIT)
    }

    /// Returns a mask of low bits. Its period is the largest power of two ticks that is not longer than
    /// `interval`; at least 1 tick and at most 256.
    fn check_mask(&self, interval: Duration) -> u8 {
        let ticks = (interval.as_nanos() / self.tick.as_nanos()).max(1);
        u8::try_from((1u128 << ticks.ilog2()) - 1).unwrap_or(u8::MAX)
    }

    /// Requests the end of sessions of `backends` (sorted keys), of those first that were silent for
    /// longest.
    ///
    /// Only sessions that began at least `age` ago (to a tick) can be chosen. `settle_time` is the settle
    /// time of these sessions. `most` gets their number and returns how many of them to end. Returns how
    /// many are left.
    pub fn end_sessions(
        &self,
        backends: &[u64],
        age: Duration,
        settle_time: Duration,
        most: impl FnOnce(usize) -> usize,
    ) -> usize {
        let (now, settles) = (self.now.get(), self.ticks(settle_time));
        let age = Tick::try_from(age.as_nanos() / self.tick.as_nanos()).unwrap_or(NO_LIMIT).min(NO_LIMIT);
        let mut entries = self.entries.borrow_mut();
        let is_candidate = |entry: &Entry| {
            let began = entry.settles_at.wrapping_sub(settles);
            !entry.state.has_any(State::END_REQUESTED)
                && backends.binary_search(&entry.backend).is_ok()
                && now.wrapping_sub(began).saturating_add(1) >= age
        };
        let candidates = entries.iter().enumerate().filter(|(_, entry)| is_candidate(entry));
        let mut candidates: Vec<_> =
            candidates.map(|(n, entry)| (now.wrapping_sub(entry.last_activity), n)).collect();
        // Sessions that got a delay are replaced by others, so that a step ends as many as it should.
        let most = (most(candidates.len()) + self.deferred.take()).min(candidates.len());
        if most < candidates.len() {
            candidates.select_nth_unstable_by(most, |a, b| b.cmp(a));
        }
        for (_, n) in &candidates[..most] {
            entries[*n].state.set(State::END_REQUESTED, true);
            if let Some(waker) = &entries[*n].waker {
                waker.wake_by_ref();
            }
        }
        candidates.len() - most
    }

    /// Adds a session of `backend` (its key), which is active now and settles after `settle_time`.
    pub(super) fn enter(&self, settle_time: Duration, backend: u64) -> IdleHandle<'_> {
        let now = self.now.get();
        let entry = Entry {
            waker: None,
            last_activity: now,
            limit: NO_LIMIT,
            settles_at: now.wrapping_add(self.ticks(settle_time)),
            state: State::UNCONFIRMED,
            check_mask: 0,
            backend,
        };
        let mut entries = self.entries.borrow_mut();
        let index = match self.free.borrow_mut().pop() {
            Some(index) => {
                entries[index as usize] = entry;
                index
            }
            None => {
                entries.push(entry);
                u32::try_from(entries.len() - 1).expect("descriptors are fewer")
            }
        };
        self.entered.notify_one();
        IdleHandle { clock: self, index, last_stall_check: now }
    }
}

/// One session's entry at its worker's clock. Dropping it frees the entry.
#[derive(Debug)]
pub(super) struct IdleHandle<'a> {
    clock: &'a IdleClock,
    index: u32,
    last_stall_check: Tick,
}

impl IdleHandle<'_> {
    fn entry(&self) -> RefMut<'_, Entry> {
        RefMut::map(self.clock.entries.borrow_mut(), |entries| &mut entries[self.index as usize])
    }

    /// Records activity: bytes moved, or a half was closed.
    pub(super) fn touch(&mut self) {
        let mut entry = self.entry();
        entry.last_activity = self.clock.now.get();
        entry.state.set(State::UNCONFIRMED, true);
    }

    /// Records that bytes moved on the wire `ago`. Returns false if the clock has recorded an activity that
    /// is not earlier.
    pub(super) fn record_move(&mut self, ago: Duration) -> bool {
        let now = self.clock.now.get();
        let ticks = ago.as_nanos() / self.clock.tick.as_nanos();
        let mut entry = self.entry();
        let silent = now.wrapping_sub(entry.last_activity);
        match Tick::try_from(ticks).ok().filter(|ticks| *ticks < silent) {
            Some(ticks) => {
                entry.last_activity = now.wrapping_sub(ticks);
                true
            }
            None => false,
        }
    }

    /// Ready when something is due for the session: its end was requested, its peers are to be checked
    /// (reported once each time), or it was silent for `limit` (`None`: never). `limit` may differ from poll
    /// to poll. A `stalled` session is also woken every [`STALL_CHECK_INTERVAL`].
    pub(super) fn poll_due(
        &mut self,
        cx: &mut Context<'_>,
        limit: Option<Duration>,
        stalled: bool,
    ) -> Poll<Due> {
        let mut entry = self.entry();
        if entry.state.has_any(State::END_REQUESTED.and(State::CHECK_DUE).and(State::MOVE_REQUESTED)) {
            if entry.state.has_any(State::MOVE_REQUESTED) {
                drop(entry);
                self.move_to_lower_index();
                return self.poll_due(cx, limit, stalled);
            }
            if entry.state.has_any(State::END_REQUESTED) {
                return Poll::Ready(Due::EndRequested);
            }
            entry.state.set(State::CHECK_DUE, false);
            return Poll::Ready(Due::Check);
        }
        entry.state.set(State::STALLED, stalled);
        entry.limit = limit.map_or(NO_LIMIT, |limit| self.clock.ticks(limit));
        if entry.is_expired(self.clock.now.get()) {
            return Poll::Ready(Due::Silent);
        }
        if !entry.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            entry.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Moves the session to the free entry that is next in the list, if its index is lower than the
    /// session's.
    fn move_to_lower_index(&mut self) {
        let (mut entries, mut free) = (self.clock.entries.borrow_mut(), self.clock.free.borrow_mut());
        entries[self.index as usize].state.set(State::MOVE_REQUESTED, false);
        // `shrink_table` has sorted the list. So the lowest index is popped first, unless a session has
        // ended since.
        if let Some(lower) = free.pop_if(|lower| *lower < self.index) {
            entries.swap(lower as usize, self.index as usize);
            self.clock.vacated.borrow_mut().push(std::mem::replace(&mut self.index, lower));
        }
    }

    /// True if the session has not been silent for `limit`.
    pub(super) fn is_active(&self, limit: Option<Duration>) -> bool {
        let silent = self.clock.now.get().wrapping_sub(self.entry().last_activity);
        limit.is_none_or(|limit| silent < self.clock.ticks(limit))
    }

    /// Records that the peers have all bytes. The peers are not checked again before further bytes have
    /// moved.
    pub(super) fn confirm(&mut self) {
        self.entry().state.set(State::UNCONFIRMED, false);
    }

    /// Delays the requested end of a session once, because bytes still move. Returns false if it was
    /// delayed before. A later call of [`IdleClock::end_sessions`] may request the end again.
    pub(super) fn defer(&mut self) -> bool {
        let mut entry = self.entry();
        if entry.state.has_any(State::DEFERRED) {
            return false;
        }
        entry.state.set(State::END_REQUESTED, false);
        entry.state.set(State::DEFERRED, true);
        self.clock.deferred.set(self.clock.deferred.get() + 1);
        true
    }

    /// True if the session has moved nothing for [`QUIET_TIME`].
    pub(super) fn is_quiet(&self) -> bool {
        self.clock.now.get().wrapping_sub(self.entry().last_activity) >= self.clock.ticks(QUIET_TIME)
    }

    /// True once per [`STALL_CHECK_INTERVAL`] of silence: a stalled session then checks whether the socket
    /// that it does not read was reset. While bytes move, the check can wait: what the source sent before
    /// the reset is still passed on.
    pub(super) fn is_stall_check_due(&mut self) -> bool {
        let (now, interval) = (self.clock.now.get(), self.clock.ticks(STALL_CHECK_INTERVAL));
        let silent = now.wrapping_sub(self.entry().last_activity) >= interval;
        let due = silent && now.wrapping_sub(self.last_stall_check) >= interval;
        if due {
            self.last_stall_check = now;
        }
        due
    }

    /// True once, when the session has lived for its settle time. From then on its peers are checked several
    /// times per `peer_timeout` while they may lack bytes.
    pub(super) fn has_just_settled(&mut self, peer_timeout: Duration) -> bool {
        let mut entry = self.entry();
        let due = !entry.state.has_any(State::SETTLED)
            && self.clock.now.get().wrapping_sub(entry.settles_at) < NO_LIMIT;
        if due {
            entry.state.set(State::SETTLED, true);
            entry.check_mask = self.clock.check_mask(peer_timeout / CHECKS_PER_TIMEOUT);
        }
        due
    }
}

impl Drop for IdleHandle<'_> {
    fn drop(&mut self) {
        *self.entry() = Entry::default();
        self.clock.free.borrow_mut().push(self.index);
    }
}
