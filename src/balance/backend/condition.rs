//! The health of a backend: what its checks found, whether it is ejected, and how far its slow start is.
//!
//! A condition belongs to its backend, so it outlives snapshots. The control plane decides on health and
//! ejection; sessions only count their failures. Successes are not recorded here: a row of failures ends
//! when the backend's count of successes ([`Reached`]), which is kept anyway, has grown.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use super::cause::LastCause;
use super::trial::{TrialNumber, TrialProgress};
use crate::observe::counters::Counter;

/// What active checks found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// No check has answered yet, or the backend is not checked. It is usable.
    Unchecked = 0,
    /// Its checks pass.
    Healthy = 1,
    /// Its checks fail.
    Unhealthy = 2,
}

/// Whether a backend is ejected because sessions failed at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ejection {
    /// The backend is not ejected.
    None = 0,
    /// The backend is ejected and gets no sessions.
    Ejected = 1,
    /// The time of the ejection is over. The backend gets one session, which shows whether it works again.
    Trial = 2,
}

/// How a session failed by its backend's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The session could not connect.
    Connect,
    /// The backend reset the session before it sent a byte.
    Reset,
}

/// Counts failures of one kind in a row.
#[derive(Debug, Default)]
struct Row {
    failures: AtomicU32,
    /// The count of successes at the last failure. Once that count has moved on, the row has ended.
    succeeded: AtomicU64,
}

impl Row {
    fn failed(&self, succeeded: u64) -> u32 {
        // If two sessions fail at the same moment right after a success, both may start the row, which then
        // counts one failure too few.
        if self.succeeded.swap(succeeded, Relaxed) == succeeded {
            self.failures.fetch_add(1, Relaxed).saturating_add(1)
        } else {
            self.failures.store(1, Relaxed);
            1
        }
    }

    fn length(&self, succeeded: u64) -> u32 {
        if self.succeeded.load(Relaxed) == succeeded { self.failures.load(Relaxed) } else { 0 }
    }
}

/// How many sessions of a backend have connected and were answered, over all workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Sessions that connected.
    pub connected: u64,
    /// How many of these got a byte from the backend, or ended without a fault of the backend.
    pub answered: u64,
}

/// The condition of one backend, or of one address of its name.
#[derive(Debug)]
pub struct Condition {
    health: AtomicU8,
    ejection: AtomicU8,
    /// The number and the progress of the newest trial: see [`TrialNumber::with`].
    trial: AtomicU32,
    connects: Row,
    resets: Row,
    /// The number of checks in a row with a result that differs from the health. Written by the control
    /// plane.
    checks_against: AtomicU32,
    /// When the backend joined or recovered, as [`millis`] times two. The lowest bit is set while it is in
    /// its slow start. 0: it was there from the beginning.
    begun: AtomicU64,
    /// The cause of the last session that failed by the backend's fault.
    pub session_error: LastCause,
    /// The cause of the last check that failed.
    pub check_error: LastCause,
    /// The number of checks that passed and that failed. Written by the control plane.
    pub checks: [Counter; 2],
    /// The number of ejections. Written by the control plane.
    pub ejections: Counter,
}

