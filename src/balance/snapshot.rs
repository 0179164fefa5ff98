//! A table made ready for picking: immutable, swapped in whole.
//!
//! A pick is one point and one lookup; it allocates nothing and locks nothing. Points come from the caller, so a seed
//! replays a run. Snapshots are published through `cell.rs`.

use std::sync::Arc;

use super::backend::{Backend, Registry};
use super::sequence::Sequence;
use super::shares::Shares;
use super::{BackendId, Table, Weight};

/// Where a snapshot's table was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In config.yaml.
    Configured,
    /// In Redis, before this process began; it was found in a file of `state_dir`.
    Saved,
    /// In Redis.
    Redis,
}

impl Origin {
    /// As in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Saved => "saved",
            Self::Redis => "redis",
        }
    }
}

/// One pool's backends at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts the snapshots of this pool from 1.
    pub version: u64,
    /// Where the table was written.
    pub origin: Origin,
    /// Those that may be picked come first, so that a stretch of `shares` is an index here.
    members: Box<[Member]>,
    /// Those of the snapshot before, while no member that has a weight can be reached; else none.
    stand_ins: Box<[Member]>,
    /// Over the stand-ins where there are any, else over the members.
    shares: Shares,
    /// Where `weighted_round_robin` stands.
    sequence: Sequence,
}

/// One backend of a snapshot.
#[derive(Clone, Debug)]
pub struct Member {
    /// The backend itself.
    pub backend: Arc<Backend>,
    /// What is written.
    pub weight: Weight,
    /// What picks use: zero while a name does not resolve.
    pub effective_weight: Weight,
}

impl Snapshot {
    /// Makes `table` ready. Takes the living backends from `registry`, so that what they know of themselves stays.
    #[must_use]
    pub fn new(version: u64, origin: Origin, table: &Table, registry: &Registry) -> Self {
        let mut members: Box<[Member]> = table
            .members()
            .iter()
            .map(|(id, weight)| {
                let backend = registry.get_or_create(id);
                let effective_weight = if backend.is_reachable() { *weight } else { Weight::ZERO };
                Member { backend, weight: *weight, effective_weight }
            })
            .collect();
        members.sort_by_key(|member| member.effective_weight.is_zero());
        let shares = shares(&members);
        Self { version, origin, stand_ins: Box::default(), shares, sequence: Sequence::new(version), members }
    }

    /// Makes `table` ready to follow this snapshot.
    ///
    /// Where it gives weight to names alone and none of them has been resolved, which takes a moment for new ones, the
    /// backends that this snapshot picks from stand in, so that the swap of a backend for a name loses no session. Not
    /// those that `table` puts at weight zero: they get no new sessions, whatever else is wrong.
    #[must_use]
    pub fn next(&self, origin: Origin, table: &Table, registry: &Registry) -> Self {
        let mut next = Self::new(self.version + 1, origin, table, registry);
        let waits_for_names =
            pickable(&next.members).is_empty() && next.members.iter().any(|member| !member.weight.is_zero());
        if waits_for_names {
            let written = table.members();
            let is_written =
                |member: &&Member| written.binary_search_by(|(id, _)| id.cmp(member.backend.id())).is_ok();
            next.stand_ins =
                pickable(self.picked_from()).iter().filter(|m| !is_written(m)).cloned().collect();
            next.shares = shares(&next.stand_ins);
        }
        next
    }

    fn picked_from(&self) -> &[Member] {
        if self.stand_ins.is_empty() { &self.members } else { &self.stand_ins }
    }

    /// The next point of an even spread, for [`Snapshot::pick`].
    #[inline]
    #[must_use]
    pub fn next_point(&self) -> u64 {
        self.sequence.next()
    }

    /// The backend that `point` names, leaving out those in `tried`. `None`: none is left.
    #[inline]
    #[must_use]
    pub fn pick(&self, point: u64, tried: &[BackendId]) -> Option<&Member> {
        let members = self.picked_from();
        let index = if tried.is_empty() {
            self.shares.at(point)
        } else {
            self.shares.at_excluding(point, |i| tried.contains(members[i].backend.id()))
        };
        index.map(|i| &members[i])
    }

