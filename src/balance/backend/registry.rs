//! Finds the living backends of one pool by name, and makes those that do not exist yet.
//!
//! The registry holds weak references: a backend lives as long as a snapshot, a session or the memory of
//! departed backends (`departed.rs`) refers to it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::time::Instant;

use super::backend::Backend;
use super::departed::Departed;
use super::slots::Slots;
use crate::balance::queue::Queue;
use crate::balance::values::{BackendId, Balance, Policy};

/// The living backends of one pool, by name. Used by the control plane alone.
#[derive(Debug)]
pub struct Registry {
    workers: usize,
    policy: Arc<Policy>,
    queue: Arc<Queue>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    backends: HashMap<BackendId, Weak<Backend>>,
    /// The backends that left the table and are remembered.
    departed: Departed,
    /// Dead entries are removed when there are more entries than this. It is more than twice the entries
    /// that the last sweep left, so each new backend pays for a few entries on average.
    sweep_above: usize,
}

/// At least this many backends are added between two sweeps, so that a small pool is not swept for each
/// one.
const SWEEP_LEAST: usize = 64;

impl Known {
    fn sweep(&mut self, mut keep: impl FnMut(&Weak<Backend>) -> bool) {
        self.backends.retain(|_, backend| keep(backend));
        self.sweep_above = 2 * self.backends.len() + SWEEP_LEAST;
    }
}

impl Registry {
    /// An empty registry of a pool without limits and without a queue. Its backends have counters for
    /// `workers` threads.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self::of_pool(workers, Arc::new(Balance::WeightedRandom.into()), Arc::default())
    }

    /// An empty registry of a pool with this policy. Its backends report free slots to `queue`.
    #[must_use]
    pub fn of_pool(workers: usize, policy: Arc<Policy>, queue: Arc<Queue>) -> Self {
        Self { workers, policy, queue, known: Mutex::default() }
    }

    /// Returns the living backend with this name, or makes one.
    #[must_use]
    pub fn get_or_create(&self, id: &BackendId) -> Arc<Backend> {
        let mut known = self.lock();
        if let Some(backend) = known.backends.get(id).and_then(Weak::upgrade) {
            return backend;
        }
        // Sweeps here as well as in a scrape: names that come and go would fill the memory of a proxy that
        // is never scraped.
        if known.backends.len() > known.sweep_above {
            known.sweep(|backend| backend.strong_count() > 0);
        }
        let slots = Slots::new(self.policy.capacity.max_connections, Arc::clone(&self.queue));
        let backend = Arc::new(Backend::new(id.clone(), self.workers, slots));
        known.backends.insert(id.clone(), Arc::downgrade(&backend));
        backend
    }

    /// Records the change to snapshot `version`: see [`Departed::follow`].
    pub(in crate::balance) fn follow<'a>(
        &self,
        version: u64,
        before: impl Iterator<Item = (&'a Arc<Backend>, bool)>,
        now: impl Iterator<Item = &'a Arc<Backend>>,
    ) {
        self.lock().departed.follow(version, before, now);
    }

    /// Forgets the backends that left the table too long ago: see [`Departed::forget_old`].
    pub(in crate::balance) fn forget_old(&self, now: Instant) {
        self.lock().departed.forget_old(now);
    }

    /// True for a remembered backend that was ready when it left the table.
    pub(in crate::balance) fn left_ready(&self, backend: &Backend) -> bool {
        backend.presence().references() > 0 && self.lock().departed.was_ready(backend)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of entries in memory.
    #[cfg(test)]
    pub(in crate::balance) fn known(&self) -> usize {
        self.lock().backends.len()
    }

    /// The backends that a snapshot or a session uses, sorted by name, without those that are only
    /// remembered. Also removes dead entries, and forgets backends that left too long ago.
    #[must_use]
    pub fn living(&self) -> Vec<Arc<Backend>> {
        let mut living = self.living_in_any_order();
        living.sort_unstable_by(|a, b| a.id().cmp(b.id()));
        living
    }

    /// As [`Registry::living`], unsorted.
    pub(in crate::balance) fn living_in_any_order(&self) -> Vec<Arc<Backend>> {
        let mut known = self.lock();
        known.departed.forget_old(Instant::now());
        let mut living = Vec::with_capacity(known.backends.len());
        known.sweep(|backend| {
            let backend = backend.upgrade();
            let is_alive = backend.is_some();
            // One reference is that of `upgrade` above; the memory of departed backends has another.
            let is_used =
                |backend: &Arc<Backend>| Arc::strong_count(backend) > 1 + backend.presence().references();
            living.extend(backend.filter(is_used));
            is_alive
        });
        living
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> BackendId {
        text.parse().expect("a valid address")
    }

    #[test]
    fn a_backend_lives_as_long_as_it_is_referred_to_and_is_found_by_name_meanwhile() {
        let registry = Registry::new(1);
        let first = registry.get_or_create(&id("10.0.0.1:80"));
        assert!(Arc::ptr_eq(&first, &registry.get_or_create(&id("10.0.0.1:80"))));
        drop(first);
        assert!(registry.living().is_empty());
    }

    #[test]
    fn backends_that_come_and_go_are_removed_without_a_scrape() {
        let registry = Registry::new(1);
        let stay: Vec<_> =
            (0..100).map(|port| registry.get_or_create(&id(&format!("10.0.0.1:{}", 1 + port)))).collect();
        for port in 1..50_000 {
            drop(registry.get_or_create(&id(&format!("10.0.0.2:{port}"))));
        }
        let known = registry.known.lock().expect("no thread panics while it holds the lock").backends.len();
        assert!(known <= 2 * stay.len() + SWEEP_LEAST + 1, "{known} are known, {} live", stay.len());
        assert_eq!(registry.living().len(), stay.len());
    }
}
