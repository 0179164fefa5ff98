//! The snapshot cell: the control plane publishes the newest snapshot here, and the data plane reads it
//! without waiting.
//!
//! The cell also holds the time at which the snapshot was last confirmed, which changes while the snapshot
//! stays the same. It is the time at which Redis was asked, not at which Redis answered, so that a slow
//! answer does not make the snapshot look younger than it is.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;
use tokio::time::Instant;

use super::draining::DrainingBackends;
use crate::balance::backend::Registry;
use crate::balance::queue::Queue;
use crate::balance::snapshot::{Origin, Snapshot, Unusable, Usable};
use crate::balance::values::{AdminState, BackendId, Policy, Table};

const NEVER: u64 = u64::MAX;

/// What the control plane has to act on or log about the newest snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotStatus {
    /// See [`Snapshot::fails_open`].
    pub fails_open: bool,
    /// See [`Snapshot::ramps`].
    pub ramps: bool,
    /// See [`Snapshot::usable`].
    pub usable: Usable,
}

/// The newest snapshot of one pool.
#[derive(Debug)]
pub struct Cell {
    newest: ArcSwap<Snapshot>,
    /// The table of the newest snapshot. The next snapshot is made from it when a backend changes. Only the
    /// control plane locks it.
    table: Mutex<Table>,
    policy: Arc<Policy>,
    registry: Arc<Registry>,
    queue: Arc<Queue>,
    /// Sends when the newest table was published.
    published: watch::Sender<SystemTime>,
    /// Sends a notice when names have other addresses.
    readdressed: watch::Sender<()>,
    /// Sends the status of the newest snapshot, when it changes.
    status: watch::Sender<SnapshotStatus>,
    /// Sends which backends are draining.
    draining_backends: DrainingBackends,
    /// Milliseconds from `epoch` to the last confirmation, or [`NEVER`].
    confirmed: AtomicU64,
    epoch: Instant,
}

impl Cell {
    /// A cell without a pool, with a registry and a queue of its own.
    #[must_use]
    pub fn new(configured: Table, policy: impl Into<Policy>, workers: usize) -> Self {
        let policy = Arc::new(policy.into());
        let queue = Arc::new(Queue::new(policy.capacity.queue_size));
        let registry = Arc::new(Registry::of_pool(workers, Arc::clone(&policy), Arc::clone(&queue)));
        Self::of_pool(configured, policy, registry, queue)
    }

    /// A cell that starts with the table of config.yaml, which no source has confirmed. Each new snapshot
    /// takes its backends from `registry` and wakes the waiters of `queue`.
    #[must_use]
    pub fn of_pool(
        configured: Table,
        policy: Arc<Policy>,
        registry: Arc<Registry>,
        queue: Arc<Queue>,
    ) -> Self {
        let first = Snapshot::new(1, Origin::Configured, &configured, *policy, &registry);
        registry.follow(first.version, std::iter::empty(), first.members().iter().map(|m| &m.backend));
        Self {
            newest: ArcSwap::from_pointee(first),
            table: Mutex::new(configured),
            policy,
            registry,
            queue,
            published: watch::Sender::new(SystemTime::now()),
            readdressed: watch::Sender::default(),
            status: watch::Sender::default(),
            draining_backends: DrainingBackends::default(),
            confirmed: AtomicU64::new(NEVER),
            epoch: Instant::now(),
        }
    }

