//! Random, bounded pauses between tries, and between rounds of periodic work.
//!
//! Fifty proxies lose one server at the same moment. If each waited the same time, all of them would ask the
//! next server at the same moment too, again and again. Random pauses spread them.

use std::time::Duration;

/// Pauses between tries: the bound doubles with each failure.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts with a bound of `first`, which doubles up to `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// Returns the next pause, uniformly random between zero and the bound. Then the bound doubles.
    ///
    /// Proxies that lost the same server at the same moment come back evenly over the whole bound, the first
    /// time too. With pauses of at least half the bound they would come back within half the time.
    pub fn pause(&mut self) -> Duration {
        spread(self.bound())
    }

    /// Like [`Backoff::pause`], but at least half of the bound: for tries that cost more when they come too
    /// early than when many proxies make them at once.
    pub fn patient_pause(&mut self) -> Duration {
        let half = self.bound() / 2;
        half + spread(half)
    }

    fn bound(&mut self) -> Duration {
        let bound = self.next;
        self.next = (bound * 2).min(self.longest);
        bound
    }

    /// After a success: sets the bound back to `first`.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Returns a uniformly random time between zero and `bound`. It delays what a whole fleet is told to do at
/// the same moment.
#[must_use]
pub fn spread(bound: Duration) -> Duration {
    bound.mul_f64(fastrand::f64())
}

/// Returns a random time between 0.8 and 1.0 times `interval`, for periodic work.
///
/// Tasks that began together drift apart, and the promise "every `interval`" holds, because no round comes
/// later.
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
    fn the_bound_doubles_up_to_the_longest_and_can_be_reset() {
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

    /// The limits are ten standard deviations from the mean of 200: chance exceeds them less than once in
    /// 10²⁰ runs.
    #[test]
    fn pauses_spread_evenly_over_the_whole_bound_from_the_first_one_on() {
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
    fn a_jittered_interval_is_never_longer_and_at_most_a_fifth_shorter() {
        let interval = Duration::from_secs(15);
        let counts = tenths(interval, || jittered(interval));
        assert_eq!(counts[..8], [0; 8]);
        assert!(counts[8..].iter().all(|count| (776..=1_224).contains(count)), "{counts:?}");
    }
}
