//! What a snapshot makes of a table: which backends get sessions, in which shares, and when backends stand
//! in for names.

use super::*;
use crate::balance::backend::Active;
use crate::balance::values::Weight;
use proptest::prelude::*;

const RANDOM: Balance = Balance::WeightedRandom;

fn table(weights: &[f64]) -> Table {
    let member = |(i, weight): (usize, &f64)| {
        let id = format!("10.0.{}.{}:80", i / 250, i % 250).parse().expect("an address");
        (id, Weight::new(*weight).expect("a weight"))
    };
    Table::new(weights.iter().enumerate().map(member).collect())
}

fn snapshot(weights: &[f64]) -> Snapshot {
    Snapshot::new(1, Origin::Configured, &table(weights), RANDOM, &Registry::new(1))
}

#[test]
fn all_weights_zero_picks_nothing() {
    assert!(snapshot(&[0.0, 0.0]).pick(0, &[]).is_none());
    assert!(snapshot(&[]).pick(0, &[]).is_none());
}

proptest! {
    #[test]
    fn a_backend_at_weight_zero_is_never_picked(
        weights in prop::collection::vec(prop_oneof![Just(0.0), 0.001..1000.0], 1..50),
        points in prop::collection::vec(any::<u64>(), 100),
    ) {
        let snapshot = snapshot(&weights);
        for point in points {
            let picked = snapshot.pick(point, &[]);
            prop_assert_eq!(picked.is_some(), weights.iter().any(|w| *w > 0.0));
            prop_assert!(picked.is_none_or(|member| member.weight.get() > 0.0));
            if let Some(first) = picked {
                let second = snapshot.pick(point, &[first.backend.id().clone()]);
                prop_assert!(second.is_none_or(|member| member.backend.id() != first.backend.id()));
            }
        }
    }
}

/// Pearson's statistic over the backends, compared with the normal approximation of the chi-square
/// distribution (Wilson and Hilferty) at one in a million: a sound picker fails this once in a million
/// seeds.
#[test]
fn random_picks_follow_the_weights_by_chi_square_up_to_ten_thousand_backends() {
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    for backends in [2usize, 3, 10, 100, 10_000] {
        let weights: Vec<f64> = (0..backends).map(|_| 0.5 + 10.0 * rng.f64()).collect();
        let snapshot = snapshot(&weights);
        let picks = 50 * backends.max(1_000);
        let mut counts = std::collections::HashMap::<BackendId, u32>::new();
        for _ in 0..picks {
            let member = snapshot.pick(rng.u64(..), &[]).expect("weights are positive");
            *counts.entry(member.backend.id().clone()).or_default() += 1;
        }
        let total: f64 = weights.iter().sum();
        let statistic: f64 = snapshot
            .members()
            .iter()
            .map(|member| {
                let expected = picks as f64 * member.weight.get() / total;
                let seen = f64::from(counts.get(member.backend.id()).copied().unwrap_or(0));
                (seen - expected).powi(2) / expected
            })
            .sum();
        let freedom = (backends - 1) as f64;
        let spread = 2.0 / (9.0 * freedom);
        let limit = freedom * (1.0 - spread + 4.75 * spread.sqrt()).powi(3);
        assert!(statistic < limit, "seed {seed}: {backends} backends: {statistic} >= {limit}");
    }
}

/// Sessions begin and end at random, 50 for each backend on average; heavier backends are to have more of
/// them.
#[test]
fn of_100_backends_none_is_much_busier_for_its_weight_than_the_mean() {
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    for spread in [0.0, 3.0] {
        let weights: Vec<f64> = (0..100).map(|_| 1.0 + spread * rng.f64()).collect();
        let snapshot =
            Snapshot::new(1, Origin::Redis, &table(&weights), Balance::LeastConn, &Registry::new(1));
        let mut sessions = Vec::new();
        for step in 0..50_000 {
            if step >= 5_000 {
                sessions.swap_remove(rng.usize(..sessions.len()));
            }
            let member = snapshot.pick_least_busy(rng.u64(..), &[]).expect("weights are positive");
            sessions.push(Active::take(&member.backend).expect("there is no limit"));
        }
        let mean = sessions.len() as f64 / weights.iter().sum::<f64>();
        let loads = snapshot.members().iter().map(|m| f64::from(m.backend.active()) / m.weight.get());
        let most = loads.fold(0.0, f64::max) / mean;
        assert!(most <= 1.3, "seed {seed}: {most} times the mean");
        drop(sessions);
        assert!(snapshot.members().iter().all(|member| member.backend.active() == 0));
    }
}