    /// The newest snapshot. Do not keep the guard across an `.await`: a thread has few fast guards, and
    /// further loads on that thread get slower.
    #[inline]
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.newest.load()
    }

    /// The living backends of the pool.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Publishes what Redis holds now: see [`Cell::publish_as_of`].
    pub fn publish(&self, table: Table) -> bool {
        self.publish_as_of(table, Instant::now())
    }

    /// Publishes a table that Redis returned for a question at `asked`, and confirms the snapshot as of
    /// `asked`. Returns true if there is a new snapshot; an unchanged table from Redis makes none.
    pub fn publish_as_of(&self, table: Table, asked: Instant) -> bool {
        let mut current = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = self.newest.load();
        let changed = newest.origin != Origin::Redis || *current != table;
        if changed {
            // After a confirmed empty table, the next table is not the first one from Redis: its backends
            // are new.
            let is_first = newest.origin != Origin::Redis && self.age().is_none();
            let (policy, registry) = (*self.policy, &self.registry);
            self.store(newest.next_or_first(Origin::Redis, &table, policy, registry, is_first));
            *current = table;
            self.published.send_replace(SystemTime::now());
        }
        self.confirm_as_of(asked);
        changed
    }

    /// Publishes a table that Redis held before this process began, unless a table from Redis has been
    /// published meanwhile. Does not confirm it.
    pub fn restore(&self, table: Table) {
        let mut current = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = self.newest.load();
        if newest.origin == Origin::Configured {
            self.store(newest.next(Origin::Saved, &table, *self.policy, &self.registry));
            *current = table;
            self.published.send_replace(SystemTime::now());
        }
    }

    /// The table of the newest snapshot. Cheap, since tables share their memory.
    #[must_use]
    pub fn table(&self) -> Table {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The backends of the newest table that are not ready.
    #[must_use]
    pub fn states(&self) -> Vec<(BackendId, AdminState)> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).states().to_vec()
    }

    /// Keeps the members of the table and replaces the states of its backends.
    pub fn set_states(&self, states: Vec<(BackendId, AdminState)>) {
        let mut current = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let table = current.clone().with_states(states);
        if *current != table {
            let newest = self.newest.load();
            self.store(newest.next(newest.origin, &table, *self.policy, &self.registry));
            *current = table;
            self.published.send_replace(SystemTime::now());
        }
    }

    /// A receiver for the times at which new tables are published. A slow reader sees only the newest
    /// time. The receiver works as long as the cell lives.
    #[must_use]
    pub fn published(&self) -> watch::Receiver<SystemTime> {
        self.published.subscribe()
    }

    /// Makes the snapshot again from the same table, because a backend has changed.
    pub fn refresh(&self) {
        let current = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = self.newest.load();
        self.store(newest.next(newest.origin, &current, *self.policy, &self.registry));
    }

    /// Makes the snapshot again because names have other addresses.
    pub fn readdress(&self) {
        self.refresh();
        self.readdressed.send_replace(());
    }

    /// A receiver that is notified when names have other addresses. It works as long as the cell lives.
    #[must_use]
    pub fn readdressed(&self) -> watch::Receiver<()> {
        self.readdressed.subscribe()
    }

    /// A receiver for the status of the newest snapshot. It is notified only when the status changes, and
    /// works as long as the cell lives.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<SnapshotStatus> {
        self.status.subscribe()
    }

    /// The draining backends. The list stays empty if `drain.timeout` is zero.
    #[must_use]
    pub fn draining_backends(&self) -> &DrainingBackends {
        &self.draining_backends
    }

    /// The settings of the pool.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    fn store(&self, next: Snapshot) {
        let before = self.newest.load();
        let (was, is) = (before.members_and_stand_ins(), next.members_and_stand_ins());
        let was = was.map(|member| (&member.backend, member.state == AdminState::Ready));
        self.registry.follow(next.version, was, is.map(|member| &member.backend));
        let status = SnapshotStatus { fails_open: next.fails_open, ramps: next.ramps, usable: next.usable() };
        if !self.policy.drain_timeout.is_zero() {
            self.draining_backends.update(&next, &self.registry);
        }
        self.newest.store(Arc::new(next));
        self.queue.renewed();
        self.status.send_if_modified(|before| std::mem::replace(before, status) != status);
    }

    /// Returns the backends in drain or maint, and the backends with sessions that have the weight 0 or
    /// are not members. Each comes with the number of its sessions.
    #[must_use]
    pub fn draining(&self) -> Vec<(BackendId, u32)> {
        let newest = self.load();
        let (mut seen, mut draining) = (HashSet::new(), Vec::new());
        for member in newest.members_and_stand_ins() {
            let is_ready = member.state == AdminState::Ready;
            if !is_ready {
                draining.push((member.backend.id().clone(), member.backend.active()));
            }
            if !is_ready || member.wants_sessions() {
                seen.insert(member.backend.key());
            }
        }
        for backend in self.registry.living_in_any_order() {
            let sessions = backend.active();
            if sessions > 0 && !seen.contains(&backend.key()) {
                draining.push((backend.id().clone(), sessions));
            }
        }
        draining
    }

    /// The members of the newest snapshot that get no sessions, at most `most` of them.
    #[must_use]
    pub fn unusable(&self, most: usize) -> Unusable {
        Unusable::of(&self.load(), most)
    }

    /// Confirms that the newest snapshot is what Redis holds now.
    pub fn confirm(&self) {
        self.confirm_as_of(Instant::now());
    }

    /// Confirms that the newest snapshot is what Redis held at `asked` or later.
    pub fn confirm_as_of(&self, asked: Instant) {
        let millis = asked.saturating_duration_since(self.epoch).as_millis();
        self.confirmed.store(u64::try_from(millis).unwrap_or(NEVER - 1), Relaxed);
    }

    /// The time since the newest snapshot was last confirmed. `None`: it was never confirmed.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        match self.confirmed.load(Relaxed) {
            NEVER => None,
            millis => Some(self.epoch.elapsed().saturating_sub(Duration::from_millis(millis))),
        }
    }

    /// True if the newest snapshot was last confirmed at most `max_stale` before `now`.
    ///
    /// The caller passes the time, because reading the clock costs more than a pick.
    #[inline]
    #[must_use]
    pub fn is_fresh_at(&self, now: Instant, max_stale: Duration) -> bool {
        match self.confirmed.load(Relaxed) {
            NEVER => false,
            // Adds instead of subtracting: the difference of two instants is a function call that costs as
            // much as the draw.
            millis => {
                let until = self.epoch.checked_add(Duration::from_millis(millis).saturating_add(max_stale));
                until.is_none_or(|until| now <= until)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::values::Balance;

    fn table(weight: f64) -> Table {
        Table::of(&[("10.0.0.1:80", weight)])
    }

    #[tokio::test(start_paused = true)]
    async fn an_unchanged_table_confirms_without_a_new_snapshot() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        assert_eq!(cell.age(), None);
        assert!(cell.publish(table(1.0)), "the origin changes from the file to redis");
        let version = cell.load().version;
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(cell.age(), Some(Duration::from_secs(7)));
        assert!(!cell.publish(table(1.0)));
        assert_eq!((cell.load().version, cell.age()), (version, Some(Duration::ZERO)));
        assert!(cell.publish(table(2.0)));
        assert_eq!(cell.load().version, version + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_table_is_as_old_as_the_question_for_it() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        let second = Duration::from_secs(1);
        tokio::time::advance(second).await;
        let asked = Instant::now();
        tokio::time::advance(second).await;
        cell.publish_as_of(table(2.0), asked);
        assert_eq!(cell.age(), Some(second));
        let asked = Instant::now();
        tokio::time::advance(second).await;
        cell.confirm_as_of(asked);
        assert_eq!(cell.age(), Some(second));
    }

    #[tokio::test(start_paused = true)]
    async fn a_saved_table_comes_before_the_configured_one_and_after_redis() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        let mut published = cell.published();
        cell.restore(table(2.0));
        let first = Arc::clone(&cell.load());
        assert_eq!((first.origin, first.members()[0].weight.get()), (Origin::Saved, 2.0));
        assert!(published.has_changed().expect("the cell lives"));
        assert_eq!(cell.age(), None, "it is not confirmed");

        published.mark_unchanged();
        assert!(cell.publish(table(2.0)), "the origin changes from the file to redis");
        assert!(published.has_changed().expect("the cell lives"));
        cell.restore(table(3.0));
        let last = cell.load();
        assert_eq!((last.origin, last.members()[0].weight.get()), (Origin::Redis, 2.0), "redis is newer");
    }

    #[tokio::test]
    async fn each_receiver_is_told_of_a_new_table_and_not_of_an_unchanged_one() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        let listeners = [cell.published(), cell.published()];
        cell.publish(table(2.0));
        for mut listener in listeners {
            assert!(listener.has_changed().expect("the cell lives"));
            listener.mark_unchanged();
            cell.publish(table(2.0));
            cell.refresh();
            assert!(!listener.has_changed().expect("the cell lives"));
        }
    }

    #[test]
    fn a_backend_is_the_same_object_in_every_snapshot() {
        let cell = Cell::new(table(1.0), Balance::WeightedRandom, 1);
        let first = Arc::clone(&cell.load().members()[0].backend);
        cell.publish(table(5.0));
        cell.refresh();
        assert!(Arc::ptr_eq(&first, &cell.load().members()[0].backend));
    }
}
