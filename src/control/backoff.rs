//! How long to wait before the next try, or the next turn: bounded, and by chance, so that a fleet does nothing in step.
//!
//! Fifty proxies lose one server at the same moment. Whatever they wait for from then on they would do at the same moment
//! too, for ever, if each waited the same time.

use std::time::Duration;

/// The pauses between tries at one thing.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// The first pause is at most `first`, none is longer than `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// The next pause: anything between nothing and a bound that doubles each time. So those who lost the same server at
    /// the same moment come back evenly over the whole bound, the first time too; a part of it alone (half of the bound
    /// and some chance) would put them into half the time.
    pub fn pause(&mut self) -> Duration {
        spread(self.bound())
    }

    /// The same where a try too early costs more than a fleet in step: at least half of the bound.
    pub fn patient_pause(&mut self) -> Duration {
        let half = self.bound() / 2;
        half + spread(half)
    }

    fn bound(&mut self) -> Duration {
        let bound = self.next;
        self.next = (bound * 2).min(self.longest);
        bound
    }

    /// It worked: the next pause is short again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Anything between nothing and `bound`: for what a whole fleet is told to do at one moment.
#[must_use]
pub fn spread(bound: Duration) -> Duration {
    bound.mul_f64(fastrand::f64())
}

/// `interval`, or up to a fifth less, never more: for what is done again and again, so that those who once began together
/// drift apart, and what is promised of `interval` holds.
#[must_use]
pub fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(0.8 + 0.2 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRIES: u32 = 2_000;

    /// How many of [`TRIES`] pauses fall into each tenth of `bound`.
    fn tenths(bound: Duration, mut pause: impl FnMut() -> Duration) -> [u32; 10] {
        let mut counts = [0; 10];
        for _ in 0..TRIES {
            let pause = pause();
            assert!(pause <= bound, "{pause:?} > {bound:?}");
            counts[((pause.as_secs_f64() / bound.as_secs_f64() * 10.0) as usize).min(9)] += 1;
        }
        counts
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_again() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(300));
        for bound in [100, 200, 300, 300] {
            let pause = backoff.pause();
            assert!(pause <= Duration::from_millis(bound), "{pause:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= Duration::from_millis(100));
        let patient = backoff.patient_pause().as_millis();
        assert!((100..=200).contains(&patient), "{patient} ms");
    }

    /// 2,000 of them stray ten standard deviations less often than once in 10²⁰.
    #[test]
    fn those_who_begin_together_come_back_evenly_over_the_whole_bound_from_the_first_time_on() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_millis(400));
        let fresh = tenths(first, || Backoff::new(first, longest).pause());
        let mut used = Backoff::new(first, longest);
        for _ in 0..10 {
            used.pause();
        }
        let later = tenths(longest, || used.pause());
        for counts in [fresh, later] {
            assert!(counts.iter().all(|count| (66..=334).contains(count)), "{counts:?}");
        }
    }

    #[test]
    fn what_is_done_again_and_again_is_never_late_and_never_much_too_early() {
        let interval = Duration::from_secs(15);
        let counts = tenths(interval, || jittered(interval));
        assert_eq!(counts[..8], [0; 8]);
        assert!(counts[8..].iter().all(|count| (776..=1_224).contains(count)), "{counts:?}");
    }
}
