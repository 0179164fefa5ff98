//! Which backends of a pool are leaving: they get no new sessions because somebody said so, and those that they have may be closed
//! after `drain.timeout`.
//!
//! That is a backend which the table does not name any more, or names with weight 0, or which is in drain or maint. Never one that is
//! only unhealthy: it may be back in a moment, and its sessions may know better. What is done about it is `session/leaving.rs`'s.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::balance::backend::{Backend, BackendKey, Registry};
use crate::balance::snapshot::Snapshot;

/// Those that are leaving, as long as somebody else holds them.
#[derive(Debug, Default)]
pub struct DrainingBackends(watch::Sender<Box<[(BackendKey, Weak<Backend>)]>>);

impl DrainingBackends {
    /// Hears whenever they are others. It works for as long as the pool lives.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Box<[(BackendKey, Weak<Backend>)]>> {
        self.0.subscribe()
    }

    /// Goes by the newest snapshot. Looks at every backend that lives, since a session may be at one that no snapshot named.
    pub(in crate::balance) fn look(&self, snapshot: &Snapshot, registry: &Registry) {
        let in_use: HashSet<BackendKey> = snapshot.in_use().map(|member| member.backend.key()).collect();
        let now = Instant::now();
        let mut leaving = Vec::new();
        for backend in registry.living_in_any_order() {
            if in_use.contains(&backend.key()) {
                backend.draining.end();
            } else {
                backend.draining.begin(now);
                leaving.push(backend);
            }
        }
        leaving.sort_unstable_by_key(|backend| backend.key());
        self.0.send_if_modified(|before| {
            let is_other =
                !before.iter().map(|(key, _)| *key).eq(leaving.iter().map(|backend| backend.key()));
            if is_other {
                *before = leaving.iter().map(|backend| (backend.key(), Arc::downgrade(backend))).collect();
            }
            is_other
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::balance::backend::Health;
    use crate::balance::pool::Cell;
    use crate::balance::values::{AdminState, BackendId, Balance, Policy, Table, Weight};

    const SECOND: Duration = Duration::from_secs(1);

    fn table(members: &[(&str, f64)]) -> Table {
        let member = |(text, weight): &(&str, f64)| {
            (text.parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        Table::new(members.iter().map(member).collect())
    }

    fn cell(members: &[(&str, f64)], drain_timeout: Duration) -> Cell {
        Cell::new(table(members), Policy { drain_timeout, ..Balance::WeightedRandom.into() }, 1)
    }

    /// The names of those that leave, and for how many seconds they do.
    fn leaving(cell: &Cell) -> Vec<(String, u64)> {
        // A backend that is only remembered has no sessions to close.
        let used = cell.registry().living();
        let draining_backends = cell.draining_backends().watch();
        let living = draining_backends
            .borrow()
            .iter()
            .filter_map(|(_, backend)| backend.upgrade())
            .collect::<Vec<_>>();
        let living: Vec<_> = living.iter().filter(|b| used.iter().any(|used| Arc::ptr_eq(used, b))).collect();
        let seconds = |backend: &Backend| backend.draining.since().expect("it leaves").elapsed().as_secs();
        let mut named: Vec<_> = living.iter().map(|b| (b.id().to_string(), seconds(b))).collect();
        named.sort();
        named
    }

    fn named(names: &[(&str, u64)]) -> Vec<(String, u64)> {
        names.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_removed_or_weighs_nothing_leaves_from_that_moment_until_he_weighs_something() {
        let cell = cell(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0), ("10.0.0.3:80", 1.0)], SECOND);
        let _session = cell.registry().get_or_create(&"10.0.0.1:80".parse().expect("an address"));
        assert_eq!(leaving(&cell), []);
        cell.publish(table(&[("10.0.0.2:80", 0.0), ("10.0.0.3:80", 1.0)]));
        tokio::time::advance(5 * SECOND).await;
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 5), ("10.0.0.2:80", 5)]));
        cell.publish(table(&[("10.0.0.2:80", 0.0), ("10.0.0.3:80", 2.0)]));
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 5), ("10.0.0.2:80", 5)]), "the clocks go on");
        cell.publish(table(&[("10.0.0.1:80", 0.0), ("10.0.0.2:80", 3.0)]));
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 5)]), "nobody holds the third");
        cell.publish(table(&[("10.0.0.2:80", 0.0)]));
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 5), ("10.0.0.2:80", 0)]), "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_in_drain_or_maint_leaves_until_he_is_ready_and_weight_and_state_are_one_clock() {
        let (one, ready) = ("10.0.0.1:80".parse::<BackendId>().expect("an address"), Vec::new);
        let cell = cell(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0)], SECOND);
        cell.set_states(vec![(one.clone(), AdminState::Drain)]);
        tokio::time::advance(5 * SECOND).await;
        cell.set_states(vec![(one.clone(), AdminState::Maint)]);
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 5)]), "the clock goes on");
        cell.publish(table(&[("10.0.0.1:80", 0.0), ("10.0.0.2:80", 1.0)]).with_states(cell.states()));
        cell.set_states(ready());
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 5)]), "it is to have no sessions still");
        cell.publish(table(&[("10.0.0.1:80", 2.0), ("10.0.0.2:80", 1.0)]));
        assert_eq!(leaving(&cell), []);
        cell.set_states(vec![(one, AdminState::Drain)]);
        assert_eq!(leaving(&cell), named(&[("10.0.0.1:80", 0)]), "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn health_makes_nobody_leave_and_stand_ins_stay() {
        let cell = cell(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0)], SECOND);
        cell.load().members()[0].backend.condition.set_health(Health::Unhealthy);
        cell.refresh();
        assert_eq!(leaving(&cell), []);
        cell.load().members()[0].backend.condition.set_health(Health::Healthy);
        cell.refresh();
        cell.publish(table(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0)]));
        cell.publish(table(&[("new.internal:80", 1.0)]));
        assert_eq!(leaving(&cell), [], "they serve until the name is known");
    }

    #[test]
    fn without_a_timeout_nobody_is_looked_at() {
        let cell = cell(&[("10.0.0.1:80", 1.0)], Duration::ZERO);
        cell.publish(table(&[("10.0.0.1:80", 0.0)]));
        assert!(cell.load().members()[0].backend.draining.since().is_none());
    }
}
