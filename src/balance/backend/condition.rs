//! What is known of a backend's health: by checks, by what its sessions saw, and since when it is back.
//!
//! It belongs to the backend, so it outlives any number of snapshots. The control plane decides; sessions only count their
//! failures, which costs those that succeed nothing: a row of failures ends where a counter that they keep anyway has moved on.

use std::num::NonZeroU16;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use super::cause::LastCause;
use crate::observe::counters::Counter;

/// What active checks found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not answered yet, or never asked: usable until then.
    Unchecked = 0,
    /// It passes.
    Healthy = 1,
    /// It fails.
    Unhealthy = 2,
}

/// What is made of a backend that failed sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ejection {
    /// It takes sessions.
    None = 0,
    /// It gets no sessions until its time has come.
    Ejected = 1,
    /// It gets one session, which shows whether it is back.
    Trial = 2,
}

/// How far the session has come that shows whether a probing backend is back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrialProgress {
    /// The next session is to show it.
    Wanted = 0,
    /// A session has been given out, and is about to connect.
    Begun = 1,
    /// It has connected.
    Connected = 2,
    /// It was answered, or ended without the backend's fault.
    Succeeded = 3,
    /// It failed by the backend's fault.
    Failed = 4,
}

impl TrialProgress {
    fn of(state: u32) -> Self {
        match state % 8 {
            0 => Self::Wanted,
            1 => Self::Begun,
            2 => Self::Connected,
            3 => Self::Succeeded,
            _ => Self::Failed,
        }
    }
}

/// Which of a backend's probes a session is. One that was overtaken by the next has no say any more. Two bytes are what a session has
/// left for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrialNumber(NonZeroU16);

impl TrialNumber {
    const FIRST: Self = Self(NonZeroU16::MIN);

    fn of(state: u32) -> Self {
        u16::try_from(state >> 8).ok().and_then(NonZeroU16::new).map_or(Self::FIRST, Self)
    }

    fn next(self) -> Self {
        self.0.checked_add(1).map_or(Self::FIRST, Self)
    }

    fn with(self, progress: TrialProgress) -> u32 {
        u32::from(self.0.get()) << 8 | progress as u32
    }
}

/// How a session failed by its backend's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It could not connect.
    Connect,
    /// The backend reset it before it sent a byte.
    Reset,
}

/// A row of failures of one kind.
#[derive(Debug, Default)]
struct Row {
    failures: AtomicU32,
    /// What had succeeded when the last one happened; where that has moved on, the row has ended.
    succeeded: AtomicU64,
}

