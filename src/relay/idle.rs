//! Tells when a session has been silent for too long, and when it has lived long enough to be worth some care.
//!
//! One clock for all sessions of a worker. A timer each would cost every short session an entry in the runtime's timer
//! wheel and, where that became the next to fire, a write to wake the very thread that set it. Here activity is one store,
//! and once a tick the worker looks over all its sessions (3 ns each). The price is precision: a session may be closed up
//! to two ticks late, never early.

use std::cell::{Cell, RefCell};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

const LONGEST_TICK: Duration = Duration::from_secs(1);
const SHORTEST_TICK: Duration = Duration::from_millis(10);
/// Between two looks of a stalled session at the socket that it does not read.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// The clock stops when there was no session for so many ticks, so that an idle proxy sleeps.
const TICKS_WITHOUT_SESSIONS: u32 = 5;

/// A worker's clock, and the sessions that it looks over.
#[derive(Debug)]
pub struct IdleClock {
    tick: Duration,
    now: Cell<u64>,
    entries: RefCell<Vec<Entry>>,
    /// Entries without a session.
    free: RefCell<Vec<usize>>,
    entered: Notify,
}

/// One session, or none.
#[derive(Debug, Default)]
struct Entry {
    waker: Option<Waker>,
    /// The tick of its last activity.
    last_activity: u64,
    /// Ticks of silence that it is allowed; `None`: any number.
    limit: Option<u64>,
    /// The tick at which it is woken once, whatever it does.
    settles: u64,
    /// It waits for a socket to take bytes, and is woken now and then to look after the other one.
    stalled: bool,
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
        let now = self.now.get() + 1;
        self.now.set(now);
        let looks = self.ticks(LOOK_INTERVAL);
        let entries = self.entries.borrow();
        for entry in entries.iter() {
            if let Some(waker) = &entry.waker
                && (entry.is_expired(now)
                    || entry.settles == now
                    || (entry.stalled && now.is_multiple_of(looks)))
            {
                waker.wake_by_ref();
            }
        }
        entries.len() > self.free.borrow().len()
    }

    /// Ticks that are over only after `duration`, wherever within a tick it begins.
    fn ticks(&self, duration: Duration) -> u64 {
        u64::try_from(duration.as_nanos().div_ceil(self.tick.as_nanos())).unwrap_or(u64::MAX - 1) + 1
    }

    /// Begins to look over a session, active now, that settles after `settle_time`.
    pub(super) fn enter(&self, settle_time: Duration) -> Idle<'_> {
        let entry = Entry {
            waker: None,
            last_activity: self.now.get(),
            limit: None,
            stalled: false,
            settles: self.now.get().saturating_add(self.ticks(settle_time)),
        };
        let mut entries = self.entries.borrow_mut();
        let place = match self.free.borrow_mut().pop() {
            Some(place) => {
                entries[place] = entry;
                place
            }
            None => {
                entries.push(entry);
                entries.len() - 1
            }
        };
        self.entered.notify_one();
        Idle { clock: self, place, settled: false, next_look: 0 }
    }
}

impl Entry {
    fn is_expired(&self, now: u64) -> bool {
        self.limit.is_some_and(|limit| now.saturating_sub(self.last_activity) >= limit)
    }
}

/// One session's place at its worker's clock; given back when dropped.
#[derive(Debug)]
pub(super) struct Idle<'a> {
    clock: &'a IdleClock,
    place: usize,
    settled: bool,
    next_look: u64,
}

impl Idle<'_> {
    /// Bytes moved, or a half closed.
    pub(super) fn touch(&mut self) {
        self.clock.entries.borrow_mut()[self.place].last_activity = self.clock.now.get();
    }

    /// Ready once the session has been silent for `limit`; `None` never is. `limit` may differ from poll to poll. While it
    /// is `stalled`, it is polled at least every few seconds.
    pub(super) fn poll_expired(
        &mut self,
        cx: &mut Context<'_>,
        limit: Option<Duration>,
        stalled: bool,
    ) -> Poll<()> {
        let entry = &mut self.clock.entries.borrow_mut()[self.place];
        entry.stalled = stalled;
        entry.limit = limit.map(|limit| self.clock.ticks(limit));
        if entry.is_expired(self.clock.now.get()) {
            return Poll::Ready(());
        }
        if !entry.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            entry.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// True once every few seconds: a stalled session is to look after the socket that it does not read.
    pub(super) fn looks(&mut self) -> bool {
        let now = self.clock.now.get();
        let due = now >= self.next_look;
        if due {
            self.next_look = now.saturating_add(self.clock.ticks(LOOK_INTERVAL));
        }
        due
    }

    /// True once: when the session has lived for its settle time.
    pub(super) fn settles(&mut self) -> bool {
        let due = !self.settled && self.clock.now.get() >= self.clock.entries.borrow()[self.place].settles;
        self.settled |= due;
        due
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.clock.entries.borrow_mut()[self.place] = Entry::default();
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
        let mut idle = clock.enter(Duration::from_secs(3600));
        for _ in 0..touches {
            let silence = poll_fn(|cx| idle.poll_expired(cx, Some(LIMIT), false));
            assert!(
                tokio::time::timeout(LIMIT / 2, silence).await.is_err(),
                "it expired although it was active"
            );
            idle.touch();
        }
        poll_fn(|cx| idle.poll_expired(cx, Some(LIMIT), false)).await;
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
            let mut idle = clock.enter(Duration::from_secs(5));
            let mut settled = 0;
            let silence = poll_fn(|cx| {
                settled += u32::from(idle.settles());
                idle.poll_expired(cx, None, false)
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
        let sessions: Vec<_> = (0..3).map(|_| clock.enter(LIMIT)).collect();
        drop(sessions);
        let _session = clock.enter(LIMIT);
        assert_eq!((clock.entries.borrow().len(), clock.free.borrow().len()), (3, 2));
        drop(_session);
        assert!(tokio::time::timeout(Duration::from_secs(60), clock.run()).await.is_err());
        assert!(clock.now.get() <= u64::from(2 * TICKS_WITHOUT_SESSIONS), "it ticks for nobody");
    }
}