/// Milliseconds since the first call in this process, plus one.
fn millis(now: Instant) -> u64 {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(now.saturating_duration_since(*EPOCH).as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// The part of its weight with which a backend begins its slow start. With a smaller part, a backend of a
/// small pool would get no session for most of the slow start.
const RAMP_BEGINS_AT: f64 = 0.1;

impl Default for Condition {
    fn default() -> Self {
        Self {
            health: AtomicU8::new(Health::Unchecked as u8),
            ejection: AtomicU8::new(Ejection::None as u8),
            trial: AtomicU32::new(0),
            connects: Row::default(),
            resets: Row::default(),
            checks_against: AtomicU32::new(0),
            begun: AtomicU64::new(0),
            session_error: LastCause::default(),
            check_error: LastCause::default(),
            checks: Default::default(),
            ejections: Counter::default(),
        }
    }
}

impl Condition {
    /// What active checks found.
    #[must_use]
    pub fn health(&self) -> Health {
        match self.health.load(Relaxed) {
            1 => Health::Healthy,
            2 => Health::Unhealthy,
            _ => Health::Unchecked,
        }
    }

    /// Whether the backend is ejected.
    #[inline]
    #[must_use]
    pub fn ejection(&self) -> Ejection {
        match self.ejection.load(Relaxed) {
            1 => Ejection::Ejected,
            2 => Ejection::Trial,
            _ => Ejection::None,
        }
    }

    /// True if sessions may be sent to the backend: its checks do not fail and it is not ejected.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !self.fails_checks() && self.ejection() == Ejection::None
    }

    /// True if its checks fail. Then it gets no session, not even a trial session.
    #[must_use]
    pub fn fails_checks(&self) -> bool {
        self.health() == Health::Unhealthy
    }

    /// Sets what checks have found. It takes effect with the next snapshot.
    pub fn set_health(&self, health: Health) {
        if self.fails_checks() && health != Health::Unhealthy {
            // Failures of sessions while the checks failed are no reason to eject the backend now.
            self.forget_failures();
        }
        self.health.store(health as u8, Relaxed);
    }

    /// Counts a check with a result that differs from the health. Returns how many did so in a row.
    pub fn count_check_against(&self) -> u32 {
        self.checks_against.fetch_add(1, Relaxed).saturating_add(1)
    }

    /// Resets the count of [`Condition::count_check_against`]: a check agreed with the health, or has
    /// changed it.
    pub fn forget_checks_against(&self) {
        self.checks_against.store(0, Relaxed);
    }

    /// True if the last checks differed from the health, but too few of them to change it.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.checks_against.load(Relaxed) > 0
    }

    fn forget_failures(&self) {
        self.connects.failures.store(0, Relaxed);
        self.resets.failures.store(0, Relaxed);
    }

    /// Ejects the backend, puts it on trial or takes it back. It takes effect with the next snapshot.
    ///
    /// There are two writers: the task that ejects backends, and the health checks, which run on a thread of
    /// their own and take a backend back when it passes. This is right for three reasons:
    /// - The number of the trial only moves on, also when both write at the same time. So two sessions in
    ///   succession never have the same number, and a session with an earlier number has no effect.
    /// - Nothing depends on the ejection and the trial together. Only a backend on trial gives a trial
    ///   session out, only then its progress is read, and the next write ends that trial.
    /// - The last writer wins, and each result is one that another order of events has, too. `None` over
    ///   `Ejected`: the check passed just after the failures. `Ejected` or `Trial` over `None`: it passed
    ///   just before them. An ejection ends by time and a trial by a session, as always.
    pub fn set_ejection(&self, ejection: Ejection) {
        // With a new trial number, an earlier trial session has no effect any more.
        let next = |state| Some(TrialNumber::of(state).next().with(TrialProgress::Wanted));
        let _ = self.trial.fetch_update(Relaxed, Relaxed, next);
        self.forget_failures();
        self.ejection.store(ejection as u8, Relaxed);
    }

    /// Gives out the trial session if none is under way. The caller reports its progress and ends it.
    pub(in crate::balance) fn take_trial(&self) -> Option<TrialNumber> {
        let state = self.trial.load(Relaxed);
        if TrialProgress::of(state) != TrialProgress::Wanted {
            return None;
        }
        let number = TrialNumber::of(state).next();
        let begun = number.with(TrialProgress::Begun);
        self.trial.compare_exchange(state, begun, Relaxed, Relaxed).is_ok().then_some(number)
    }

    /// Notes how far the trial session with this number has come. Returns false if its trial has ended.
    pub(in crate::balance) fn move_trial(&self, number: TrialNumber, to: TrialProgress) -> bool {
        let moved = |state| (TrialNumber::of(state) == number).then_some(number.with(to));
        self.trial.fetch_update(Relaxed, Relaxed, moved).is_ok()
    }

    /// The trial session with this number is over. If it had no result, the next session becomes the trial
    /// session.
    pub(in crate::balance) fn end_trial(&self, number: TrialNumber) {
        let showed_nothing =
            |state| matches!(TrialProgress::of(state), TrialProgress::Begun | TrialProgress::Connected);
        let wanted = |state| {
            (TrialNumber::of(state) == number && showed_nothing(state))
                .then_some(number.with(TrialProgress::Wanted))
        };
        // A result stays until the control plane has acted on it.
        let _ = self.trial.fetch_update(Relaxed, Relaxed, wanted);
    }

    /// The number and the progress of the newest trial.
    #[must_use]
    pub fn trial(&self) -> (TrialNumber, TrialProgress) {
        let state = self.trial.load(Relaxed);
        (TrialNumber::of(state), TrialProgress::of(state))
    }

    /// True if a trial session is under way, or has ended with a result.
    #[must_use]
    pub fn has_trial_session(&self) -> bool {
        self.trial().1 != TrialProgress::Wanted
    }

    /// Counts a session that failed. Returns the number of failures of this kind in a row. `reached` has the
    /// backend's counts of successes so far.
    pub fn failed(&self, failure: Failure, reached: Reached) -> u32 {
        match failure {
            Failure::Connect => self.connects.failed(reached.connected),
            Failure::Reset => self.resets.failed(reached.answered),
        }
    }

    /// The length of the longer one of the two rows of failures.
    #[must_use]
    pub fn failures(&self, reached: Reached) -> u32 {
        self.connects.length(reached.connected).max(self.resets.length(reached.answered))
    }

    /// The backend joined the pool or recovered: its slow start begins.
    pub fn begin_ramp(&self, now: Instant) {
        self.begun.store(millis(now) << 1 | IN_SLOW_START, Relaxed);
    }

    /// The backend joined a pool in which no other backend has been for long: it has its whole weight at
    /// once.
    pub(in crate::balance) fn begin_whole(&self, now: Instant) {
        self.begun.store(millis(now) << 1, Relaxed);
    }

    /// Ends the slow start early: the backend has its whole weight from now on.
    pub(in crate::balance) fn end_ramp(&self) {
        self.begun.fetch_and(!IN_SLOW_START, Relaxed);
    }

    /// True if the backend joined or recovered at least `slow_start` ago, so that another one may start
    /// slowly beside it.
    pub(in crate::balance) fn is_settled(&self, slow_start: Duration, now: Instant) -> bool {
        let begun = self.begun.load(Relaxed);
        begun == 0 || since(begun, now) >= slow_start
    }

    /// The part of its weight that the backend has: 0.1 to 1 during its slow start, 1 after it.
    #[must_use]
    pub fn ramp(&self, slow_start: Duration, now: Instant) -> f64 {
        let begun = self.begun.load(Relaxed);
        if begun & IN_SLOW_START == 0 || slow_start.is_zero() {
            return 1.0;
        }
        (since(begun, now).as_secs_f64() / slow_start.as_secs_f64()).clamp(RAMP_BEGINS_AT, 1.0)
    }
}