impl Row {
    fn failed(&self, succeeded: u64) -> u32 {
        // Two sessions that fail at the same moment right after a success may both begin the row: it is one too short then.
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

/// What sessions of a backend have reached, over all workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// That connected.
    pub connected: u64,
    /// Of which the backend sent a byte, or which ended without its fault.
    pub answered: u64,
}

/// One backend's.
#[derive(Debug)]
pub struct Condition {
    health: AtomicU8,
    ejection: AtomicU8,
    /// The number of the newest probe, and how far it has come: see [`TrialNumber::with`].
    trial: AtomicU32,
    connects: Row,
    resets: Row,
    /// Checks in a row that spoke against its health as it stands; written by the control plane.
    checks_against: AtomicU32,
    /// [`millis`] of the moment at which it joined or recovered, times two; the lowest bit: it is held back since. 0: it was
    /// there from the beginning.
    begun: AtomicU64,
    /// Why a session failed last by the backend's fault.
    pub session_error: LastCause,
    /// Why a check failed last.
    pub check_error: LastCause,
    /// Checks that passed and that failed; written by the control plane.
    pub checks: [Counter; 2],
    /// How often it was ejected; written by the control plane.
    pub ejections: Counter,
}

/// Milliseconds since the process asked first, and one more.
fn millis(now: Instant) -> u64 {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(now.saturating_duration_since(*EPOCH).as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// The share of its weight that a backend has at the very beginning of its slow start. A smaller one would keep it from any session in
/// a small pool for as long as it takes to grow.
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

    /// What is made of its failures.
    #[inline]
    #[must_use]
    pub fn ejection(&self) -> Ejection {
        match self.ejection.load(Relaxed) {
            1 => Ejection::Ejected,
            2 => Ejection::Trial,
            _ => Ejection::None,
        }
    }

    /// Sessions may be sent there: neither its checks nor its sessions speak against it.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !self.fails_checks() && self.ejection() == Ejection::None
    }

    /// Its checks speak against it, so no session is sent there, not even to probe it.
    #[must_use]
    pub fn fails_checks(&self) -> bool {
        self.health() == Health::Unhealthy
    }

    /// A check has decided. The next snapshot goes by it.
    pub fn set_health(&self, health: Health) {
        if self.fails_checks() && health != Health::Unhealthy {
            // What sessions saw meanwhile is no reason to eject it now.
            self.forget_failures();
        }
        self.health.store(health as u8, Relaxed);
    }

    /// A check did not end as its health says. Returns how many did not in a row.
    pub fn count_check_against(&self) -> u32 {
        self.checks_against.fetch_add(1, Relaxed).saturating_add(1)
    }

    /// A check ended as its health says, or has changed it.
    pub fn forget_checks_against(&self) {
        self.checks_against.store(0, Relaxed);
    }

    /// The last checks, fewer than decide, did not end as its health says.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.checks_against.load(Relaxed) > 0
    }

    fn forget_failures(&self) {
        self.connects.failures.store(0, Relaxed);
        self.resets.failures.store(0, Relaxed);
    }

    /// It is ejected, probed or taken back. The next snapshot goes by it.
    pub fn set_ejection(&self, ejection: Ejection) {
        // A session that probes until now has no say in what comes.
        let next = TrialNumber::of(self.trial.load(Relaxed)).next();
        self.trial.store(next.with(TrialProgress::Wanted), Relaxed);
        self.forget_failures();
        self.ejection.store(ejection as u8, Relaxed);
    }

    /// For the one session that a probing backend gets. It is to say what becomes of it, and to end its probe.
    pub(in crate::balance) fn take_trial(&self) -> Option<TrialNumber> {
        let state = self.trial.load(Relaxed);
        if TrialProgress::of(state) != TrialProgress::Wanted {
            return None;
        }
        let number = TrialNumber::of(state).next();
        let begun = number.with(TrialProgress::Begun);
        self.trial.compare_exchange(state, begun, Relaxed, Relaxed).is_ok().then_some(number)
    }

    /// The session with this probe has come so far. False: its probe is over.
    pub(in crate::balance) fn move_trial(&self, number: TrialNumber, to: TrialProgress) -> bool {
        let moved = |state| (TrialNumber::of(state) == number).then_some(number.with(to));
        self.trial.fetch_update(Relaxed, Relaxed, moved).is_ok()
    }

    /// The session with this probe is over. Where it showed nothing, the next one is to.
    pub(in crate::balance) fn end_trial(&self, number: TrialNumber) {
        let showed_nothing =
            |state| matches!(TrialProgress::of(state), TrialProgress::Begun | TrialProgress::Connected);
        let wanted = |state| {
            (TrialNumber::of(state) == number && showed_nothing(state))
                .then_some(number.with(TrialProgress::Wanted))
        };
        // What is left otherwise is for whoever decides.
        let _ = self.trial.fetch_update(Relaxed, Relaxed, wanted);
    }

    /// The newest probe, and how far it has come.
    #[must_use]
    pub fn trial(&self) -> (TrialNumber, TrialProgress) {
        let state = self.trial.load(Relaxed);
        (TrialNumber::of(state), TrialProgress::of(state))
    }

    /// A session is just finding out whether it is back, or has found out.
    #[must_use]
    pub fn has_trial_session(&self) -> bool {
        self.trial().1 != TrialProgress::Wanted
    }