    /// All backends of the table, those at weight zero too.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }
}

fn pickable(members: &[Member]) -> &[Member] {
    &members[..members.partition_point(|member| !member.effective_weight.is_zero())]
}

fn shares(members: &[Member]) -> Shares {
    let weights: Vec<f64> = pickable(members).iter().map(|member| member.effective_weight.get()).collect();
    Shares::new(&weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(weights: &[f64]) -> Table {
        let member = |(i, weight): (usize, &f64)| {
            let id = format!("10.0.{}.{}:80", i / 250, i % 250).parse().expect("an address");
            (id, Weight::new(*weight).expect("a weight"))
        };
        Table::new(weights.iter().enumerate().map(member).collect())
    }

    fn snapshot(weights: &[f64]) -> Snapshot {
        Snapshot::new(1, Origin::Configured, &table(weights), &Registry::new(1))
    }

    #[test]
    fn all_weights_zero_picks_nothing() {
        assert!(snapshot(&[0.0, 0.0]).pick(0, &[]).is_none());
        assert!(snapshot(&[]).pick(0, &[]).is_none());
    }

    proptest! {
        #[test]
        fn a_backend_at_weight_zero_is_never_picked(
            weights in prop::collection::vec(prop_oneof![Just(0.0), 0.001..1000.0], 1..50), points in prop::collection::vec(any::<u64>(), 100)
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

    /// Pearson's statistic over the backends, compared with the normal approximation of the chi-square distribution
    /// (Wilson and Hilferty) at one in a million: a sound picker fails this once in a million seeds.
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

    #[test]
    fn a_name_that_does_not_resolve_has_no_share_until_it_does() {
        let registry = Registry::new(1);
        let id: BackendId = "db.internal:5432".parse().expect("an address");
        let table = Table::new(vec![(id.clone(), Weight::new(1.0).expect("a weight"))]);
        assert!(Snapshot::new(1, Origin::Redis, &table, &registry).pick(0, &[]).is_none());
        let backend = registry.get_or_create(&id);
        backend.set_resolved(vec!["10.0.0.1:5432".parse().expect("an address")]);
        assert!(Snapshot::new(2, Origin::Redis, &table, &registry).pick(0, &[]).is_some());
    }

    fn written(members: &[(&str, f64)]) -> Table {
        let member = |(text, weight): &(&str, f64)| {
            (text.parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        Table::new(members.iter().map(member).collect())
    }

    #[test]
    fn the_backends_before_stand_in_while_a_table_has_only_unresolved_names() {
        let registry = Registry::new(1);
        let picked = |snapshot: &Snapshot| snapshot.pick(7, &[]).map(|m| m.backend.id().to_string());
        let old = Some("10.0.0.1:80".to_owned());
        let first = Snapshot::new(1, Origin::Redis, &written(&[("10.0.0.1:80", 1.0)]), &registry);

        let name = written(&[("new.internal:80", 1.0)]);
        let waiting = first.next(Origin::Redis, &name, &registry);
        assert_eq!((picked(&waiting), waiting.version, waiting.members().len()), (old.clone(), 2, 1));
        assert!(waiting.pick(7, &["10.0.0.1:80".parse().expect("an address")]).is_none());
        let still = waiting.next(Origin::Redis, &name, &registry);
        assert_eq!(picked(&still), old);

        let backend = registry.get_or_create(&"new.internal:80".parse().expect("an address"));
        backend.set_resolved(vec!["10.0.0.2:80".parse().expect("an address")]);
        let resolved = still.next(Origin::Redis, &name, &registry);
        assert_eq!(picked(&resolved), Some("new.internal:80".to_owned()));

        let zero = written(&[("other.internal:80", 0.0)]);
        assert_eq!(picked(&first.next(Origin::Redis, &zero, &registry)), None, "all weights zero refuses");
        let drained = written(&[("10.0.0.1:80", 0.0), ("other.internal:80", 1.0)]);
        assert_eq!(picked(&first.next(Origin::Redis, &drained, &registry)), None, "weight zero stays zero");
    }
}
