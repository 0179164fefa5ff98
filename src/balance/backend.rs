//! A backend as long as it lives: through any number of snapshots, and until its last session ends.
//!
//! Whatever must survive a weight change (counters and resolved addresses today) is kept here, not in the snapshot.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::ArcSwap;

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
    fn new(id: BackendId, workers: usize) -> Self {
        Self {
            id,
            resolved: ArcSwap::default(),
            turn: AtomicUsize::new(0),
            counters: PerWorker::new(workers),
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// Where the next session connects to. A name with several addresses gives each in turn. `None`: the name has not
    /// been resolved.
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        match self.id.address() {
            Address::Socket(address) => Some(Endpoint::Tcp(*address)),
            Address::Unix(path) => Some(Endpoint::Unix(path.clone())),
            Address::Name { .. } => {
                let resolved = self.resolved.load();
                let turn = self.turn.fetch_add(1, Relaxed);
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
    backends: Mutex<HashMap<BackendId, Weak<Backend>>>,
}

impl Registry {
    /// Empty; its backends will count for `workers` threads.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self { workers, backends: Mutex::default() }
    }

    /// The living backend of that name, or a new one.
    #[must_use]
    pub fn get_or_create(&self, id: &BackendId) -> Arc<Backend> {
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backend) = backends.get(id).and_then(Weak::upgrade) {
            return backend;
        }
        let backend = Arc::new(Backend::new(id.clone(), self.workers));
        backends.insert(id.clone(), Arc::downgrade(&backend));
        backend
    }

    /// All that a snapshot or a session still holds, in the order of their names. Forgets the others.
    #[must_use]
    pub fn living(&self) -> Vec<Arc<Backend>> {
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        let mut living = Vec::with_capacity(backends.len());
        backends.retain(|_, backend| match backend.upgrade() {
            Some(backend) => {
                living.push(backend);
                true
            }
            None => false,
        });
        living.sort_unstable_by(|a, b| a.id.cmp(&b.id));
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
    fn a_name_is_reachable_once_resolved_and_gives_its_addresses_in_turn() {
        let backend = Backend::new(id("db.internal:5432"), 1);
        assert_eq!((backend.endpoint(), backend.is_reachable()), (None, false));
        let [a, b] = ["10.0.0.1:5432", "10.0.0.2:5432"].map(|text| text.parse().expect("an address"));
        assert!(backend.set_resolved(vec![b, a, b]));
        assert!(!backend.set_resolved(vec![a, b]) && !backend.set_resolved(vec![]));
        let seen: Vec<_> = (0..4).filter_map(|_| backend.endpoint()).collect();
        assert_eq!(seen.iter().filter(|e| **e == Endpoint::Tcp(a)).count(), 2);
        assert_eq!(seen.iter().filter(|e| **e == Endpoint::Tcp(b)).count(), 2);
    }
}