/// The lowest bit of [`Condition::begun`]: the backend is in its slow start.
const IN_SLOW_START: u64 = 1;

fn since(begun: u64, now: Instant) -> Duration {
    Duration::from_millis(millis(now).saturating_sub(begun >> 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_failures_ends_with_the_first_success_of_its_kind() {
        let condition = Condition::default();
        let mut reached = Reached::default();
        assert_eq!([0, 1].map(|_| condition.failed(Failure::Connect, reached)), [1, 2]);
        assert_eq!([0, 1].map(|_| condition.failed(Failure::Reset, reached)), [1, 2]);
        reached.connected += 1;
        // The backend accepts connections and resets each session.
        assert_eq!(condition.failures(reached), 2);
        assert_eq!(condition.failed(Failure::Connect, reached), 1);
        assert_eq!(condition.failed(Failure::Reset, reached), 3);
        reached.answered += 1;
        assert_eq!(condition.failures(reached), 1);
        assert_eq!(condition.failed(Failure::Reset, reached), 1);
    }

    #[test]
    fn there_is_one_trial_session_and_an_earlier_one_has_no_effect() {
        let condition = Condition::default();
        condition.set_ejection(Ejection::Trial);
        let first = condition.take_trial().expect("a trial session is wanted");
        assert_eq!((condition.take_trial(), condition.has_trial_session()), (None, true));
        assert!(condition.move_trial(first, TrialProgress::Connected));
        condition.end_trial(first);
        let second = condition.take_trial().expect("the first one had no result");
        assert!(
            !condition.move_trial(first, TrialProgress::Failed)
                && condition.move_trial(second, TrialProgress::Succeeded)
        );
        condition.end_trial(second);
        assert_eq!(
            condition.trial(),
            (second, TrialProgress::Succeeded),
            "the control plane is to see the result"
        );
        condition.set_ejection(Ejection::Ejected);
        assert!(!condition.move_trial(second, TrialProgress::Failed) && !condition.has_trial_session());
    }

    /// The two writers write at the same time, while sessions take trials and end them. There are fewer
    /// trials than numbers, so no number may come twice.
    #[test]
    fn two_writers_of_the_ejection_give_no_trial_to_two_sessions() {
        const ROUNDS: usize = 40;
        const WRITES: usize = 200;
        const MOST_TAKEN: usize = 20_000;
        for _ in 0..ROUNDS {
            let (condition, over) = (Condition::default(), std::sync::atomic::AtomicBool::new(false));
            let (condition, together) = (&condition, std::sync::Barrier::new(4));
            let write = |ejections: [Ejection; 2]| {
                together.wait();
                for n in 0..WRITES {
                    condition.set_ejection(ejections[n % 2]);
                    // Lets the others come in between also where there are fewer cores than threads.
                    std::thread::yield_now();
                }
            };
            let session = || {
                together.wait();
                let mut taken = Vec::new();
                while !over.load(Relaxed) && taken.len() < MOST_TAKEN {
                    if condition.ejection() == Ejection::Trial
                        && let Some(number) = condition.take_trial()
                    {
                        taken.push(number.with(TrialProgress::Wanted));
                        condition.move_trial(number, TrialProgress::Connected);
                        condition.end_trial(number);
                    } else {
                        std::thread::yield_now();
                    }
                }
                taken
            };
            let mut taken = std::thread::scope(|scope| {
                let sessions = [0; 2].map(|_| scope.spawn(session));
                let writers = [[Ejection::Ejected, Ejection::Trial], [Ejection::None, Ejection::Trial]].map(
                    |ejections| {
                        let write = &write;
                        scope.spawn(move || write(ejections))
                    },
                );
                writers.into_iter().for_each(|writer| writer.join().expect("it does not panic"));
                over.store(true, Relaxed);
                sessions.map(|session| session.join().expect("it does not panic")).concat()
            });
            let all = taken.len();
            taken.sort_unstable();
            taken.dedup();
            assert_eq!(taken.len(), all, "a number was given out twice");
            // Whichever write was the last, the next trial goes on.
            condition.set_ejection(Ejection::Trial);
            let number = condition.take_trial().expect("a trial session is wanted");
            assert!(condition.move_trial(number, TrialProgress::Succeeded));
            assert_eq!(condition.trial(), (number, TrialProgress::Succeeded));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_start_grows_from_a_tenth_to_the_whole() {
        let (condition, second) = (Condition::default(), Duration::from_secs(1));
        let ramp = |after: u32| condition.ramp(10 * second, Instant::now() + after * second);
        assert_eq!(ramp(0), 1.0, "a backend that was there from the beginning has its whole weight");
        condition.begin_ramp(Instant::now());
        assert_eq!([ramp(0), ramp(5), ramp(10), ramp(1000)], [0.1, 0.5, 1.0, 1.0]);
        assert_eq!(condition.ramp(Duration::ZERO, Instant::now()), 1.0);
    }
}
