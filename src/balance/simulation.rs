//! Shows what a table would do, by letting a pool choose: the code that chooses for sessions runs on a pool
//! that serves none.
//!
//! The simulation takes all backends for healthy and all names for resolved, without slow start. Random
//! numbers come from the caller, so a seed gives the same answer again; only the sequence of
//! `weighted_round_robin` starts at a random phase. `statera weights simulate` prints the result.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use fastrand::Rng;

use crate::balance::backend::{Active, BackendKey};
use crate::balance::pool::Pool;
use crate::balance::snapshot::{Member, Snapshot};
use crate::balance::values::{Address, BackendId, Balance, Policy, Table};

/// Shares are counted at 2 to the power of this many points, at equal distances over `u64`. So a share is
/// exact to a millionth.
const GRID_BITS: u32 = 20;
/// The number of choices in all runs together; the least number of runs may need more.
const MOST_CHOICES: u32 = 4_000_000;
/// With 50 runs the standard deviation is uncertain by a tenth, with 400 by 4 %.
const RUNS: std::ops::RangeInclusive<u32> = 50..=400;
/// 95 of 100 runs are within this many standard deviations of the mean.
const DEVIATIONS: f64 = 1.96;

/// The sessions that are simulated.
#[derive(Clone, Copy, Debug)]
pub struct SimulatedLoad {
    /// The sessions of one run.
    pub sessions: NonZeroU32,
    /// For `least_conn`: the sessions that are active at each moment. As one begins, another one ends,
    /// chosen at random, as sessions of exponential length do on backends of one speed.
    pub active: NonZeroU32,
}

/// What one backend would get.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// The name of the backend.
    pub id: BackendId,
    /// The backend's part of the sessions, 0 to 1.
    pub share: f64,
    /// The backend gets at least this many sessions in all but one of 40 runs.
    pub least: u32,
    /// The backend gets at most this many sessions in all but one of 40 runs.
    pub most: u32,
}

/// A pool with one table.
#[derive(Debug)]
pub struct Simulation {
    pool: Pool,
    balance: Balance,
}

impl Simulation {
    /// A pool as a proxy with this policy would have it.
    #[must_use]
    pub fn new(policy: impl Into<Policy>, table: Table) -> Self {
        let policy = policy.into();
        let pool = Pool::new("simulated".into(), policy, table, None, 1);
        // A name needs an address to be chosen. The simulation does not connect to it.
        let anywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        for member in pool.cell.load().members() {
            if matches!(member.backend.id().address(), Address::Name { .. }) {
                member.backend.set_resolved(vec![anywhere]);
            }
        }
        pool.cell.refresh();
        Self { pool, balance: policy.balance }
    }

    /// The number of runs: 4 million choices divided by `sessions`, but at least 50 and at most 400.
    #[must_use]
    pub fn runs(sessions: NonZeroU32) -> u32 {
        (MOST_CHOICES / sessions).clamp(*RUNS.start(), *RUNS.end())
    }

    /// What each backend would get, sorted by name. If no weight is above 0, all shares are 0: such a pool
    /// refuses sessions.
    ///
    /// # Cost
    /// About 5 million choices, or 50 runs if those are more: less than a second up to 100,000 sessions.
    #[must_use]
    pub fn forecast(&self, load: SimulatedLoad, rng: &mut Rng) -> Vec<Forecast> {
        let snapshot = Arc::clone(&self.pool.cell.load());
        let mut indices: HashMap<BackendKey, usize> = HashMap::new();
        indices.extend(
            snapshot.members().iter().enumerate().map(|(index, member)| (member.backend.key(), index)),
        );
        let index = |member: &Member| indices[&member.backend.key()];

        let runs = Self::runs(load.sessions);
        let mut tallies = vec![Tally::default(); snapshot.members().len()];
        let mut active = Vec::new();
        if self.balance == Balance::LeastConn {
            // Twice as many as are active, so that most of the first ones, which came to an empty pool, have
            // ended.
            for _ in 0..2 * u64::from(load.active.get()) {
                self.session(&snapshot, load, &mut active, rng);
            }
        }
        for _ in 0..runs {
            for _ in 0..load.sessions.get() {
                if let Some(member) = self.session(&snapshot, load, &mut active, rng) {
                    tallies[index(member)].run += 1;
                }
            }
            tallies.iter_mut().for_each(Tally::end_run);
        }

        let of_grid = self.is_a_function_of_the_point().then(|| {
            let mut hits = vec![0u32; tallies.len()];
            for point in grid() {
                if let Some(member) = self.pool.choose(&snapshot, &[], point) {
                    hits[index(member)] += 1;
                }
            }
            hits
        });
        let mut forecasts: Vec<Forecast> = (snapshot.members().iter().zip(&tallies).enumerate())
            .map(|(index, (member, tally))| {
                let (mean, deviation) = tally.mean_and_deviation(runs);
                let share = match &of_grid {
                    Some(hits) => f64::from(hits[index]) / f64::from(1u32 << GRID_BITS),
                    None => mean / f64::from(load.sessions.get()),
                };
                let expected = share * f64::from(load.sessions.get());
                Forecast {
                    id: member.backend.id().clone(),
                    share,
                    least: (expected - DEVIATIONS * deviation).floor().max(0.0) as u32,
                    most: (expected + DEVIATIONS * deviation).ceil() as u32,
                }
            })
            .collect();
        forecasts.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        forecasts
    }

