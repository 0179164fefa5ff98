//! The points that `weighted_round_robin` picks at: evenly spread over the line at every moment.
//!
//! A Kronecker sequence: each point lies one golden section of the line past the last. The golden ratio is the number
//! that fractions approximate worst, so the points never bunch up, whatever stretch is looked at and wherever counting
//! begins. There is nothing to reset when weights change and nothing to share but one counter. How far a backend can
//! stray from its share is held by this file's tests.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// ⌊2⁶⁴ ÷ φ⌋
const GOLDEN_SECTION: u64 = 0x9E37_79B9_7F4A_7C15;

/// One pool's sequence, shared by all workers.
#[derive(Debug)]
pub(crate) struct Sequence(AtomicU64);

impl Sequence {
    /// Begins at `phase`: a random one for each proxy, so that a fleet does not move in step.
    pub(crate) fn new(phase: u64) -> Self {
        Self(AtomicU64::new(phase))
    }

    /// The next point.
    #[inline]
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(GOLDEN_SECTION, Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::shares::Shares;
    use super::*;
    use proptest::prelude::*;

    /// The farthest that any backend strays from its exact share within `picks` picks.
    fn worst_stray(weights: &[f64], sequence: &Sequence, picks: u32) -> f64 {
        let shares = Shares::new(weights);
        let total: f64 = weights.iter().sum();
        let mut counts = vec![0u32; weights.len()];
        let mut worst = 0f64;
        for n in 1..=picks {
            counts[shares.at(sequence.next()).expect("there are weights")] += 1;
            for (count, weight) in counts.iter().zip(weights) {
                worst = worst.max((f64::from(*count) - f64::from(n) * weight / total).abs());
            }
        }
        worst
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn no_backend_strays_more_than_three_and_a_half_sessions_in_a_thousand_picks(
            weights in prop::collection::vec(prop_oneof![1.0..1000.0, (1u32..10).prop_map(f64::from)], 1..=10),
            phase in any::<u64>(),
        ) {
            let stray = worst_stray(&weights, &Sequence::new(phase), 1_000);
            prop_assert!(stray <= 3.5, "strayed {stray}");
        }

        #[test]
        fn a_weight_change_leaves_no_debt_behind(
            before in prop::collection::vec(1.0..1000.0, 1..=10),
            after in prop::collection::vec(1.0..1000.0, 1..=10),
            phase in any::<u64>(), picks in 0u32..500,
        ) {
            let sequence = Sequence::new(phase);
            worst_stray(&before, &sequence, picks);
            let stray = worst_stray(&after, &sequence, 1_000);
            prop_assert!(stray <= 3.5, "strayed {stray}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4))]
        #[test]
        fn no_backend_strays_more_than_six_sessions_in_a_million_picks(
            weights in prop::collection::vec(1.0..1000.0, 1..=10), phase in any::<u64>(),
        ) {
            let stray = worst_stray(&weights, &Sequence::new(phase), 1_000_000);
            prop_assert!(stray <= 6.0, "strayed {stray}");
        }
    }

    #[test]
    fn workers_that_pick_at_once_share_one_spread() {
        let weights = [5.0, 3.0, 1.0, 0.5];
        let (shares, sequence) = (Shares::new(&weights), Sequence::new(fastrand::u64(..)));
        let picks_of_a_worker = || {
            let mut counts = [0u32; 4];
            (0..25_000).for_each(|_| counts[shares.at(sequence.next()).expect("there are weights")] += 1);
            counts
        };
        let counts = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(picks_of_a_worker)).collect();
            workers.into_iter().map(|worker| worker.join().expect("no panic")).fold(
                [0; 4],
                |mut sum, counts| {
                    sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                    sum
                },
            )
        });
        for (count, weight) in counts.iter().zip(weights) {
            let stray = (f64::from(*count) - 100_000.0 * weight / 9.5).abs();
            assert!(stray <= 6.0, "strayed {stray}: {counts:?}");
        }
    }

    #[test]
    fn the_classic_table_five_one_one_is_spread_not_bunched() {
        let shares = Shares::new(&[5.0, 1.0, 1.0]);
        let sequence = Sequence::new(0);
        let picks: Vec<usize> =
            (0..70).map(|_| shares.at(sequence.next()).expect("there are weights")).collect();
        let longest_run = picks.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest_run <= Some(7), "{picks:?}");
    }
}
