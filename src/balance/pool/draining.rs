//! Which backends of a pool are draining: they get no new sessions, and the sessions that they have may be
//! closed after `drain.timeout`.
//!
//! A backend is draining if the table does not name it, names it with the weight 0, or has it in drain or
//! maint. A stand-in is not draining. Nor is an unhealthy backend: it may recover in a moment, and its
//! sessions may still work. `session/draining.rs` closes the sessions.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::balance::backend::{Backend, BackendKey, Registry};
use crate::balance::snapshot::Snapshot;

/// Draining backends, sorted by their keys.
pub type DrainingList = Box<[(BackendKey, Weak<Backend>)]>;

/// The draining backends of one pool, without keeping them alive.
#[derive(Debug, Default)]
pub struct DrainingBackends(watch::Sender<DrainingList>);

impl DrainingBackends {
    /// A receiver for the draining backends. It works as long as the pool lives.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<DrainingList> {
        self.0.subscribe()
    }

    /// Finds the draining backends after a new snapshot. Looks at every living backend, since a session may
    /// be at one that no snapshot has named.
    pub(in crate::balance) fn update(&self, snapshot: &Snapshot, registry: &Registry) {
        let in_use: HashSet<BackendKey> = snapshot.in_use().map(|member| member.backend.key()).collect();
        let now = Instant::now();
        let mut draining = Vec::new();
        for backend in registry.living_in_any_order() {
            if in_use.contains(&backend.key()) {
                backend.draining.end();
            } else {
                backend.draining.begin(now);
                draining.push(backend);
            }
        }
        draining.sort_unstable_by_key(|backend| backend.key());
        self.0.send_if_modified(|before| {
            let is_other =
                !before.iter().map(|(key, _)| *key).eq(draining.iter().map(|backend| backend.key()));
            if is_other {
                *before = draining.iter().map(|backend| (backend.key(), Arc::downgrade(backend))).collect();
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
    use crate::balance::values::{AdminState, BackendId, Balance, Policy, Table};

    const SECOND: Duration = Duration::from_secs(1);

    fn cell(members: &[(&str, f64)], drain_timeout: Duration) -> Cell {
        Cell::new(Table::of(members), Policy { drain_timeout, ..Balance::WeightedRandom.into() }, 1)
    }

    /// The names of the draining backends, and for how many seconds they have been draining.
    fn draining(cell: &Cell) -> Vec<(String, u64)> {
        // A backend that is only remembered has no sessions to close.
        let used = cell.registry().living();
        let draining_backends = cell.draining_backends().watch();
        let living = draining_backends
            .borrow()
            .iter()
            .filter_map(|(_, backend)| backend.upgrade())
            .collect::<Vec<_>>();
        let living: Vec<_> = living.iter().filter(|b| used.iter().any(|used| Arc::ptr_eq(used, b))).collect();
        let seconds =
            |backend: &Backend| backend.draining.since().expect("it is draining").elapsed().as_secs();
        let mut named: Vec<_> = living.iter().map(|b| (b.id().to_string(), seconds(b))).collect();
        named.sort();
        named
    }

    fn named(names: &[(&str, u64)]) -> Vec<(String, u64)> {
        names.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_backend_that_is_removed_or_at_weight_zero_drains_until_it_has_weight() {
        let cell = cell(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0), ("10.0.0.3:80", 1.0)], SECOND);
        let _session = cell.registry().get_or_create(&"10.0.0.1:80".parse().expect("an address"));
        assert_eq!(draining(&cell), []);
        cell.publish(Table::of(&[("10.0.0.2:80", 0.0), ("10.0.0.3:80", 1.0)]));
        tokio::time::advance(5 * SECOND).await;
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 5), ("10.0.0.2:80", 5)]));
        cell.publish(Table::of(&[("10.0.0.2:80", 0.0), ("10.0.0.3:80", 2.0)]));
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 5), ("10.0.0.2:80", 5)]), "the clocks go on");
        cell.publish(Table::of(&[("10.0.0.1:80", 0.0), ("10.0.0.2:80", 3.0)]));
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 5)]), "no session holds the third");
        cell.publish(Table::of(&[("10.0.0.2:80", 0.0)]));
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 5), ("10.0.0.2:80", 0)]), "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn a_backend_in_drain_or_maint_drains_until_it_is_ready_and_weight_and_state_share_one_clock() {
        let (one, ready) = ("10.0.0.1:80".parse::<BackendId>().expect("an address"), Vec::new);
        let cell = cell(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0)], SECOND);
        cell.set_states(vec![(one.clone(), AdminState::Drain)]);
        tokio::time::advance(5 * SECOND).await;
        cell.set_states(vec![(one.clone(), AdminState::Maint)]);
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 5)]), "the clock goes on");
        cell.publish(Table::of(&[("10.0.0.1:80", 0.0), ("10.0.0.2:80", 1.0)]).with_states(cell.states()));
        cell.set_states(ready());
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 5)]), "its weight is still zero");
        cell.publish(Table::of(&[("10.0.0.1:80", 2.0), ("10.0.0.2:80", 1.0)]));
        assert_eq!(draining(&cell), []);
        cell.set_states(vec![(one, AdminState::Drain)]);
        assert_eq!(draining(&cell), named(&[("10.0.0.1:80", 0)]), "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn unhealthy_backends_and_stand_ins_do_not_drain() {
        let cell = cell(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0)], SECOND);
        cell.load().members()[0].backend.condition.set_health(Health::Unhealthy);
        cell.refresh();
        assert_eq!(draining(&cell), []);
        cell.load().members()[0].backend.condition.set_health(Health::Healthy);
        cell.refresh();
        cell.publish(Table::of(&[("10.0.0.1:80", 1.0), ("10.0.0.2:80", 1.0)]));
        cell.publish(Table::of(&[("new.internal:80", 1.0)]));
        assert_eq!(draining(&cell), [], "they serve until the name is known");
    }

    #[test]
    fn without_a_timeout_no_backend_is_marked() {
        let cell = cell(&[("10.0.0.1:80", 1.0)], Duration::ZERO);
        cell.publish(Table::of(&[("10.0.0.1:80", 0.0)]));
        assert!(cell.load().members()[0].backend.draining.since().is_none());
    }
}
