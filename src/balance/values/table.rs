//! What is written of one pool, in Redis or in config.yaml: which backend has which weight, and which is not to be used.

use std::sync::Arc;

use super::{AdminState, BackendId, Weight};

/// Backends and their weights, each backend once, in the order of their names: two tables that say the same are equal. A clone
/// shares them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    members: Arc<[(BackendId, Weight)]>,
    /// Those that are not ready, whether they are members or not.
    states: Arc<[(BackendId, AdminState)]>,
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
        Self { members: members.into(), states: Arc::default() }
    }

    /// The same members, of which these are not ready; each is named once.
    #[must_use]
    pub fn with_states(self, mut states: Vec<(BackendId, AdminState)>) -> Self {
        states.retain(|(_, state)| *state != AdminState::Ready);
        states.sort_by(|(a, _), (b, _)| a.cmp(b));
        Self { states: states.into(), ..self }
    }

    /// True where one is a clone of the other: cheaper than a comparison. False says nothing.
    #[must_use]
    pub fn is_clone_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.members, &other.members) && Arc::ptr_eq(&self.states, &other.states)
    }

    /// What is wanted of a backend.
    #[must_use]
    pub fn state(&self, backend: &BackendId) -> AdminState {
        let place = self.states.binary_search_by(|(id, _)| id.cmp(backend));
        place.map_or(AdminState::Ready, |place| self.states[place].1)
    }

    /// Those that are not ready, in the order of their names.
    #[must_use]
    pub fn states(&self) -> &[(BackendId, AdminState)] {
        &self.states
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
        assert_ne!(Table::new(vec![a.clone()]), Table::new(vec![a.clone(), b.clone()]));

        let table = Table::new(vec![a.clone(), b.clone()]);
        let drained = table
            .clone()
            .with_states(vec![(b.0.clone(), AdminState::Drain), (a.0.clone(), AdminState::Ready)]);
        assert_ne!(drained, table);
        assert_eq!((drained.state(&a.0), drained.state(&b.0)), (AdminState::Ready, AdminState::Drain));
    }
}
