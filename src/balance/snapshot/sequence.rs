//! The points that `weighted_round_robin` picks at, evenly spread at every moment.
//!
//! A generalised van der Corput sequence: the number of the pick is written in base 36, each digit is
//! replaced by Faure's permutation, and the digits in reverse order are the fraction of the point. Of all
//! such sequences with a short table, its points deviate least from an even spread (H. Faure, "Good
//! permutations for extreme discrepancy", J. Number Theory 42, 1992). Multiples of the golden ratio, which
//! need one addition for each pick, deviate up to 3.69 sessions within 1,000 picks and 6.69 within
//! 1,000,000; this sequence deviates 3.42 and 5.78, which the tests of this file compute exactly.
//!
//! The snapshots of a pool share one sequence. A sequence that restarts with each change of a weight would
//! be no better than chance where weights, health or a slow start change all the time: with one change every
//! 2 picks, the counts of 60,000 picks deviate by 150 from their shares. From any later pick on, the
//! deviation is at most twice that from the first pick, since a range of picks is the difference of two
//! ranges that start at the first one.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const BASE: usize = 36;
/// Faure's permutation of the digits.
const PERMUTED: [u8; BASE] = [
    0, 25, 17, 7, 31, 11, 20, 3, 27, 13, 34, 22, 5, 15, 29, 9, 23, 1, 18, 32, 8, 28, 14, 4, 21, 33, 12, 26,
    2, 19, 10, 30, 6, 16, 24, 35,
];

/// Two digits are looked up at once.
const PAIRS: usize = BASE * BASE;
/// For each pair of digits (the lower one first), their permuted reverse: 0 to 1,295.
const REVERSED: [u16; PAIRS] = reversed();
/// The value of one unit of each pair: 2⁶⁴ ÷ 1,296, ÷ 1,296², …
const WORTH: [u64; 6] = worth();

const fn reversed() -> [u16; PAIRS] {
    let mut table = [0; PAIRS];
    let mut pair = 0;
    while pair < PAIRS {
        table[pair] = PERMUTED[pair % BASE] as u16 * BASE as u16 + PERMUTED[pair / BASE] as u16;
        pair += 1;
    }
    table
}

const fn worth() -> [u64; 6] {
    let mut worth = [0; 6];
    let mut unit = 1u128 << 64;
    let mut index = 0;
    while index < worth.len() {
        unit /= PAIRS as u128;
        worth[index] = unit as u64;
        index += 1;
    }
    worth
}

/// The sequence of one pool, shared by all workers.
#[derive(Debug)]
pub(in crate::balance) struct Sequence {
    phase: u64,
    picks: AtomicU64,
}

impl Default for Sequence {
    /// Starts at a random phase, so that the proxies of a fleet do not pick in step.
    fn default() -> Self {
        Self::with_phase(fastrand::u64(..))
    }
}

impl Sequence {
    fn with_phase(phase: u64) -> Self {
        Self { phase, picks: AtomicU64::new(0) }
    }

    /// The next point.
    #[inline]
    pub(in crate::balance) fn next(&self) -> u64 {
        self.phase.wrapping_add(point(self.picks.fetch_add(1, Relaxed)))
    }
}

/// The point of a pick by its number, from 0. It repeats after 2⁶² picks: a million a second for 146,000
/// years.
#[inline]
fn point(mut number: u64) -> u64 {
    let mut point = 0u64;
    for worth in WORTH {
        point = point.wrapping_add(u64::from(REVERSED[(number % PAIRS as u64) as usize]) * worth);
        number /= PAIRS as u64;
        if number == 0 {
            break;
        }
    }
    point
}

#[cfg(test)]
mod tests {
    use super::super::shares::Shares;
    use super::*;
    use proptest::prelude::*;

    /// The largest deviation of the count of the first `n` points within any interval from `n` × its width.
    /// The phase does not matter: an interval that it wraps around is the complement of one that it does
    /// not.
    fn worst_deviation_by_sorting(n: u32) -> f64 {
        let mut points: Vec<u64> = (0..u64::from(n)).map(point).collect();
        points.sort_unstable();
        let (mut above, mut below) = (0f64, 0f64);
        for (rank, point) in (0u32..).zip(points) {
            let even = f64::from(n) * point as f64 / 2f64.powi(64);
            above = above.max(f64::from(rank + 1) - even);
            below = below.max(even - f64::from(rank));
        }
        above + below
    }

