//! Weights as intervals of the numbers from 0 to 2⁶⁴. A point is one of these numbers. Its backend is the
//! one whose interval contains the point.
//!
//! A lookup costs the same with 10 and with 10,000 backends. The lookup table (Chen and Asau, 1974) gives
//! the first interval to search, by the top bits of the point. It has at least as many cells as there are
//! backends, so on average less than one step is left. An alias table would be as fast, but it scatters a
//! backend over many intervals, and the even spread of `sequence.rs` needs one interval for each backend.

/// The intervals of one set of weights. Built once, then only read.
#[derive(Debug, Default)]
pub(in crate::balance) struct Shares {
    /// The end (exclusive) of each interval; the last is `u64::MAX`.
    ends: Box<[u64]>,
    /// The lookup table: for each cell of `2^shift` points, the first interval that ends beyond the start of
    /// the cell.
    lookup: Box<[u32]>,
    shift: u32,
}

/// With more candidates than this, a binary search is cheaper than a walk.
const WALK_MAX: usize = 8;

impl Shares {
    /// Makes the intervals of `weights`, which are finite and > 0, and at most `u32::MAX` in number.
    pub(in crate::balance) fn new(weights: &[f64]) -> Self {
        if weights.is_empty() {
            return Self::default();
        }
        // Dividing by the largest first keeps a sum of huge weights finite.
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let total: f64 = weights.iter().map(|weight| weight / largest).sum();
        let mut sum = 0.0;
        let mut ends: Box<[u64]> = weights
            .iter()
            .map(|weight| {
                sum += weight / largest;
                // The cast saturates, so rounding cannot wrap around.
                (sum / total * 2f64.powi(64)) as u64
            })
            .collect();
        if let Some(last) = ends.last_mut() {
            *last = u64::MAX;
        }

        let cells = weights.len().next_power_of_two().max(2);
        let shift = 64 - cells.trailing_zeros();
        let mut index = 0;
        let lookup = (0..cells as u64)
            .map(|cell| {
                while ends[index] <= cell << shift {
                    index += 1;
                }
                index as u32
            })
            .collect();
        Self { ends, lookup, shift }
    }

    /// The interval that holds `point`. `None`: there are no intervals.
    #[inline]
    pub(in crate::balance) fn at(&self, point: u64) -> Option<usize> {
        let cell = (point >> self.shift) as usize;
        let mut index = *self.lookup.get(cell)? as usize;
        let last = match self.lookup.get(cell + 1) {
            Some(&next) => next as usize,
            None => self.ends.len() - 1,
        };
        if last - index > WALK_MAX {
            let within = &self.ends[index..last];
            return Some(index + within.partition_point(|&end| end <= point));
        }
        while index < last && self.ends[index] <= point {
            index += 1;
        }
        Some(index)
    }

    /// Chooses one of the intervals whose bit in `among` is set, by `point` and in proportion to their
    /// widths. Bit `i` means interval `i`. At least one bit is set, and none beyond the last interval.
    #[inline]
    pub(in crate::balance) fn at_among(&self, point: u64, among: u64) -> usize {
        let width = |i: usize| self.ends[i] - if i == 0 { 0 } else { self.ends[i - 1] };
        // The sum is at most the width of all intervals, which fits into a `u64`.
        let total: u64 = set_bits(among).map(width).sum();
        let mut target = ((u128::from(point) * u128::from(total)) >> 64) as u64;
        for i in set_bits(among) {
            if target < width(i) {
                return i;
            }
            target -= width(i);
        }
        // All are too narrow to hold a point: any of them will do.
        among.trailing_zeros() as usize
    }

    /// Chooses one of the intervals for which `excluded` is false, by `point` and in proportion to their
    /// widths. `None`: no such interval. Visits all intervals, so it is only for retries.
    pub(in crate::balance) fn at_excluding(
        &self,
        point: u64,
        excluded: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let width = |i: usize| u128::from(self.ends[i] - if i == 0 { 0 } else { self.ends[i - 1] });
        let open = || (0..self.ends.len()).filter(|&i| width(i) > 0 && !excluded(i));
        let total: u128 = open().map(width).sum();
        let mut target = (u128::from(point) * total) >> 64;
        for i in open() {
            if target < width(i) {
                return Some(i);
            }
            target -= width(i);
        }
        None
    }
}

/// The positions of the set bits, the lowest first.
fn set_bits(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(lowest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_definition(shares: &Shares, point: u64) -> usize {
        shares.ends.iter().position(|&end| point < end).unwrap_or(shares.ends.len() - 1)
    }

    fn weights() -> impl Strategy<Value = Vec<f64>> {
        let weight = prop_oneof![0.001..1000.0, Just(1.0), Just(5e-324), Just(1e308), 1e-9..1e9];
        prop::collection::vec(weight, 1..200)
    }

    proptest! {
        #[test]
        fn the_lookup_table_agrees_with_the_definition(
            weights in weights(), points in prop::collection::vec(any::<u64>(), 50)
        ) {
            let shares = Shares::new(&weights);
            for point in points.into_iter().chain([0, 1, u64::MAX]).chain(shares.ends.iter().copied()) {
                prop_assert_eq!(shares.at(point), Some(by_definition(&shares, point)), "point {}", point);
            }
        }

        #[test]
        fn each_interval_is_as_wide_as_its_share(weights in prop::collection::vec(0.001..1000.0, 1..200)) {
            let shares = Shares::new(&weights);
            let total: f64 = weights.iter().sum();
            let mut start = 0;
            for (weight, &end) in weights.iter().zip(&shares.ends) {
                prop_assert!(((end - start) as f64 / 2f64.powi(64) - weight / total).abs() < 1e-12);
                start = end;
            }
        }

        #[test]
        fn an_excluded_backend_is_never_named_and_the_others_keep_their_proportions(
            weights in prop::collection::vec(0.5..100.0, 2..20), out in 0usize..20, point in any::<u64>()
        ) {
            let out = out % weights.len();
            let shares = Shares::new(&weights);
            let named = shares.at_excluding(point, |i| i == out);
            prop_assert!(named.is_some() && named != Some(out));
            // The same point among intervals that are made without the excluded weight names the same
            // backend, except for rounding at the borders.
            let rest: Vec<f64> = (0..weights.len()).filter(|&i| i != out).map(|i| weights[i]).collect();
            let alone = Shares::new(&rest);
            let back = |i: usize| if i < out { i } else { i + 1 };
            let near_border = alone.ends.iter().any(|&end| end.abs_diff(point) < 1 << 16);
            prop_assert!(near_border || named == alone.at(point).map(back));
        }
    }

    #[test]
    fn without_intervals_no_backend_is_named() {
        assert_eq!(Shares::new(&[]).at(0), None);
        assert_eq!(Shares::new(&[]).at_excluding(0, |_| false), None);
        assert_eq!(Shares::new(&[1.0, 2.0]).at_excluding(7, |_| true), None);
    }

    #[test]
    fn a_weight_too_small_for_a_single_point_is_never_named() {
        let shares = Shares::new(&[1.0, 1e-300, 1.0]);
        assert_eq!((shares.at(0), shares.at(1 << 63), shares.at(u64::MAX)), (Some(0), Some(2), Some(2)));
        assert_eq!(shares.at_excluding(0, |i| i != 1), None);
    }
}
