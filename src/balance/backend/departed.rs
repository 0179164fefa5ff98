//! Remembers the backends that left a pool's table, for [`REMEMBERED_FOR`].
//!
//! A tool that rewrites its table (`DEL`, then one `ZADD` for each member) makes each member leave and
//! return within milliseconds. What is known of a backend (health, ejection, slow start, counters, resolved
//! addresses) is kept in the backend, so a reference to the backend is enough. A remembered backend is not
//! checked and not picked. It has metrics only while it has sessions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::Instant;

use super::backend::Backend;
use super::presence::REMEMBERED_FOR;

/// The most departed backends that are remembered: this many, or [`REMEMBERED_PER_MEMBER`] times the
/// members of the largest recent table, whichever is more. A backend takes about 2 kB with two workers.
const LEAST_REMEMBERED: usize = 1_024;
const REMEMBERED_PER_MEMBER: usize = 2;

/// The departed backends of one pool, in the order in which they left.
#[derive(Debug)]
pub(in crate::balance) struct Departed {
    backends: BTreeMap<u64, Departure>,
    newest: u64,
    largest: LargestTable,
}

#[derive(Debug)]
struct Departure {
    backend: Arc<Backend>,
    at: Instant,
    /// The backend was neither in drain nor in maint when it left.
    was_ready: bool,
}

impl Default for Departed {
    fn default() -> Self {
        Self { backends: BTreeMap::new(), newest: 0, largest: LargestTable::new() }
    }
}

impl Departed {
    /// Records the change to snapshot `version`: backends that are only in `before` are remembered from
    /// now on, and backends in `now` are not departed any more. `before` has with each backend whether it
    /// was ready.
    pub(in crate::balance) fn follow<'a>(
        &mut self,
        version: u64,
        before: impl Iterator<Item = (&'a Arc<Backend>, bool)>,
        now: impl Iterator<Item = &'a Arc<Backend>>,
    ) {
        let mut members = 0;
        for backend in now {
            members += 1;
            backend.presence().snapshot.store(version, Relaxed);
            let departure = backend.presence().departure.swap(0, Relaxed);
            if departure != 0 {
                self.backends.remove(&departure);
            }
        }
        let at = Instant::now();
        let most = REMEMBERED_PER_MEMBER * self.largest.with(members, at);
        for (backend, was_ready) in before {
            // A backend of the new snapshot has not left. One with a departure is remembered already.
            let is_here = backend.presence().snapshot.load(Relaxed) == version;
            if is_here || backend.presence().departure.load(Relaxed) != 0 {
                continue;
            }
            self.newest += 1;
            backend.presence().departure.store(self.newest, Relaxed);
            self.backends.insert(self.newest, Departure { backend: Arc::clone(backend), at, was_ready });
        }
        while self.backends.len() > most.max(LEAST_REMEMBERED) {
            self.forget_oldest();
        }
        self.forget_old(at);
    }

    /// Forgets the backends that left at least [`REMEMBERED_FOR`] ago.
    pub(in crate::balance) fn forget_old(&mut self, now: Instant) {
        let is_old = |departure: &Departure| now.saturating_duration_since(departure.at) >= REMEMBERED_FOR;
        while self.backends.first_key_value().is_some_and(|(_, departure)| is_old(departure)) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, departure)) = self.backends.pop_first() {
            departure.backend.presence().departure.store(0, Relaxed);
        }
    }

    /// True for a remembered backend that was ready when it left.
    pub(in crate::balance) fn was_ready(&self, backend: &Backend) -> bool {
        let departure = backend.presence().departure.load(Relaxed);
        departure != 0 && self.backends.get(&departure).is_some_and(|departure| departure.was_ready)
    }
}

/// The number of members of the largest table of the last minutes. The newest table would not be enough: a
/// deleted one has no members, and its backends are to be remembered.
#[derive(Debug)]
struct LargestTable {
    now: usize,
    before: usize,
    period_began: Instant,
}