#[test]
fn a_client_keeps_its_backend_and_has_the_same_next_one_when_that_fails() {
    let table = table(&[1.0, 2.0, 3.0]);
    let [first, second] = [1, 2]
        .map(|version| Snapshot::new(version, Origin::Redis, &table, Balance::SourceHash, &Registry::new(1)));
    let id = |member: Option<&Member>| member.map(|member| member.backend.id().clone());
    for client in (0..1_000).map(mix) {
        let mut tried: Vec<BackendId> = Vec::new();
        for _ in 0..3 {
            let picked = id(first.pick_for(client, &tried)).expect("some are left");
            assert_eq!(id(second.pick_for(client, &tried)), Some(picked.clone()), "on another proxy");
            assert!(!tried.contains(&picked));
            tried.push(picked);
        }
        assert_eq!(id(first.pick_for(client, &tried)), None);
    }
}

#[test]
fn stand_ins_serve_each_client_by_its_address_too() {
    let registry = Registry::new(1);
    let first = Snapshot::new(1, Origin::Redis, &table(&[1.0; 5]), Balance::SourceHash, &registry);
    let waiting =
        first.next(Origin::Redis, &Table::of(&[("new.internal:80", 1.0)]), Balance::SourceHash, &registry);
    for client in (0..1_000).map(mix) {
        let [before, now] = [&first, &waiting].map(|s| s.pick_for(client, &[]).expect("one").backend.id());
        assert_eq!(before, now);
    }
}

#[test]
fn a_name_that_does_not_resolve_has_no_share_until_it_does() {
    let registry = Registry::new(1);
    let id: BackendId = "db.internal:5432".parse().expect("an address");
    let table = Table::new(vec![(id.clone(), Weight::new(1.0).expect("a weight"))]);
    assert!(Snapshot::new(1, Origin::Redis, &table, RANDOM, &registry).pick(0, &[]).is_none());
    let backend = registry.get_or_create(&id);
    backend.set_resolved(vec!["10.0.0.1:5432".parse().expect("an address")]);
    assert!(Snapshot::new(2, Origin::Redis, &table, RANDOM, &registry).pick(0, &[]).is_some());
}

#[test]
fn former_backends_stand_in_while_a_table_has_only_unresolved_names() {
    let registry = Registry::new(1);
    let picked = |snapshot: &Snapshot| snapshot.pick(7, &[]).map(|m| m.backend.id().to_string());
    let old = Some("10.0.0.1:80".to_owned());
    let first = Snapshot::new(1, Origin::Redis, &Table::of(&[("10.0.0.1:80", 1.0)]), RANDOM, &registry);

    let name = Table::of(&[("new.internal:80", 1.0)]);
    let waiting = first.next(Origin::Redis, &name, RANDOM, &registry);
    assert_eq!((picked(&waiting), waiting.version, waiting.members().len()), (old.clone(), 2, 1));
    assert!(waiting.pick(7, &["10.0.0.1:80".parse().expect("an address")]).is_none());
    let still = waiting.next(Origin::Redis, &name, RANDOM, &registry);
    assert_eq!(picked(&still), old);

    let backend = registry.get_or_create(&"new.internal:80".parse().expect("an address"));
    backend.set_resolved(vec!["10.0.0.2:80".parse().expect("an address")]);
    let resolved = still.next(Origin::Redis, &name, RANDOM, &registry);
    assert_eq!(picked(&resolved), Some("new.internal:80".to_owned()));

    let zero = Table::of(&[("other.internal:80", 0.0)]);
    assert_eq!(
        picked(&first.next(Origin::Redis, &zero, RANDOM, &registry)),
        None,
        "all weights zero refuses"
    );
    let drained = Table::of(&[("10.0.0.1:80", 0.0), ("other.internal:80", 1.0)]);
    assert_eq!(
        picked(&first.next(Origin::Redis, &drained, RANDOM, &registry)),
        None,
        "weight zero stays zero"
    );
}
