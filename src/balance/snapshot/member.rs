//! Computes effective weights: weight × admin state × health × slow start. No other file does.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::balance::backend::{Backend, BackendKey, Registry};
use crate::balance::values::{AdminState, BackendId, Policy, Table, Weight};

/// One backend of a snapshot.
#[derive(Clone, Debug)]
pub struct Member {
    /// The backend.
    pub backend: Arc<Backend>,
    /// The weight in the table.
    pub weight: Weight,
    /// The weight that picks use. It is 0 while the backend is not ready or is unresolved, and while it is
    /// unhealthy or ejected, unless the pool fails open. It is a part of `weight` in a slow start.
    pub effective_weight: Weight,
    /// The admin state. The effective weight is 0 unless the state is `Ready`.
    pub state: AdminState,
    /// Whether the backend gets a trial session.
    pub trial: TrialMode,
}

/// Whether a backend gets a trial session after its ejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrialMode {
    /// No trial session.
    No,
    /// The trial session and no others.
    Alone,
    /// The trial session, and others too, since health is ignored. Without a trial session, a pool whose
    /// backends are all ejected would never have a healthy one again.
    AmongOthers,
}

impl Member {
    /// True if the table gives the backend a weight and has it as ready.
    #[must_use]
    pub fn wants_sessions(&self) -> bool {
        !self.weight.is_zero() && self.state == AdminState::Ready
    }
}

/// What [`weigh`] found out about the pool.
pub(in crate::balance) struct Weighed {
    /// Health is ignored, since too little of the weight is on healthy backends.
    pub(in crate::balance) fails_open: bool,
    /// A backend is in its slow start.
    pub(in crate::balance) ramps: bool,
}

/// The members of `table`, without effective weights yet.
pub(in crate::balance) fn known(table: &Table, registry: &Registry) -> Box<[Member]> {
    registry.forget_old(Instant::now());
    let member = |(id, weight): &(BackendId, Weight)| Member {
        backend: registry.get_or_create(id),
        weight: *weight,
        effective_weight: Weight::ZERO,
        state: table.state(id),
        trial: TrialMode::No,
    };
    table.members().iter().map(member).collect()
}

/// Sets the effective weight of each member.
pub(in crate::balance) fn weigh(members: &mut [Member], policy: &Policy) -> Weighed {
    let fails_open = fails_open(members, policy);
    let mut ramps = false;
    let now = Instant::now();
    for member in members {
        let condition = &member.backend.condition;
        member.trial = match member.backend.is_on_trial() {
            true if fails_open => TrialMode::AmongOthers,
            true => TrialMode::Alone,
            false => TrialMode::No,
        };
        member.effective_weight = Weight::ZERO;
        let is_picked = fails_open || member.backend.is_usable() || member.trial == TrialMode::Alone;
        if !is_picked || !member.wants_sessions() || !member.backend.is_reachable() {
            continue;
        }
        let ramp = condition.ramp(policy.slow_start, now);
        ramps |= ramp < 1.0;
        member.effective_weight = member.weight.scaled(ramp);
    }
    Weighed { fails_open, ramps }
}

/// True if health is to be ignored. False if no ready and reachable backend has a weight.
fn fails_open(members: &[Member], policy: &Policy) -> bool {
    let in_use = || members.iter().filter(|member| member.wants_sessions() && member.backend.is_reachable());
    let largest = in_use().map(|member| member.weight.get()).fold(0.0, f64::max);
    // Weights are divided by the largest, so that the sum of huge ones stays finite and that of tiny ones is
    // not rounded to 0. A tiny weight beside a huge one may still be rounded away, so the sum does not tell
    // whether any backend is healthy.
    let (mut healthy, mut all, mut any_healthy) = (0.0, 0.0, false);
    for member in in_use() {
        let part = member.weight.get() / largest;
        all += part;
        if member.backend.is_usable() {
            healthy += part;
            any_healthy = true;
        }
    }
    all > 0.0 && (!any_healthy || healthy < policy.fail_open * all)
}

