//! Finds the backend of a client: the same one on every proxy that has the same effective weights.
//!
//! Maglev hashing (Eisenbud and others, NSDI 2016): each backend has a permutation of the entries of a
//! table, made from its name. The backends fill the table step by step, each taking the first free entry of
//! its permutation, and heavier ones do so more often. The hash of a client's address names an entry. When a
//! backend leaves, the others take over its entries and keep nearly all of their own; the same holds for a
//! changed weight.
//!
//! The hashes must never change: in a fleet with two versions of Statera, two proxies would send one client
//! to different backends.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::net::IpAddr;

use sha1_smol::Sha1;

/// The number of entries. A prime, so that each step width visits all of them. A share is exact to 2 ÷
/// 65,537.
const ENTRIES: usize = 65_537;

/// The entries: each has the index of its backend.
#[derive(Debug)]
pub(in crate::balance) struct Maglev(Box<[u32]>);

/// A backend that may take the next entry. The candidate with the least `progress` takes it.
#[derive(Debug, PartialEq)]
struct Candidate {
    /// The backend's number of entries, including the next one, divided by its weight relative to the
    /// heaviest.
    progress: f64,
    index: u32,
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.progress.total_cmp(&other.progress).then(self.index.cmp(&other.index))
    }
}

/// The permutation of one backend, and how far it is used up.
struct Permutation {
    next: usize,
    step: usize,
    taken: u32,
}

impl Permutation {
    fn of(name: &str) -> Self {
        let digest = Sha1::from(name).digest().bytes();
        let number = |from: usize| {
            digest[from..from + 8].iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let within = |number: u64, size: usize| ((u128::from(number) * size as u128) >> 64) as usize;
        Self { next: within(number(0), ENTRIES), step: 1 + within(number(8), ENTRIES - 1), taken: 0 }
    }
}

impl Maglev {
    /// Builds the Maglev table from names and weights, at most `u32::MAX` of them, in an order that all
    /// proxies share. Weights are finite and > 0. A backend with less than 1 ÷ 65,537 of the sum may get
    /// no entry.
    ///
    /// # Cost
    /// A few milliseconds: the control plane builds it.
    pub(in crate::balance) fn new<'a>(members: impl Iterator<Item = (&'a str, f64)>) -> Self {
        let (mut permutations, weights): (Vec<Permutation>, Vec<f64>) =
            members.map(|(name, weight)| (Permutation::of(name), weight)).unzip();
        if permutations.is_empty() {
            return Self(Box::default());
        }
        // Relative to the heaviest, so that neither huge nor tiny weights lose the difference of one entry.
        let heaviest = weights.iter().copied().fold(0.0, f64::max);
        let progress = |index: usize, entries: u32| f64::from(entries) / (weights[index] / heaviest);
        let mut candidates: BinaryHeap<Reverse<Candidate>> = (0..permutations.len())
            .map(|index| Reverse(Candidate { progress: progress(index, 1), index: index as u32 }))
            .collect();
        let mut entries = vec![u32::MAX; ENTRIES];
        for _ in 0..ENTRIES {
            let Some(mut candidate) = candidates.peek_mut() else { break };
            let index = candidate.0.index as usize;
            let permutation = &mut permutations[index];
            while entries[permutation.next] != u32::MAX {
                permutation.next = (permutation.next + permutation.step) % ENTRIES;
            }
            entries[permutation.next] = index as u32;
            permutation.taken += 1;
            candidate.0.progress = progress(index, permutation.taken + 1);
        }
        Self(entries.into())
    }

    /// The index of the backend of a client with this hash. `None`: there are no backends.
    #[inline]
    pub(in crate::balance) fn at(&self, hash: u64) -> Option<usize> {
        let entry = ((u128::from(hash) * self.0.len() as u128) >> 64) as usize;
        self.0.get(entry).map(|index| *index as usize)
    }
}

