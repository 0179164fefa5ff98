//! The weight of a backend, checked.

use std::fmt;

/// A finite number ≥ 0. A backend's share of new sessions is its weight ÷ the sum of the pool's weights.
///
/// Zero means: no new sessions, existing ones are kept.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Weight(f64);

/// A number that cannot be a weight.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{0} is not a weight: a finite number of at least 0 is needed")]
pub struct InvalidWeight(pub f64);

impl Weight {
    /// The weight that asks for no new sessions.
    pub const ZERO: Self = Self(0.0);

    /// Makes a weight of `value`.
    ///
    /// # Errors
    /// `value` is negative, infinite or NaN.
    pub fn new(value: f64) -> Result<Self, InvalidWeight> {
        if value.is_finite() && value >= 0.0 {
            // `-0.0 >= 0.0` is true. Adding 0.0 turns -0.0 into 0.0, which prints as "0".
            Ok(Self(value + 0.0))
        } else {
            Err(InvalidWeight(value))
        }
    }

    /// The plain number.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }

    /// Returns the weight times `factor`, which is above 0 and at most 1. Only a weight of zero gives zero.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        if self.is_zero() { self } else { Self((self.0 * factor).max(f64::from_bits(1))) }
    }

    /// True when this weight asks for no new sessions.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == 0.0
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_weight_is_a_weight() {
        let scaled = |weight| Weight::new(weight).expect("a weight").scaled(0.1).get();
        assert_eq!((scaled(50.0), scaled(0.0)), (5.0, 0.0));
        assert!(scaled(f64::from_bits(1)) > 0.0);
    }

    #[test]
    fn only_finite_numbers_from_zero_up_are_weights() {
        for good in [0.0, -0.0, 0.5, 5e-324, 1e308] {
            assert_eq!(Weight::new(good).map(Weight::get), Ok(good.abs()));
        }
        for bad in [-1.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            assert!(Weight::new(bad).is_err(), "{bad} was accepted");
        }
        assert_eq!(Weight::new(-0.0).expect("zero is a weight").to_string(), "0");
    }
}
