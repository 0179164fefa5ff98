//! Finds the backend with the fewest active sessions for its weight.
//!
//! Up to [`EXACT_MAX`] backends, each is looked at, so the choice is the least of all. In larger pools it is the least of
//! [`DRAWS`] that are drawn by weight. Backends that would refuse the session (full, or ejected with a probe under way) are
//! skipped in both cases.
//!
//! The count of a backend is of all workers, and is taken with the choice (`places.rs`), before the session connects. Workers
//! that choose at the same moment may still see the same counts: a backend is chosen at most as many times too often as there
//! are workers.
//!
//! No allocation and no lock. Shares and ties come from `shares.rs`.

use super::BackendId;
use super::maglev::mix;
use super::member::{Member, Probing};
use super::shares::Shares;

/// So many fit into one word of marks. Each costs a read of its count, which another worker may have changed.
const EXACT_MAX: usize = 64;

/// The choice in larger pools. With 2, 4, 6 and 8 of them the busiest of 100 backends, each with 50 sessions in the mean, has 1.06,
/// 1.03, 1.02 and 1.02 times the mean; each draw is a look into memory that is most often not in the cache.
const DRAWS: usize = 6;

/// Keeps the load of a backend with a tiny weight finite: a load is at most 2³² sessions times this.
const COST_MAX: f64 = f64::MAX / (1u64 << 33) as f64;

/// What one more session costs each backend that may be picked: the largest weight divided by its own.
#[derive(Debug)]
pub(super) struct LeastConn {
    costs: Box<[f64]>,
}

impl LeastConn {
    /// `weights` are finite and > 0, in the order of the members that are passed to [`LeastConn::pick`].
    pub(super) fn new(weights: impl Iterator<Item = f64> + Clone) -> Self {
        let largest = weights.clone().fold(0.0, f64::max);
        Self { costs: weights.map(|weight| (largest / weight).min(COST_MAX)).collect() }
    }

    /// The index of the backend to take, leaving out those in `tried`; ties are broken by weight, with `point` as the random
    /// number. `members` and `shares` are those that this was made from. `None`: none is left that would take a session.
    #[inline]
    pub(super) fn pick(
        &self,
        members: &[Member],
        shares: &Shares,
        point: u64,
        tried: &[BackendId],
    ) -> Option<usize> {
        if self.costs.len() <= EXACT_MAX {
            self.least_of_all(members, shares, point, tried)
        } else {
            self.least_of_some(members, shares, point, tried)
        }
    }

    fn least_of_all(
        &self,
        members: &[Member],
        shares: &Shares,
        point: u64,
        tried: &[BackendId],
    ) -> Option<usize> {
        // All that have the least load so far, a bit each.
        let (mut least, mut ties) = (f64::INFINITY, 0u64);
        for (index, (member, cost)) in members.iter().zip(&self.costs).enumerate() {
            let Some(load) = load_of(member, *cost, tried) else { continue };
            let bit = 1u64 << index;
            if load < least {
                (least, ties) = (load, bit);
            } else if load == least {
                ties |= bit;
            }
        }
        if ties == 0 {
            return None;
        }
        if ties.is_power_of_two() {
            return Some(ties.trailing_zeros() as usize);
        }
        Some(shares.at_among(point, ties))
    }

    /// Draws the same backend twice rather than looking whether it was drawn: that only makes the choice one draw poorer.
    fn least_of_some(
        &self,
        members: &[Member],
        shares: &Shares,
        point: u64,
        tried: &[BackendId],
    ) -> Option<usize> {
        let mut chosen: Option<(f64, usize)> = None;
        let (mut drawn, mut next) = (point, mix(!point));
        for _ in 0..DRAWS {
            if let Some(index) = shares.at(drawn)
                && let Some(load) = load_of(&members[index], self.costs[index], tried)
                && chosen.is_none_or(|(least, _)| load < least)
            {
                chosen = Some((load, index));
            }
            // Not from `point` itself: what is drawn after a refusal (`places.rs`) goes that way.
            (drawn, next) = (next, mix(next));
        }
        chosen.map(|(_, index)| index)
    }
}

/// With the session that is to come, else the lighter ones would get the first sessions like the heavy ones. `None`: the backend
/// was tried, or would refuse the session.
#[inline]
fn load_of(member: &Member, cost: f64, tried: &[BackendId]) -> Option<f64> {
    let active = member.backend.places().active_unless_full()?;
    let is_probed = member.probing == Probing::Alone && member.backend.is_probed();
    if is_probed || !tried.is_empty() && tried.contains(member.backend.id()) {
        return None;
    }
    Some((f64::from(active) + 1.0) * cost)
}

#[cfg(test)]
mod tests;