impl LargestTable {
    fn new() -> Self {
        Self { now: 0, before: 0, period_began: Instant::now() }
    }

    /// Takes in a table with this number of `members`, and returns that of the largest recent table.
    fn with(&mut self, members: usize, now: Instant) -> usize {
        if now.saturating_duration_since(self.period_began) >= REMEMBERED_FOR {
            // The largest size of the period that ends counts for the next one too, since its table may have
            // lasted until now.
            self.before = std::mem::take(&mut self.now);
            self.period_began = now;
        }
        self.now = self.now.max(members);
        self.now.max(self.before)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::condition::{Ejection, Health};
    use super::*;
    use crate::balance::pool::Cell;
    use crate::balance::values::{AdminState, BackendId, Balance, Policy, Table, Weight};

    const SECOND: Duration = Duration::from_secs(1);

    fn id(n: usize) -> BackendId {
        format!("10.0.{}.{}:80", n / 250, n % 250).parse().expect("an address")
    }

    /// A table of the members with these numbers, each with the weight 100.
    fn table(members: impl IntoIterator<Item = usize>) -> Table {
        let weight = Weight::new(100.0).expect("a weight");
        Table::new(members.into_iter().map(|n| (id(n), weight)).collect())
    }

    fn cell(members: usize, slow_start: Duration) -> Cell {
        let cell = Cell::new(Table::default(), Policy { slow_start, ..Balance::WeightedRandom.into() }, 1);
        cell.publish(table(0..members));
        cell
    }

    /// The effective weights, sorted by name.
    fn weights(cell: &Cell) -> Vec<f64> {
        let snapshot = cell.load();
        let mut members: Vec<_> = snapshot.members().iter().collect();
        members.sort_by(|a, b| a.backend.id().cmp(b.backend.id()));
        members.iter().map(|member| member.effective_weight.get()).collect()
    }

    fn backend(cell: &Cell, n: usize) -> Arc<Backend> {
        let snapshot = cell.load();
        let member = snapshot.members().iter().find(|member| *member.backend.id() == id(n));
        Arc::clone(&member.expect("it is a member").backend)
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_returns_within_minutes_keeps_its_condition() {
        let cell = cell(3, Duration::ZERO);
        backend(&cell, 0).condition.set_health(Health::Unhealthy);
        backend(&cell, 1).condition.set_ejection(Ejection::Ejected);
        backend(&cell, 2).condition.ejections.add(7);
        cell.publish(table([9]));
        assert_eq!(cell.registry().living().len(), 1, "a backend that is only remembered has no metrics");
        tokio::time::advance(REMEMBERED_FOR - SECOND).await;
        cell.publish(table(0..3));
        assert_eq!(weights(&cell), [0.0, 0.0, 100.0]);
        assert_eq!(backend(&cell, 2).condition.ejections.get(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_returns_after_its_time_is_new() {
        let cell = cell(2, 10 * SECOND);
        backend(&cell, 0).condition.set_health(Health::Unhealthy);
        cell.publish(table([1]));
        tokio::time::advance(REMEMBERED_FOR).await;
        cell.publish(table(0..2));
        assert_eq!(backend(&cell, 0).condition.health(), Health::Unchecked);
        assert_eq!(weights(&cell), [10.0, 100.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_keeps_the_counters_of_a_long_absent_member_but_the_slow_start_begins_again() {
        let cell = cell(2, 10 * SECOND);
        let held = backend(&cell, 0);
        cell.publish(table([1]));
        tokio::time::advance(REMEMBERED_FOR).await;
        cell.publish(table(0..2));
        assert!(Arc::ptr_eq(&held, &backend(&cell, 0)));
        assert_eq!(weights(&cell), [10.0, 100.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_start_goes_on_by_its_clock_while_its_backend_is_away() {
        let cell = cell(1, 10 * SECOND);
        cell.publish(table(0..2));
        assert_eq!(weights(&cell), [100.0, 10.0]);
        tokio::time::advance(2 * SECOND).await;
        cell.publish(table([0]));
        tokio::time::advance(3 * SECOND).await;
        cell.publish(table(0..2));
        assert_eq!(weights(&cell), [100.0, 50.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_table_that_is_deleted_and_written_one_by_one_begins_no_slow_start() {
        let cell = cell(8, 10 * SECOND);
        backend(&cell, 3).condition.set_health(Health::Unhealthy);
        for members in 1..=8 {
            tokio::time::advance(SECOND / 50).await;
            cell.publish(table(0..members));
        }
        assert_eq!(weights(&cell), [100.0, 100.0, 100.0, 0.0, 100.0, 100.0, 100.0, 100.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_table_that_grows_from_empty_one_by_one_begins_no_slow_start() {
        // Redis has answered that the table is empty: the pool keeps its table, or refuses sessions.
        for is_published in [false, true] {
            let policy = Policy { slow_start: 10 * SECOND, ..Balance::WeightedRandom.into() };
            let cell = Cell::new(Table::default(), policy, 1);
            if is_published {
                cell.publish(Table::default());
            } else {
                cell.confirm();
            }
            for members in 1..=8 {
                tokio::time::advance(SECOND / 50).await;
                cell.publish(table(0..members));
                assert_eq!(weights(&cell), vec![100.0; members], "{members} of 8");
            }
            tokio::time::advance(10 * SECOND).await;
            cell.refresh();
            assert_eq!(weights(&cell), [100.0; 8]);
            cell.publish(table(0..9));
            assert_eq!(weights(&cell)[8], 10.0, "the others were there for longer than slow_start");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_table_of_other_members_that_is_written_one_by_one_begins_no_slow_start() {
        let cell = cell(8, 10 * SECOND);
        for members in 1..=8 {
            tokio::time::advance(SECOND / 50).await;
            cell.publish(table(10..10 + members));
            assert_eq!(weights(&cell), vec![100.0; members], "{members} of 8");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn members_in_slow_start_get_their_whole_weight_when_the_others_are_gone() {
        let cell = cell(1, 10 * SECOND);
        cell.publish(table([0, 10]));
        assert_eq!(weights(&cell), [100.0, 10.0]);
        cell.publish(table([10]));
        cell.publish(table([10, 11]));
        assert_eq!(weights(&cell), [100.0, 100.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_left_in_maint_and_returns_ready_starts_slowly() {
        let cell = cell(2, 10 * SECOND);
        tokio::time::advance(10 * SECOND).await;
        cell.set_states(vec![(id(0), AdminState::Maint)]);
        cell.publish(table([1]).with_states(cell.states()));
        cell.publish(table(0..2));
        assert_eq!(weights(&cell), [10.0, 100.0]);
    }

    #[test]
    fn members_that_come_and_go_do_not_fill_the_memory() {
        let cell = cell(1, Duration::ZERO);
        for n in 1..10_000 {
            cell.publish(table([n]));
        }
        assert_eq!(cell.registry().living().len(), 1);
        assert_eq!(cell.registry().known(), LEAST_REMEMBERED + 1);
        // All members of a large table are remembered.
        cell.publish(table(0..5_000));
        cell.publish(table([0]));
        cell.publish(table([1]));
        assert_eq!(cell.registry().living().len(), 1);
        assert!((5_000..=10_001).contains(&cell.registry().known()), "{}", cell.registry().known());
    }

    #[tokio::test(start_paused = true)]
    async fn after_some_minutes_an_unchanged_table_lets_a_large_former_one_be_forgotten() {
        let cell = cell(5_000, Duration::ZERO);
        cell.publish(table([1]));
        tokio::time::advance(REMEMBERED_FOR).await;
        assert_eq!(cell.registry().living().len(), 1);
        assert_eq!(cell.registry().known(), 1);
    }
}
