//! What is written of one pool, in Redis or in config.yaml: which backend has which weight.

use super::{BackendId, Weight};

/// Backends and their weights, each backend once, in the order of their names: two tables that say the same are equal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    members: Box<[(BackendId, Weight)]>,
}

impl Table {
    /// Takes members in any order. A backend that is named twice keeps the later weight.
    #[must_use]
    pub fn new(mut members: Vec<(BackendId, Weight)>) -> Self {
        // A stable sort keeps equals in the order they came; `dedup_by` drops its first argument, the later one, so
        // the weights are swapped first.
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        members.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                kept.1 = later.1;
            }
            same
        });
        Self { members: members.into() }
    }

    /// In the order of their names.
    #[must_use]
    pub fn members(&self) -> &[(BackendId, Weight)] {
        &self.members
    }

    /// True when nothing is written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_say_the_same_are_equal_and_the_later_weight_counts() {
        let member =
            |text: &str, weight| (text.parse().expect("an address"), Weight::new(weight).expect("a weight"));
        let (a, b) = (member("a:1", 1.0), member("b:1", 2.0));
        assert_eq!(
            Table::new(vec![a.clone(), b.clone()]),
            Table::new(vec![b.clone(), member("a:1", 9.0), a.clone()])
        );
        assert_ne!(Table::new(vec![a.clone()]), Table::new(vec![a, b]));
    }
}