    /// A session failed. Returns how many did in a row; `reached` is what the others have reached so far.
    pub fn failed(&self, failure: Failure, reached: Reached) -> u32 {
        match failure {
            Failure::Connect => self.connects.failed(reached.connected),
            Failure::Reset => self.resets.failed(reached.answered),
        }
    }

    /// How many failed in a row, of the kind of which more did.
    #[must_use]
    pub fn failures(&self, reached: Reached) -> u32 {
        self.connects.length(reached.connected).max(self.resets.length(reached.answered))
    }

    /// It joined the pool or recovered: its weight begins to grow.
    pub fn begin_ramp(&self, now: Instant) {
        self.begun.store(millis(now) << 1 | HELD_BACK, Relaxed);
    }

    /// It joined a pool in which no other backend has been for long: it has its whole weight at once.
    pub(in crate::balance) fn begin_whole(&self, now: Instant) {
        self.begun.store(millis(now) << 1, Relaxed);
    }

    /// It has its whole weight from now on, though it joined or recovered a short time ago.
    pub(in crate::balance) fn end_ramp(&self) {
        self.begun.fetch_and(!HELD_BACK, Relaxed);
    }

    /// It joined or recovered so long ago that another one may start slowly beside it.
    pub(in crate::balance) fn is_settled(&self, slow_start: Duration, now: Instant) -> bool {
        let begun = self.begun.load(Relaxed);
        begun == 0 || since(begun, now) >= slow_start
    }

    /// The part of its weight that it has in its slow start, and 1 after it.
    #[must_use]
    pub fn ramp(&self, slow_start: Duration, now: Instant) -> f64 {
        let begun = self.begun.load(Relaxed);
        if begun & HELD_BACK == 0 || slow_start.is_zero() {
            return 1.0;
        }
        (since(begun, now).as_secs_f64() / slow_start.as_secs_f64()).clamp(RAMP_BEGINS_AT, 1.0)
    }
}

/// In [`Condition::begun`], beside the milliseconds: it has only a part of its weight.
const HELD_BACK: u64 = 1;

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
        // It connects, and resets each session.
        assert_eq!(condition.failures(reached), 2);
        assert_eq!(condition.failed(Failure::Connect, reached), 1);
        assert_eq!(condition.failed(Failure::Reset, reached), 3);
        reached.answered += 1;
        assert_eq!(condition.failures(reached), 1);
        assert_eq!(condition.failed(Failure::Reset, reached), 1);
    }

    #[test]
    fn one_session_probes_and_one_that_was_overtaken_has_no_say() {
        let condition = Condition::default();
        condition.set_ejection(Ejection::Trial);
        let first = condition.take_trial().expect("it is wanted");
        assert_eq!((condition.take_trial(), condition.has_trial_session()), (None, true));
        assert!(condition.move_trial(first, TrialProgress::Connected));
        condition.end_trial(first);
        let second = condition.take_trial().expect("the first one showed nothing");
        assert!(
            !condition.move_trial(first, TrialProgress::Failed)
                && condition.move_trial(second, TrialProgress::Succeeded)
        );
        condition.end_trial(second);
        assert_eq!(condition.trial(), (second, TrialProgress::Succeeded), "whoever decides is to see it");
        condition.set_ejection(Ejection::Ejected);
        assert!(!condition.move_trial(second, TrialProgress::Failed) && !condition.has_trial_session());
    }

    #[tokio::test(start_paused = true)]
    async fn a_ramp_grows_from_a_tenth_to_the_whole() {
        let (condition, second) = (Condition::default(), Duration::from_secs(1));
        let ramp = |after: u32| condition.ramp(10 * second, Instant::now() + after * second);
        assert_eq!(ramp(0), 1.0, "one that was there from the beginning has its whole weight");
        condition.begin_ramp(Instant::now());
        assert_eq!([ramp(0), ramp(5), ramp(10), ramp(1000)], [0.1, 0.5, 1.0, 1.0]);
        assert_eq!(condition.ramp(Duration::ZERO, Instant::now()), 1.0);
    }
}
