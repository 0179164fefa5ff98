//! A backend as long as it lives: through any number of snapshots, and until its last session ends.
//!
//! Whatever must survive a weight change (health, counters, resolved addresses) is kept here, not in the snapshot.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::condition::{Condition, Reached};
use super::departed::{Departed, Presence};
use super::leaving::Leaving;
pub use super::places::Active;
use super::places::Places;
use super::queue::{Capacity, Queue};
use super::{Address, BackendId};
use crate::telemetry::counters::{BackendCounters, PerWorker};

/// One backend of one pool. Shared by snapshots and sessions.
#[derive(Debug)]
pub struct Backend {
    id: BackendId,
    /// For a DNS name: what it last resolved to; empty until it first did.
    resolved: ArcSwap<Vec<SocketAddr>>,
    /// Rotates over `resolved`.
    turn: AtomicUsize,
    places: Places,
    presence: Presence,
    /// What is known of its health.
    pub condition: Condition,
    /// Whether its sessions are to end.
    pub leaving: Leaving,
    /// What the workers count of it.
    pub counters: PerWorker<BackendCounters>,
}

/// Where to connect to, right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

impl Backend {
    fn new(id: BackendId, workers: usize, places: Places) -> Self {
        Self {
            id,
            resolved: ArcSwap::default(),
            turn: AtomicUsize::new(0),
            places,
            presence: Presence::default(),
            condition: Condition::default(),
            leaving: Leaving::default(),
            counters: PerWorker::new(workers),
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// Sessions that it has, those that are about to connect among them.
    #[must_use]
    pub fn active(&self) -> u32 {
        self.places.active()
    }

    #[inline]
    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    pub(super) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// What its sessions have reached so far.
    #[must_use]
    pub fn reached(&self) -> Reached {
        Reached {
            connected: self.counters.sum(|counters| &counters.connections),
            answered: self.counters.sum(|counters| &counters.answered),
        }
    }

    /// The place of the next session's first address among several.
    #[must_use]
    pub fn next_turn(&self) -> usize {
        match self.id.address() {
            Address::Name { .. } => self.turn.fetch_add(1, Relaxed),
            Address::Socket(_) | Address::Unix(_) => 0,
        }
    }

    /// How many places it can be reached at; 0 for a name that has not been resolved.
    #[must_use]
    pub fn endpoints(&self) -> usize {
        match self.id.address() {
            Address::Name { .. } => self.resolved.load().len(),
            Address::Socket(_) | Address::Unix(_) => 1,
        }
    }

    /// Where to connect to; a name's addresses follow each other as `turn` counts. `None`: it has not been resolved.
    #[must_use]
    pub fn endpoint(&self, turn: usize) -> Option<Endpoint> {
        match self.id.address() {
            Address::Socket(address) => Some(Endpoint::Tcp(*address)),
            Address::Unix(path) => Some(Endpoint::Unix(path.clone())),
            Address::Name { .. } => {
                let resolved = self.resolved.load();
                resolved.get(turn % resolved.len().max(1)).copied().map(Endpoint::Tcp)
            }
        }
    }

    /// False for a name that never resolved: picking it could only fail.
    #[must_use]
    pub fn is_reachable(&self) -> bool {
        !matches!(self.id.address(), Address::Name { .. }) || !self.resolved.load().is_empty()
    }

    /// Replaces what its name resolved to. Returns true if that made the backend reachable.
    pub fn set_resolved(&self, mut addresses: Vec<SocketAddr>) -> bool {
        // Resolvers rotate their answers; sorted, the same answer twice is seen as the same.
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() || **self.resolved.load() == addresses {
            return false;
        }
        self.resolved.swap(Arc::new(addresses)).is_empty()
    }
}

/// The living backends of one pool, by name. Only the control plane asks it.
#[derive(Debug)]
pub struct Registry {
    workers: usize,
    max_connections: u32,
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
    /// Empty; its backends will count for `workers` threads, and take any number of sessions.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self::with_capacity(workers, &Capacity::default())
    }

    /// The same, but its backends will take so many sessions as they may.
    #[must_use]
    pub fn with_capacity(workers: usize, capacity: &Capacity) -> Self {
        let queue = Arc::new(Queue::new(capacity));
        Self { workers, max_connections: capacity.max_connections, queue, known: Mutex::default() }
    }

    /// Who waits for a place at one of its backends.
    #[must_use]
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
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
        let places = Places::new(self.max_connections, Arc::clone(&self.queue));
        let backend = Arc::new(Backend::new(id.clone(), self.workers, places));
        known.backends.insert(id.clone(), Arc::downgrade(&backend));
        backend
    }

    /// Goes by the snapshot `version`, which has the backends `now` and follows one with the backends `before`, of which each
    /// was ready or not.
    pub(super) fn follow<'a>(
        &self,
        version: u64,
        before: impl Iterator<Item = (&'a Arc<Backend>, bool)>,
        now: impl Iterator<Item = &'a Arc<Backend>>,
    ) {
        self.lock().departed.follow(version, before, now);
    }

    /// Forgets the backends that left the table too long ago.
    pub(super) fn forget_old(&self, now: Instant) {
        self.lock().departed.forget_old(now);
    }

    /// True for a backend that left the table a short time ago, and that was ready then.
    pub(super) fn left_ready(&self, backend: &Backend) -> bool {
        backend.presence.references() > 0 && self.lock().departed.was_ready(backend)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are in memory.
    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        self.lock().backends.len()
    }

    /// All that a snapshot or a session still holds, in the order of their names; not those that are only remembered. Forgets
    /// the others.
    #[must_use]
    pub fn living(&self) -> Vec<Arc<Backend>> {
        let mut living = self.living_in_any_order();
        living.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        living
    }

    /// The same, not sorted.
    pub(super) fn living_in_any_order(&self) -> Vec<Arc<Backend>> {
        let mut known = self.lock();
        known.departed.forget_old(Instant::now());
        let mut living = Vec::with_capacity(known.backends.len());
        known.sweep(|backend| {
            let backend = backend.upgrade();
            let is_alive = backend.is_some();
            // The reference of this line is one of them.
            let is_used =
                |backend: &Arc<Backend>| Arc::strong_count(backend) > 1 + backend.presence.references();
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
    fn sessions_are_counted_from_their_begin_to_their_end() {
        let backend = Registry::new(1).get_or_create(&id("10.0.0.1:80"));
        let [first, second] = [0, 1].map(|_| Active::take(&backend).expect("there is no limit"));
        assert_eq!((backend.active(), first.id()), (2, backend.id()));
        drop((first, second));
        assert_eq!(backend.active(), 0);
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

    #[test]
    fn a_name_is_reachable_once_resolved_and_gives_its_addresses_in_turn() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        assert_eq!((backend.endpoint(0), backend.endpoints(), backend.is_reachable()), (None, 0, false));
        let [a, b] = ["10.0.0.1:5432", "10.0.0.2:5432"].map(|text| text.parse().expect("an address"));
        assert!(backend.set_resolved(vec![b, a, b]));
        assert!(!backend.set_resolved(vec![a, b]) && !backend.set_resolved(vec![]));
        let seen: Vec<_> = (0..4).filter_map(|_| backend.endpoint(backend.next_turn())).collect();
        assert_eq!(seen.iter().filter(|e| **e == Endpoint::Tcp(a)).count(), 2);
        assert_eq!(seen.iter().filter(|e| **e == Endpoint::Tcp(b)).count(), 2);
    }
}