    /// The part of the clients that `other` would send to another backend, 0 to 1. `None`: the balance of
    /// one of the two is not `source_hash`.
    #[must_use]
    pub fn moved_clients(&self, other: &Self) -> Option<f64> {
        if self.balance != Balance::SourceHash || other.balance != Balance::SourceHash {
            return None;
        }
        let (here, there) = (self.pool.cell.load(), other.pool.cell.load());
        let moved = grid().filter(|&point| {
            let id = |pool: &Pool, snapshot: &Snapshot| {
                pool.choose(snapshot, &[], point).map(|member| member.backend.id().clone())
            };
            id(&self.pool, &here) != id(&other.pool, &there)
        });
        Some(moved.count() as f64 / f64::from(1u32 << GRID_BITS))
    }

    /// True if the choice depends on the point alone, and not on the sessions before. Then shares are
    /// counted over the grid, since random points and the hashes of clients are evenly distributed.
    fn is_a_function_of_the_point(&self) -> bool {
        matches!(self.balance, Balance::WeightedRandom | Balance::SourceHash)
    }

    /// The next session, of a new client.
    fn session<'a>(
        &self,
        snapshot: &'a Snapshot,
        load: SimulatedLoad,
        active: &mut Vec<Active>,
        rng: &mut Rng,
    ) -> Option<&'a Member> {
        let client = IpAddr::from(Ipv4Addr::from_bits(rng.u32(..)));
        let member = self.pool.choose(snapshot, &[], self.pool.point(client, rng.u64(..)))?;
        if self.balance == Balance::LeastConn {
            if active.len() >= load.active.get() as usize {
                active.swap_remove(rng.usize(..active.len()));
            }
            active.extend(Active::take(&member.backend));
        }
        Some(member)
    }
}

/// The middles of 2^[`GRID_BITS`] equal intervals.
fn grid() -> impl Iterator<Item = u64> {
    let width = 1u64 << (u64::BITS - GRID_BITS);
    (0..1u64 << GRID_BITS).map(move |index| index * width + width / 2)
}

/// The sessions of one backend, run by run.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    run: u32,
    sum: u64,
    /// The sum of squares; 400 runs of 2³² sessions fit.
    squares: u128,
}

impl Tally {
    fn end_run(&mut self) {
        self.sum += u64::from(self.run);
        self.squares += u128::from(self.run).pow(2);
        self.run = 0;
    }