    /// The largest deviation for each `n` up to `most`, by Faure's theorem: a sum over the digits of how
    /// far the points of the permutation deviate (ψ⁺ and ψ⁻ in the paper).
    fn worst_deviations(most: u32) -> impl Iterator<Item = f64> {
        // For each count k of points of the permutation and each border h: how many of the first k are below
        // h.
        let below =
            |k: usize, h: usize| PERMUTED[..k].iter().filter(|digit| usize::from(**digit) < h).count() as f64;
        // Between k/36 and (k+1)/36 each φ is a straight line, given by its value at 0 and its slope.
        let lines: Vec<Vec<(f64, f64)>> = (0..BASE)
            .map(|k| {
                let line = |h: usize| {
                    if h <= usize::from(PERMUTED[k]) {
                        (below(k + 1, h), -(h as f64))
                    } else {
                        (below(k + 1, h) - (k + 1) as f64, (BASE - h) as f64)
                    }
                };
                (0..BASE).map(line).collect()
            })
            .collect();
        let deviation = move |x: f64| {
            let values = lines[((x * BASE as f64) as usize).min(BASE - 1)]
                .iter()
                .map(|(at_0, slope)| at_0 + slope * x);
            let (least, most) =
                values.fold((0f64, 0f64), |(least, most), value| (least.min(value), most.max(value)));
            most - least
        };
        (1..=most).map(move |n| {
            let n = f64::from(n);
            (1..=12).map(|digit| deviation((n / (BASE as f64).powi(digit)).fract())).sum()
        })
    }

    #[test]
    fn the_theorem_agrees_with_counting() {
        for (n, by_theorem) in (1u32..).zip(worst_deviations(1_500)) {
            let counted = worst_deviation_by_sorting(n);
            assert!((by_theorem - counted).abs() < 1e-6, "{n}: {by_theorem} against {counted}");
        }
    }

    #[test]
    fn no_table_deviates_by_more_than_three_and_a_half_sessions_in_a_thousand_picks() {
        let worst = worst_deviations(1_000).fold(0.0, f64::max);
        assert!(worst <= 3.5 && worst > 3.4, "{worst}");
    }

    #[test]
    fn no_table_deviates_by_more_than_six_sessions_in_a_million_picks() {
        let worst = worst_deviations(1_000_000).fold(0.0, f64::max);
        assert!(worst <= 6.0 && worst > 5.7, "{worst}");
    }

    /// The largest deviation of any backend from its exact share within `picks` picks.
    fn worst_deviation(weights: &[f64], sequence: &Sequence, picks: u32) -> f64 {
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

    #[test]
    fn tables_on_which_the_golden_ratio_deviates_farther_stay_within_the_bounds() {
        let thousand = Sequence::with_phase(3_141_294_019_496_022_584);
        assert!(worst_deviation(&[446.559, 553.441], &thousand, 1_000) <= 3.5);
        let million = Sequence::with_phase(3_151_075_642_752_061_505);
        assert!(worst_deviation(&[276.392_814, 723.607_186], &million, 1_000_000) <= 6.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn with_any_table_and_phase_a_thousand_picks_stay_within_the_bound(
            weights in
                prop::collection::vec(prop_oneof![1.0..1000.0, (1u32..10).prop_map(f64::from)], 1..=10),
            phase in any::<u64>(),
        ) {
            let deviation = worst_deviation(&weights, &Sequence::with_phase(phase), 1_000);
            prop_assert!(deviation <= 3.5, "deviated by {deviation}");
        }

        #[test]
        fn from_any_pick_on_a_thousand_stay_within_twice_the_bound(
            weights in prop::collection::vec(1.0..1000.0, 1..=10),
            before in 0u32..100_000,
            phase in any::<u64>(),
        ) {
            let sequence = Sequence::with_phase(phase);
            sequence.picks.store(before.into(), Relaxed);
            let deviation = worst_deviation(&weights, &sequence, 1_000);
            prop_assert!(deviation <= 7.0, "deviated by {deviation}");
        }
    }

    #[test]
    fn workers_that_pick_at_once_share_one_spread() {
        let weights = [5.0, 3.0, 1.0, 0.5];
        let (shares, sequence) = (Shares::new(&weights), Sequence::default());
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
            let deviation = (f64::from(*count) - 100_000.0 * weight / 9.5).abs();
            assert!(deviation <= 6.0, "deviated by {deviation}: {counts:?}");
        }
    }

    #[test]
    fn the_classic_table_five_one_one_is_spread_not_bunched() {
        let shares = Shares::new(&[5.0, 1.0, 1.0]);
        let sequence = Sequence::with_phase(0);
        let picks: Vec<usize> =
            (0..70).map(|_| shares.at(sequence.next()).expect("there are weights")).collect();
        let longest_run = picks.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest_run <= Some(8), "{picks:?}");
    }
}
