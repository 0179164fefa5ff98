//! The table of one pool, as Redis or config.yaml has it: the weight of each member, and the members that
//! are in drain or maint.

use std::sync::Arc;

use super::admin_state::AdminState;
use super::backend_id::BackendId;
use super::weight::Weight;

/// Members with their weights, each once, sorted by name. Two tables with the same content are equal. Clones
/// share their memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    members: Arc<[(BackendId, Weight)]>,
    /// The backends that are not ready, members or not.
    states: Arc<[(BackendId, AdminState)]>,
}

impl Table {
    /// Makes a table of members in any order. A backend that occurs twice keeps the later weight.
    #[must_use]
    pub fn new(mut members: Vec<(BackendId, Weight)>) -> Self {
        // A stable sort keeps the order of equal names. `dedup_by` drops its first argument, the later
        // entry, so the later weight is copied first.
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

    /// Returns a table with the same members and these states. `states` has each backend at most once.
    #[must_use]
    pub fn with_states(self, mut states: Vec<(BackendId, AdminState)>) -> Self {
        states.retain(|(_, state)| *state != AdminState::Ready);
        states.sort_by(|(a, _), (b, _)| a.cmp(b));
        Self { states: states.into(), ..self }
    }

    /// True if one table is a clone of the other. Cheaper than `==`, but two tables that are no clones may
    /// still be equal.
    #[must_use]
    pub fn is_clone_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.members, &other.members) && Arc::ptr_eq(&self.states, &other.states)
    }

    /// The state of `backend`.
    #[must_use]
    pub fn state(&self, backend: &BackendId) -> AdminState {
        let index = self.states.binary_search_by(|(id, _)| id.cmp(backend));
        index.map_or(AdminState::Ready, |index| self.states[index].1)
    }

    /// The backends that are not ready, sorted by name.
    #[must_use]
    pub fn states(&self) -> &[(BackendId, AdminState)] {
        &self.states
    }

    /// The members, sorted by name.
    #[must_use]
    pub fn members(&self) -> &[(BackendId, Weight)] {
        &self.members
    }

    /// True if the table has no members.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

#[cfg(test)]
impl Table {
    /// A table of these addresses and weights, for tests.
    pub(crate) fn of(members: &[(&str, f64)]) -> Self {
        let member = |(text, weight): &(&str, f64)| {
            (text.parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        Self::new(members.iter().map(member).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_with_the_same_content_are_equal_and_the_later_weight_counts() {
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