    fn mean_and_deviation(&self, runs: u32) -> (f64, f64) {
        let mean = self.sum as f64 / f64::from(runs);
        // Computed in integers: as the difference of two large sums, it would be inexact in `f64`.
        let difference = u128::from(runs) * self.squares - u128::from(self.sum).pow(2);
        (mean, (difference as f64).sqrt() / f64::from(runs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::values::Weight;

    const SESSIONS: u32 = 2_000;

    fn table(weights: &[f64]) -> Table {
        let member = |(i, weight): (usize, &f64)| {
            let id = format!("10.0.0.{i}:80").parse().expect("an address");
            (id, Weight::new(*weight).expect("a weight"))
        };
        Table::new(weights.iter().enumerate().map(member).collect())
    }

    fn load(active: u32) -> SimulatedLoad {
        let number = |number| NonZeroU32::new(number).expect("not zero");
        SimulatedLoad { sessions: number(SESSIONS), active: number(active) }
    }

    fn forecast(balance: Balance, weights: &[f64]) -> Vec<Forecast> {
        Simulation::new(balance, table(weights)).forecast(load(900), &mut Rng::with_seed(7))
    }

    #[test]
    fn shares_follow_the_weights_and_the_range_is_as_wide_as_the_balance_makes_it() {
        let weights = [0.0, 100.0, 300.0, 50.0];
        for (_, balance) in Balance::NAMES {
            let forecasts = forecast(balance, &weights);
            for (forecast, weight) in forecasts.iter().zip(weights) {
                let share = weight / 450.0;
                // For `least_conn`, the active sessions at the begin and the end of a run make a difference.
                let exact = if balance == Balance::LeastConn { 0.01 } else { 1e-4 };
                assert!((forecast.share - share).abs() < exact, "{balance:?}: {forecast:?}: {share}");
                let binomial = (f64::from(SESSIONS) * share * (1.0 - share)).sqrt();
                let width = f64::from(forecast.most - forecast.least) / (2.0 * DEVIATIONS);
                let fits = match balance {
                    Balance::WeightedRandom | Balance::SourceHash => {
                        (0.8 * binomial - 1.0..=1.2 * binomial + 1.0).contains(&width)
                    }
                    // The sequence deviates by at most 3.5 sessions from its start on, and by at most 7
                    // from any later pick on.
                    Balance::WeightedRoundRobin => width <= 4.0,
                    // The more sessions stay, the less the new ones can even out.
                    Balance::LeastConn => width <= 1.2 * binomial + 1.0,
                };
                assert!(fits, "{balance:?}: {forecast:?}: {width} where a coin has {binomial}");
            }
            let named: Vec<&str> = forecasts.iter().map(|forecast| forecast.id.as_str()).collect();
            assert_eq!(named, ["10.0.0.0:80", "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
        }
    }

    /// Shares that are computed from the weights alone would not show this.
    #[test]
    fn with_few_active_sessions_least_conn_prefers_the_heavier_one() {
        let simulation = Simulation::new(Balance::LeastConn, table(&[100.0, 300.0]));
        let shares = |active| {
            let forecasts = simulation.forecast(load(active), &mut Rng::with_seed(7));
            forecasts.iter().map(|forecast| forecast.share).collect::<Vec<_>>()
        };
        assert!(shares(1)[0] < 0.15, "{:?}", shares(1));
        assert!((shares(1_000)[0] - 0.25).abs() < 0.01, "{:?}", shares(1_000));
        let active: u32 = simulation.pool.cell.load().members().iter().map(|m| m.backend.active()).sum();
        assert_eq!(active, 0, "all end with the forecast");
    }

    #[test]
    fn shares_of_huge_and_of_tiny_weights_are_numbers() {
        for (_, balance) in Balance::NAMES {
            for weight in [1.7e308, 5e-324] {
                let forecasts = forecast(balance, &[weight; 4]);
                let near = |forecast: &Forecast| (forecast.share - 0.25).abs() < 0.02;
                assert!(forecasts.iter().all(near), "{balance:?}: {weight}: {forecasts:?}");
            }
            let forecasts = forecast(balance, &[5e-324, 1.7e308]);
            assert!(forecasts[0].share < 1e-3, "{balance:?}: {forecasts:?}");
        }
    }

    #[test]
    fn without_any_weight_no_backend_gets_sessions() {
        for (_, balance) in Balance::NAMES {
            for forecast in forecast(balance, &[0.0, 0.0]) {
                assert_eq!((forecast.share, forecast.least, forecast.most), (0.0, 0, 0), "{balance:?}");
            }
        }
    }

    #[test]
    fn an_unresolved_name_gets_its_share() {
        let members = ["db.internal:80", "10.0.0.1:80"]
            .map(|id| (id.parse().expect("an address"), Weight::new(1.0).expect("a weight")));
        let simulation = Simulation::new(Balance::WeightedRandom, Table::new(members.into()));
        let forecasts = simulation.forecast(load(1), &mut Rng::with_seed(7));
        assert!(forecasts.iter().all(|forecast| (forecast.share - 0.5).abs() < 1e-5), "{forecasts:?}");
    }

    #[test]
    fn clients_that_move_are_counted() {
        let of = |balance, weights: &[f64]| Simulation::new(balance, table(weights));
        let before = of(Balance::SourceHash, &[1.0; 10]);
        let after = of(Balance::SourceHash, &[1.0; 9]);
        let moved = before.moved_clients(&after).expect("clients have backends");
        assert!((0.0999..0.12).contains(&moved), "{moved}");
        assert_eq!(before.moved_clients(&before), Some(0.0));
        assert_eq!(of(Balance::LeastConn, &[1.0]).moved_clients(&of(Balance::LeastConn, &[2.0])), None);
    }
}
