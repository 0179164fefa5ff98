//! Finds the backend with the fewest active sessions for its weight.
//!
//! With up to [`EXACT_MAX`] backends each one is looked at, so the choice is the least loaded of all. In
//! larger pools it is the least loaded of [`DRAWS`] that are drawn by weight. Backends that would refuse the
//! session (all slots taken, or a trial session under way) are skipped in both cases.
//!
//! The session count of a backend includes the sessions of all workers. A session takes its slot right
//! after the choice (`pool/take.rs`), before it connects. Workers that choose at the same moment may still
//! see the same counts, so a backend may get too many sessions: at most as many as there are workers.
//!
//! A choice makes no allocation and takes no lock. `shares.rs` draws backends and breaks ties, by weight.

use super::maglev::mix;
use super::member::{Member, TrialMode};
use super::shares::Shares;
use crate::balance::values::BackendId;

/// Up to this many backends, each one is looked at. Backends with equal loads are the bits of one `u64`.
/// Each backend costs a read of its session count, which may be in another core's cache.
const EXACT_MAX: usize = 64;

/// The number of loads that are computed before they are compared with the least. Divides [`EXACT_MAX`].
const BLOCK: usize = 8;

/// The number of draws in larger pools. With 2, 4, 6 and 8 draws the busiest of 100 backends, with 50
/// sessions each on average, has 1.06, 1.03, 1.02 and 1.02 times the mean. Each draw reads memory that is
/// rarely in the cache.
const DRAWS: usize = 4;

/// Keeps the load of a backend with a tiny weight finite: a load is at most 2³² sessions times this.
const COST_MAX: f64 = f64::MAX / (1u64 << 33) as f64;

/// The cost of one more session at each backend that may be picked: the largest weight divided by its own.
#[derive(Debug)]
pub(in crate::balance) struct LeastConn {
    costs: Box<[f64]>,
    /// No backend has a limit or is on trial, so no session will be refused.
    none_refuses: bool,
}

impl LeastConn {
    /// Computes the costs of `members`, whose effective weights are > 0.
    pub(in crate::balance) fn new(members: &[Member]) -> Self {
        let weights = || members.iter().map(|member| member.effective_weight.get());
        let largest = weights().fold(0.0, f64::max);
        let may_refuse =
            |member: &Member| member.trial == TrialMode::Alone || member.backend.slots().has_limit();
        Self {
            costs: weights().map(|weight| (largest / weight).min(COST_MAX)).collect(),
            none_refuses: !members.iter().any(may_refuse),
        }
    }

    /// Returns the index of the backend to take, leaving out those in `tried`. Ties are broken by weight,
    /// with `point` as the random number. `members` begins with the members that [`LeastConn::new`] got,
    /// and `shares` has their intervals. `None`: each backend that was looked at is in `tried` or would
    /// refuse.
    #[inline]
    pub(in crate::balance) fn pick(
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
        let ties = if self.none_refuses && tried.is_empty() {
            self.least_loaded(members, |member, cost| load(member.backend.slots().active(), cost))
        } else {
            self.least_loaded(members, |member, cost| load_of(member, cost, tried).unwrap_or(f64::INFINITY))
        };
        if ties == 0 {
            return None;
        }
        if ties.is_power_of_two() {
            return Some(ties.trailing_zeros() as usize);
        }
        Some(shares.at_among(point, ties))
    }

    /// The backends with the least load, one bit each. No bit is set if each load is infinite.
    ///
    /// The loads of a block are computed without a branch. A branch on each load would be mispredicted
    /// whenever the least changes, and the reads of the next counts would start late.
    #[inline]
    fn least_loaded(&self, members: &[Member], load: impl Fn(&Member, f64) -> f64) -> u64 {
        let mut least = Least { load: f64::INFINITY, ties: 0 };
        let (blocks, rest) = members[..self.costs.len()].as_chunks::<BLOCK>();
        let (block_costs, rest_costs) = self.costs.as_chunks::<BLOCK>();
        let mut first = 0;
        for (block, costs) in blocks.iter().zip(block_costs) {
            let mut loads = [f64::INFINITY; BLOCK];
            for ((one, member), cost) in loads.iter_mut().zip(block).zip(costs) {
                *one = load(member, *cost);
            }
            least.look(&loads, first);
            first += BLOCK;
        }
        if !rest.is_empty() {
            let mut loads = [f64::INFINITY; BLOCK];
            for ((one, member), cost) in loads.iter_mut().zip(rest).zip(rest_costs) {
                *one = load(member, *cost);
            }
            least.look(&loads, first);
        }
        if least.load.is_finite() { least.ties } else { 0 }
    }

    /// Returns the least loaded of [`DRAWS`] backends that are drawn by weight. A backend may be drawn
    /// twice: a check for that would cost more than the wasted draw.
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
            // The further draws derive from `!point`, since `pool/take.rs` derives its draws from `point`.
            (drawn, next) = (next, mix(next));
        }
        chosen.map(|(_, index)| index)
    }
}

/// The least load so far.
struct Least {
    load: f64,
    /// The backends with that load, one bit each.
    ties: u64,
}

impl Least {
    /// Takes in the loads of the backends from `first` on.
    #[inline]
    fn look(&mut self, loads: &[f64; BLOCK], first: usize) {
        // Not `f64::min`, which takes more instructions for NaN: no load is NaN.
        let smaller = |a: f64, b: f64| if a < b { a } else { b };
        let [a, b, c, d, e, f, g, h] = *loads;
        let low = smaller(smaller(a, b), smaller(c, d));
        let high = smaller(smaller(e, f), smaller(g, h));
        let load = smaller(low, high);
        if load > self.load {
            return;
        }
        if load < self.load {
            *self = Self { load, ties: 0 };
        }
        for (index, one) in loads.iter().enumerate() {
            self.ties |= u64::from(*one == load) << (first + index);
        }
    }
}

/// Returns the load of a backend, including the session that is to come. Without that session, a light
/// backend with no sessions would always come before a heavy one with a single session.
#[inline]
fn load(active: u32, cost: f64) -> f64 {
    (f64::from(active) + 1.0) * cost
}

/// Returns the load of a backend. `None`: the backend was tried, or would refuse the session.
#[inline]
fn load_of(member: &Member, cost: f64, tried: &[BackendId]) -> Option<f64> {
    let active = member.backend.slots().active_unless_full()?;
    let has_trial_session = member.trial == TrialMode::Alone && member.backend.has_trial_session();
    if has_trial_session || !tried.is_empty() && tried.contains(member.backend.id()) {
        return None;
    }
    Some(load(active, cost))
}

#[cfg(test)]
mod tests;
