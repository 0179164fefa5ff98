//! The hash of a table's content. A proxy reports the hash of the table that it has applied, and a command
//! compares it with the hash of the table that it wrote.
//!
//! `weights.lua` computes the same hash for the history: SHA-1 over the members, by ascending weight and
//! then by name, which is the order that Redis keeps them in. Each member counts as its name, a zero
//! byte, and its weight as a big-endian double. The hash tells tables apart; it does not protect against
//! forged reports.

use std::fmt;

use sha1_smol::Sha1;

use crate::balance::Weight;

/// The hash of a table's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContentHash(String);

impl ContentHash {
    /// Hashes members, which may be in any order.
    pub(in crate::redis) fn of<'a>(members: impl Iterator<Item = (&'a str, Weight)>) -> Self {
        let mut members: Vec<_> = members.map(|(name, weight)| (weight.get(), name)).collect();
        members.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(b.1)));
        let mut sha1 = Sha1::new();
        for (weight, name) in members {
            sha1.update(name.as_bytes());
            sha1.update(&[0]);
            sha1.update(&weight.to_be_bytes());
        }
        Self(sha1.digest().to_string())
    }

    /// The hash in a proxy's report.
    pub(crate) fn reported(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(members: &[(&str, f64)]) -> ContentHash {
        ContentHash::of(members.iter().map(|(name, weight)| (*name, Weight::new(*weight).expect("a weight"))))
    }

    #[test]
    fn tables_that_say_the_same_have_one_hash_and_others_another() {
        let table = hash(&[("a:1", 1.0), ("b:1", 0.1)]);
        assert_eq!(table, hash(&[("b:1", 0.1), ("a:1", 1.0)]));
        for other in [
            &[("a:1", 1.0), ("b:1", 0.2)][..],
            &[("a:1", 0.1), ("b:1", 1.0)],
            &[("a:1", 1.0)],
            &[("a:1", 1.0), ("b:1", 0.1), ("c:1", 0.0)],
            &[],
        ] {
            assert_ne!(table, hash(other), "{other:?}");
        }
    }
}