/// The hash of a client's address without its port, evenly distributed over `u64`. An IPv4-mapped IPv6
/// address has the hash of the IPv4 address.
#[inline]
#[must_use]
pub(in crate::balance) fn client_hash(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(address) => mix(u64::from(address.to_bits())),
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            mix(mix((bits >> 64) as u64) ^ bits as u64)
        }
    }
}

/// The finalizer of SplitMix64: each bit of the result depends on each bit of the argument.
#[inline]
#[must_use]
pub(in crate::balance) fn mix(bits: u64) -> u64 {
    let bits = bits.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ bits >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("10.0.{}.{}:80", i / 250, i % 250)).collect()
    }

    fn maglev(names: &[String], weights: &[f64]) -> Maglev {
        Maglev::new(names.iter().map(String::as_str).zip(weights.iter().copied()))
    }

    fn shares(maglev: &Maglev, members: usize) -> Vec<f64> {
        let mut shares = vec![0.0; members];
        maglev.0.iter().for_each(|index| shares[*index as usize] += 1.0 / ENTRIES as f64);
        shares
    }

    /// The part of the entries that have another backend in `b` than in `a`.
    fn moved(a: &Maglev, b: &Maglev, name_of_b: impl Fn(u32) -> u32) -> f64 {
        let moved = a.0.iter().zip(&b.0).filter(|(a, b)| **a != name_of_b(**b)).count();
        moved as f64 / ENTRIES as f64
    }

    #[test]
    fn when_one_of_ten_backends_leaves_hardly_more_clients_move_than_its_own() {
        let names = names(10);
        let before = maglev(&names, &[1.0; 10]);
        for gone in 0..10 {
            let rest: Vec<String> = names.iter().filter(|name| **name != names[gone]).cloned().collect();
            let after = maglev(&rest, &[1.0; 9]);
            let moved = moved(&before, &after, |index| index + u32::from(index as usize >= gone));
            assert!((0.0999..=0.12).contains(&moved), "{moved} of all move when {gone} goes");
        }
    }

    #[test]
    fn halving_a_weight_moves_little_more_than_the_share_that_must_move() {
        let names = names(10);
        let before = maglev(&names, &[1.0; 10]);
        let mut weights = [1.0; 10];
        weights[3] = 0.5;
        let after = maglev(&names, &weights);
        let must = 0.1 - 0.5 / 9.5;
        let moved = moved(&before, &after, |index| index);
        assert!((must - 0.001..must * 1.3).contains(&moved), "{moved} of all move where {must} must");
    }

    #[test]
    fn the_backend_of_a_client_does_not_change_with_the_version() {
        let maglev = maglev(&names(5), &[1.0, 2.0, 3.0, 4.0, 5.0]);
        let clients = ["192.0.2.1", "192.0.2.2", "::ffff:192.0.2.2", "2001:db8::1", "2001:db8::2"];
        let hashes = clients.map(|client| client_hash(client.parse().expect("an address")));
        assert_eq!(hashes[1], hashes[2]);
        assert_eq!(hashes.map(|hash| maglev.at(hash)), [Some(3), Some(4), Some(4), Some(4), Some(1)]);
    }

    #[test]
    fn without_members_no_backend_is_named() {
        assert_eq!(maglev(&[], &[]).at(7), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn each_backend_has_its_share_of_the_entries(weights in prop::collection::vec(1e-3..1e3, 1..40)) {
            let total: f64 = weights.iter().sum();
            let shares = shares(&maglev(&names(weights.len()), &weights), weights.len());
            for (share, weight) in shares.iter().zip(&weights) {
                // Within two entries: one for the fraction of an entry that its weight comes to, one for the
                // step at which the table is full. 1.83 entries were seen.
                let expected = weight / total;
                prop_assert!((share - expected).abs() <= 2.0 / ENTRIES as f64, "{share} {expected}");
            }
        }
    }
}