/// Begins the slow start of the backends that were not members `before`, or were not ready. A backend that
/// left a short time ago and returns continues its slow start.
///
/// A backend starts slowly only if another backend can carry its part: a usable one that joined or
/// recovered at least `slow_start` ago. Without such a backend, all have their whole weight at once, and
/// slow starts that have begun end. So no backend of a new pool starts slowly, even if its table is
/// written one member after the other.
pub(in crate::balance) fn begin_ramps(
    before: &[Member],
    members: &[Member],
    slow_start: Duration,
    registry: &Registry,
) {
    let is_ready = |member: &&Member| member.state == AdminState::Ready;
    let before: HashSet<BackendKey> =
        before.iter().filter(is_ready).map(|member| member.backend.key()).collect();
    let is_new =
        |member: &Member| !before.contains(&member.backend.key()) && !registry.left_ready(&member.backend);
    let now = Instant::now();
    let can_spare = |member: &Member| {
        member.wants_sessions()
            && member.backend.is_reachable()
            && member.backend.is_usable()
            && member.backend.condition.is_settled(slow_start, now)
            && !is_new(member)
    };
    let starts_slowly = members.iter().any(can_spare);
    for member in members.iter().filter(is_ready) {
        let condition = &member.backend.condition;
        match (is_new(member), starts_slowly) {
            (true, true) => condition.begin_ramp(now),
            (true, false) => condition.begin_whole(now),
            (false, true) => {}
            (false, false) => condition.end_ramp(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::{Origin, Snapshot};
    use super::*;
    use crate::balance::backend::Health;
    use crate::balance::values::Balance;

    fn table(weights: &[(u8, f64)]) -> Table {
        let member = |(n, weight): &(u8, f64)| {
            let id = format!("10.0.0.{n}:80").parse().expect("an address");
            (id, Weight::new(*weight).expect("a weight"))
        };
        Table::new(weights.iter().map(member).collect())
    }

    /// The effective weights, sorted by the last number of the address.
    fn effective(snapshot: &Snapshot) -> Vec<(String, f64)> {
        let weight = |m: &Member| (m.backend.id().as_str()[7..8].to_owned(), m.effective_weight.get());
        let mut weights: Vec<_> = snapshot.members().iter().map(weight).collect();
        weights.sort_by(|a, b| a.0.cmp(&b.0));
        weights
    }

    fn weights(snapshot: &Snapshot) -> Vec<f64> {
        effective(snapshot).into_iter().map(|(_, weight)| weight).collect()
    }

    fn set_health(registry: &Registry, n: u8, health: Health) {
        let id = format!("10.0.0.{n}:80").parse().expect("an address");
        registry.get_or_create(&id).condition.set_health(health);
    }

    #[test]
    fn health_counts_until_too_little_weight_is_left() {
        let (registry, table) = (Registry::new(1), table(&[(1, 60.0), (2, 30.0), (3, 10.0), (4, 0.0)]));
        let policy = Policy { fail_open: 0.2, ..Balance::WeightedRandom.into() };
        // Keeps the backends alive, with the health that is set below.
        let _living = Snapshot::new(1, Origin::Redis, &table, policy, &registry);
        let seen = |policy: Policy| {
            let snapshot = Snapshot::new(1, Origin::Redis, &table, policy, &registry);
            (weights(&snapshot), snapshot.fails_open, snapshot.unusable().count())
        };
        let all = vec![60.0, 30.0, 10.0, 0.0];
        assert_eq!(seen(policy), (all.clone(), false, 0), "unchecked ones are usable");
        set_health(&registry, 1, Health::Unhealthy);
        assert_eq!(seen(policy), (vec![0.0, 30.0, 10.0, 0.0], false, 1));
        set_health(&registry, 2, Health::Unhealthy);
        assert_eq!(seen(policy), (all.clone(), true, 0), "a tenth is below a fifth");
        assert_eq!(seen(Balance::WeightedRandom.into()), (vec![0.0, 0.0, 10.0, 0.0], false, 2));
        set_health(&registry, 3, Health::Unhealthy);
        assert_eq!(seen(Balance::WeightedRandom.into()), (all, true, 0), "none is healthy");
        set_health(&registry, 1, Health::Healthy);
        assert_eq!(seen(policy), (vec![60.0, 0.0, 0.0, 0.0], false, 2));
    }

    #[test]
    fn weights_of_any_size_fail_open_where_too_little_of_them_is_healthy() {
        let members = [1, 2, 3, 4, 5];
        for weight in [1.7e308, 1.0, 5e-324] {
            for (fail_open, expected) in
                [(0.1, [false, false, false, false, true]), (0.5, [false, false, true, true, true])]
            {
                let (registry, table) = (Registry::new(1), table(&members.map(|n| (n, weight))));
                let policy = Policy { fail_open, ..Balance::WeightedRandom.into() };
                let _living = Snapshot::new(1, Origin::Redis, &table, policy, &registry);
                let seen = members.map(|n| {
                    set_health(&registry, n, Health::Unhealthy);
                    Snapshot::new(1, Origin::Redis, &table, policy, &registry).fails_open
                });
                assert_eq!(seen, expected, "{weight}, {fail_open}");
            }
        }
    }

    #[test]
    fn a_healthy_backend_with_a_tiny_weight_counts_beside_unhealthy_ones_with_huge_weights() {
        let (registry, table) = (Registry::new(1), table(&[(1, 1.7e308), (2, 1.7e308), (3, 5e-324)]));
        let _living = Snapshot::new(1, Origin::Redis, &table, Balance::WeightedRandom, &registry);
        set_health(&registry, 1, Health::Unhealthy);
        set_health(&registry, 2, Health::Unhealthy);
        let snapshot = Snapshot::new(1, Origin::Redis, &table, Balance::WeightedRandom, &registry);
        assert_eq!((weights(&snapshot), snapshot.fails_open), (vec![0.0, 0.0, 5e-324], false));
    }

    #[test]
    fn weights_of_zero_do_not_fail_open() {
        let (registry, table) = (Registry::new(1), table(&[(1, 0.0)]));
        let _living = Snapshot::new(1, Origin::Redis, &table, Balance::WeightedRandom, &registry);
        set_health(&registry, 1, Health::Unhealthy);
        let snapshot = Snapshot::new(1, Origin::Redis, &table, Balance::WeightedRandom, &registry);
        assert!(!snapshot.fails_open && snapshot.pick(0, &[]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_joining_backend_starts_slowly_and_changes_of_weights_do_not_restart_it() {
        let (registry, second) = (Registry::new(1), Duration::from_secs(1));
        let policy = Policy { slow_start: 10 * second, ..Balance::WeightedRandom.into() };
        let next = |snapshot: &Snapshot, weights: &[(u8, f64)]| {
            snapshot.next(Origin::Redis, &table(weights), policy, &registry)
        };
        let configured = Snapshot::new(1, Origin::Configured, &table(&[(9, 1.0)]), policy, &registry);
        let first = next(&configured, &[(1, 100.0), (2, 100.0), (9, 1.0)]);
        assert_eq!(
            (weights(&first), first.ramps),
            (vec![100.0, 100.0, 1.0], false),
            "the first table from Redis"
        );

        let joined = next(&first, &[(1, 100.0), (2, 100.0), (3, 100.0)]);
        assert_eq!((weights(&joined), joined.ramps), (vec![100.0, 100.0, 10.0], true));
        tokio::time::advance(5 * second).await;
        let changed = next(&joined, &[(1, 100.0), (2, 50.0), (3, 200.0)]);
        assert_eq!((weights(&changed), changed.ramps), (vec![100.0, 50.0, 100.0], true));
        tokio::time::advance(5 * second).await;
        let grown = next(&changed, &[(1, 100.0), (2, 50.0), (3, 200.0)]);
        assert_eq!((weights(&grown), grown.ramps), (vec![100.0, 50.0, 200.0], false));

        let all_new = next(&grown, &[(4, 5.0), (5, 5.0)]);
        assert_eq!((weights(&all_new), all_new.ramps), (vec![5.0, 5.0], false));
        tokio::time::advance(10 * second).await;
        let back = next(&all_new, &[(1, 100.0), (4, 5.0)]);
        assert_eq!(weights(&back), [10.0, 5.0], "a backend that is not remembered has joined");
    }

    #[tokio::test(start_paused = true)]
    async fn a_backend_that_is_ready_again_starts_slowly_and_one_that_gets_weight_again_does_not() {
        let (registry, second) = (Registry::new(1), Duration::from_secs(1));
        let policy = Policy { slow_start: 10 * second, ..Balance::WeightedRandom.into() };
        let id: BackendId = "10.0.0.1:80".parse().expect("an address");
        let next = |snapshot: &Snapshot, weight: f64, state: AdminState| {
            let table = table(&[(1, weight), (2, 100.0)]).with_states(vec![(id.clone(), state)]);
            snapshot.next(Origin::Redis, &table, policy, &registry)
        };
        let first = Snapshot::new(1, Origin::Redis, &table(&[(1, 100.0), (2, 100.0)]), policy, &registry);
        for state in [AdminState::Drain, AdminState::Maint] {
            let out = next(&first, 100.0, state);
            assert_eq!(weights(&out), [0.0, 100.0], "{state}");
            tokio::time::advance(5 * second).await;
            let still_out = next(&out, 100.0, state);
            let back = next(&still_out, 100.0, AdminState::Ready);
            assert_eq!((weights(&back), back.ramps), (vec![10.0, 100.0], true), "{state}");
            tokio::time::advance(5 * second).await;
            assert_eq!(weights(&next(&back, 100.0, AdminState::Ready)), [50.0, 100.0], "{state}");
            tokio::time::advance(5 * second).await;
        }
        let zero = next(&first, 0.0, AdminState::Ready);
        assert_eq!(
            weights(&next(&zero, 100.0, AdminState::Ready)),
            [100.0, 100.0],
            "a weight alone starts nothing"
        );
    }
}
