//! Which backend a client belongs to, the same on every proxy of a fleet that has the same table.
//!
//! Maglev (Eisenbud and others, NSDI 2016): each backend has an order of its own, made of its name, in which it wants the places
//! of a table; they take turns, the heavier ones more often, until all places are taken. A client's address names a place. A
//! backend that goes leaves its places to the others, whose own hardly move, and the same is true of a weight that changes.
//!
//! The hashes must never change: proxies of two versions in one fleet would send one client to two backends.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::net::IpAddr;

use sha1_smol::Sha1;

/// A prime, so that each step visits all places; a share is exact to 1 ÷ 65,537.
const PLACES: usize = 65_537;

/// The places, each with the index of the one who has it.
#[derive(Debug)]
pub(in crate::balance) struct Maglev(Box<[u32]>);

/// Whose turn it is: the one who is least far ahead of its share.
#[derive(Debug, PartialEq)]
struct Turn {
    /// Slots, with the next one, divided by the weight.
    time: f64,
    index: u32,
}

impl Eq for Turn {}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Turn {
    fn cmp(&self, other: &Self) -> Ordering {
        self.time.total_cmp(&other.time).then(self.index.cmp(&other.index))
    }
}

/// The order in which one backend wants the places.
struct Wish {
    next: usize,
    step: usize,
    has: u32,
}

impl Wish {
    fn of(name: &str) -> Self {
        let digest = Sha1::from(name).digest().bytes();
        let number = |from: usize| {
            digest[from..from + 8].iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let within = |number: u64, size: usize| ((u128::from(number) * size as u128) >> 64) as usize;
        Self { next: within(number(0), PLACES), step: 1 + within(number(8), PLACES - 1), has: 0 }
    }
}

impl Maglev {
    /// Of names and their weights, which are finite and > 0, in an order that all proxies share. There are at most `u32::MAX`.
    /// Of more than 65,537 the lightest get none.
    ///
    /// # Cost
    /// A few milliseconds: it is built by the control plane.
    pub(in crate::balance) fn new<'a>(members: impl Iterator<Item = (&'a str, f64)>) -> Self {
        let (mut wishes, weights): (Vec<Wish>, Vec<f64>) =
            members.map(|(name, weight)| (Wish::of(name), weight)).unzip();
        if wishes.is_empty() {
            return Self(Box::default());
        }
        // Of the heaviest, so that neither huge nor tiny weights lose the difference of one place.
        let heaviest = weights.iter().copied().fold(0.0, f64::max);
        let time = |index: usize, places: u32| f64::from(places) / (weights[index] / heaviest);
        let mut turns: BinaryHeap<Reverse<Turn>> = (0..wishes.len())
            .map(|index| Reverse(Turn { time: time(index, 1), index: index as u32 }))
            .collect();
        let mut places = vec![u32::MAX; PLACES];
        for _ in 0..PLACES {
            let Some(mut turn) = turns.peek_mut() else { break };
            let index = turn.0.index as usize;
            let wish = &mut wishes[index];
            while places[wish.next] != u32::MAX {
                wish.next = (wish.next + wish.step) % PLACES;
            }
            places[wish.next] = index as u32;
            wish.has += 1;
            turn.0.time = time(index, wish.has + 1);
        }
        Self(places.into())
    }

    /// The index of the one that a client with this hash belongs to. `None`: there are none.
    #[inline]
    pub(in crate::balance) fn at(&self, hash: u64) -> Option<usize> {
        let place = ((u128::from(hash) * self.0.len() as u128) >> 64) as usize;
        self.0.get(place).map(|index| *index as usize)
    }
}

/// Of a client's address, without its port: even over all of `u64`. An IPv4 address has the same hash where it comes in by IPv6.
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

/// The finalizer of SplitMix64: each bit of the answer depends on each bit of the question.
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
        maglev.0.iter().for_each(|index| shares[*index as usize] += 1.0 / PLACES as f64);
        shares
    }

    /// The share of places that another has.
    fn moved(a: &Maglev, b: &Maglev, name_of_b: impl Fn(u32) -> u32) -> f64 {
        let moved = a.0.iter().zip(&b.0).filter(|(a, b)| **a != name_of_b(**b)).count();
        moved as f64 / PLACES as f64
    }

    #[test]
    fn one_of_ten_that_goes_takes_hardly_more_clients_along_than_it_has() {
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
    fn half_a_weight_moves_little_more_than_the_share_that_it_must() {
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
    fn what_the_fleet_agrees_on_does_not_change_with_the_version() {
        let maglev = maglev(&names(5), &[1.0, 2.0, 3.0, 4.0, 5.0]);
        let clients = ["192.0.2.1", "192.0.2.2", "::ffff:192.0.2.2", "2001:db8::1", "2001:db8::2"];
        let hashes = clients.map(|client| client_hash(client.parse().expect("an address")));
        assert_eq!(hashes[1], hashes[2]);
        assert_eq!(hashes.map(|hash| maglev.at(hash)), [Some(3), Some(4), Some(4), Some(4), Some(1)]);
    }

    #[test]
    fn without_members_it_names_nobody() {
        assert_eq!(maglev(&[], &[]).at(7), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn each_has_its_share_of_the_places(weights in prop::collection::vec(1e-3..1e3, 1..40)) {
            let total: f64 = weights.iter().sum();
            let shares = shares(&maglev(&names(weights.len()), &weights), weights.len());
            for (share, weight) in shares.iter().zip(&weights) {
                // To two places: one for the part of a place that its weight comes to, one for the turn in which the table
                // is full. 1.83 places were seen.
                prop_assert!((share - weight / total).abs() <= 2.0 / PLACES as f64, "{share} {}", weight / total);
            }
        }
    }
}
