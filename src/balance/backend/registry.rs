//! The living backends of one pool, by name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::time::Instant;

use super::backend::Backend;
use super::departed::Departed;
use super::slots::Slots;
use crate::balance::queue::Queue;
use crate::balance::values::{BackendId, Balance, Policy};

/// The living backends of one pool, by name. Only the control plane asks it.
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
    /// Those of them that are remembered.
    departed: Departed,
    /// Above so many, the dead are dropped: seldom enough that each new backend pays for a few looks at most.
    sweep_above: usize,
}

/// So that a small pool is not swept for each new backend.
const SWEEP_LEAST: usize = 64;

impl Known {
    fn sweep(&mut self, mut keep: impl FnMut(&Weak<Backend>) -> bool) {
        self.backends.retain(|_, backend| keep(backend));
        self.sweep_above = 2 * self.backends.len() + SWEEP_LEAST;
    }
}

impl Registry {
    /// An empty registry of a pool without limits and without a queue. Its backends have counters for `workers` threads.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self::of_pool(workers, Arc::new(Balance::WeightedRandom.into()), Arc::default())
    }

    /// An empty registry of the pool with this policy. A backend that gets a free slot tells `queue`.
    #[must_use]
    pub fn of_pool(workers: usize, policy: Arc<Policy>, queue: Arc<Queue>) -> Self {
        Self { workers, policy, queue, known: Mutex::default() }
    }

    /// The living backend of that name, or a new one.
    #[must_use]
    pub fn get_or_create(&self, id: &BackendId) -> Arc<Backend> {
        let mut known = self.lock();
        if let Some(backend) = known.backends.get(id).and_then(Weak::upgrade) {
            return backend;
        }
        // Not only when someone scrapes: names that come and go would fill the memory of a proxy that nobody watches.
        if known.backends.len() > known.sweep_above {
            known.sweep(|backend| backend.strong_count() > 0);
        }
        let slots = Slots::new(self.policy.capacity.max_connections, Arc::clone(&self.queue));
        let backend = Arc::new(Backend::new(id.clone(), self.workers, slots));
        known.backends.insert(id.clone(), Arc::downgrade(&backend));
        backend
    }

    /// Goes by the snapshot `version`, which has the backends `now` and follows one with the backends `before`, of which each
    /// was ready or not.
    pub(in crate::balance) fn follow<'a>(
        &self,
        version: u64,
        before: impl Iterator<Item = (&'a Arc<Backend>, bool)>,
        now: impl Iterator<Item = &'a Arc<Backend>>,
    ) {
        self.lock().departed.follow(version, before, now);
    }

    /// Forgets the backends that left the table too long ago.
    pub(in crate::balance) fn forget_old(&self, now: Instant) {
        self.lock().departed.forget_old(now);
    }

    /// True for a backend that left the table a short time ago, and that was ready then.
    pub(in crate::balance) fn left_ready(&self, backend: &Backend) -> bool {
        backend.presence().references() > 0 && self.lock().departed.was_ready(backend)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are in memory.
    #[cfg(test)]
    pub(in crate::balance) fn known(&self) -> usize {
        self.lock().backends.len()
    }

    /// All that a snapshot or a session still holds, in the order of their names; not those that are only remembered. Forgets
    /// the others.
    #[must_use]
    pub fn living(&self) -> Vec<Arc<Backend>> {
        let mut living = self.living_in_any_order();
        living.sort_unstable_by(|a, b| a.id().cmp(b.id()));
        living
    }

    /// The same, not sorted.
    pub(in crate::balance) fn living_in_any_order(&self) -> Vec<Arc<Backend>> {
        let mut known = self.lock();
        known.departed.forget_old(Instant::now());
        let mut living = Vec::with_capacity(known.backends.len());
        known.sweep(|backend| {
            let backend = backend.upgrade();
            let is_alive = backend.is_some();
            // The reference of this line is one of them.
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
    fn a_backend_lives_as_long_as_someone_holds_it_and_returns_as_itself() {
        let registry = Registry::new(1);
        let first = registry.get_or_create(&id("10.0.0.1:80"));
        assert!(Arc::ptr_eq(&first, &registry.get_or_create(&id("10.0.0.1:80"))));
        drop(first);
        assert!(registry.living().is_empty());
    }

    #[test]
    fn backends_that_come_and_go_are_forgotten_though_nobody_asks() {
        let registry = Registry::new(1);
        let stay: Vec<_> =
            (0..100).map(|port| registry.get_or_create(&id(&format!("10.0.0.1:{}", 1 + port)))).collect();
        for port in 1..50_000 {
            drop(registry.get_or_create(&id(&format!("10.0.0.2:{port}"))));
        }
        let known = registry.known.lock().expect("nobody panics with it").backends.len();
        assert!(known <= 2 * stay.len() + SWEEP_LEAST + 1, "{known} are known, {} live", stay.len());
        assert_eq!(registry.living().len(), stay.len());
    }
}
