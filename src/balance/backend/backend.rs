//! A backend as long as it lives: through any number of snapshots, and until its last session ends.
//!
//! Whatever must survive a weight change (health, counters, resolved addresses) is kept here, not in the snapshot.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::addresses::{AddressNumber, Addresses, Endpoint, NamedAddress, TrialPermit};
use super::condition::{Condition, Ejection, Reached, TrialProgress};
use super::presence::{DrainingSince, Presence};
use super::route::Route;

use super::slots::Slots;
use crate::balance::values::{Address, BackendId};
use crate::observe::counters::{BackendCounters, PerWorker};

/// Identifies a [`Backend`] for as long as the process lives, among the backends of all pools: a backend that comes back after it
/// was forgotten has another key. A session's entry in the worker's idle clock has room for it, but not for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey(u64);

impl BackendKey {
    /// A key that no other backend has.
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }

    /// The plain number.
    #[inline]
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

/// One backend of one pool. Shared by snapshots and sessions.
#[derive(Debug)]
pub struct Backend {
    key: BackendKey,
    id: BackendId,
    /// For a DNS name: what it last resolved to; empty until it first did.
    addresses: ArcSwap<Addresses>,
    /// Rotates over `addresses`.
    turn: AtomicUsize,
    slots: Slots,
    presence: Presence,
    /// What is known of it. The health and the ejection of a DNS name are those of its addresses: see [`Backend::is_usable`].
    pub condition: Condition,
    /// Whether its sessions are to end.
    pub draining: DrainingSince,
    /// What the workers count of it.
    pub counters: PerWorker<BackendCounters>,
}

impl Backend {
    pub(super) fn new(id: BackendId, workers: usize, slots: Slots) -> Self {
        Self {
            key: BackendKey::new(),
            id,
            addresses: ArcSwap::default(),
            turn: AtomicUsize::new(0),
            slots,
            presence: Presence::default(),
            condition: Condition::default(),
            draining: DrainingSince::default(),
            counters: PerWorker::new(workers),
        }
    }

    /// Tells this object from all other backends.
    #[inline]
    #[must_use]
    pub fn key(&self) -> BackendKey {
        self.key
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// Sessions that it has, those that are about to connect among them.
    #[must_use]
    pub fn active(&self) -> u32 {
        self.slots.active()
    }

    #[inline]
    pub(in crate::balance) fn slots(&self) -> &Slots {
        &self.slots
    }

    pub(in crate::balance) fn presence(&self) -> &Presence {
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

    fn is_name(&self) -> bool {
        matches!(self.id.address(), Address::Name { .. })
    }

    pub(in crate::balance) fn addresses(&self) -> Arc<Addresses> {
        self.addresses.load_full()
    }

    /// Where the next session connects to. `permit` is what it got with its pick.
    #[inline]
    #[must_use]
    pub fn route(&self, permit: Option<TrialPermit>) -> Route {
        match self.id.address() {
            Address::Socket(address) => Route::own(Endpoint::Tcp(*address)),
            Address::Unix(path) => Route::own(Endpoint::Unix(path.clone())),
            Address::Name { .. } => {
                let turn = self.turn.fetch_add(1, Relaxed);
                Route::named(&self.addresses.load(), turn, permit)
            }
        }
    }

    /// Sessions may be sent there: neither checks nor sessions speak against it, or against one of the addresses of its name.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        if !self.is_name() {
            return self.condition.is_usable();
        }
        let addresses = self.addresses.load();
        addresses.current().is_empty() || addresses.current().iter().any(|known| known.condition.is_usable())
    }

    /// It gets one session, which shows whether it is back, and no others.
    pub(in crate::balance) fn is_on_trial(&self) -> bool {
        if !self.is_name() {
            return self.condition.ejection() == Ejection::Trial && !self.condition.fails_checks();
        }
        !self.is_usable() && self.addresses.load().current().iter().any(|known| known.is_on_trial())
    }

    /// For the one session that a probing backend gets. It is to say what becomes of it, and to end its probe.
    pub(in crate::balance) fn take_trial(&self) -> Option<TrialPermit> {
        if self.is_name() {
            return self.addresses.load().current().iter().find_map(|known| known.take_trial());
        }
        self.condition.take_trial().map(|number| TrialPermit { number, address: None })
    }

    /// Sessions are just finding out whether it is back, or have found out.
    pub(in crate::balance) fn has_trial_session(&self) -> bool {
        if !self.is_name() {
            return self.condition.has_trial_session();
        }
        let addresses = self.addresses.load();
        let waits = |known: &Arc<NamedAddress>| known.is_on_trial() && !known.condition.has_trial_session();
        !addresses.current().iter().any(waits)
    }

    /// The session with this permit has come so far; `Wanted`: it is over. False: its probe is over.
    pub(in crate::balance) fn move_trial(&self, permit: TrialPermit, to: TrialProgress) -> bool {
        let moved = |condition: &Condition| match to {
            TrialProgress::Wanted => {
                condition.end_trial(permit.number);
                true
            }
            to => condition.move_trial(permit.number, to),
        };
        match permit.address {
            None => moved(&self.condition),
            Some(number) => self.at_address(number, |known| moved(&known.condition)).unwrap_or(false),
        }
    }

    /// `None`: the name does not have that address any more.
    pub(in crate::balance) fn at_address<T>(
        &self,
        number: AddressNumber,
        what: impl FnOnce(&NamedAddress) -> T,
    ) -> Option<T> {
        self.addresses.load().find(number).map(|known| what(known))
    }

    /// A session has connected to that address of its name.
    pub fn count_connected_at(&self, number: AddressNumber) {
        self.at_address(number, NamedAddress::count_connected);
    }

    /// A session that was answered at that address of its name has ended.
    pub fn count_answered_at(&self, number: AddressNumber) {
        self.at_address(number, NamedAddress::count_answered);
    }

    /// False for a name that never resolved: picking it could only fail.
    #[must_use]
    pub fn is_reachable(&self) -> bool {
        !self.is_name() || !self.addresses.load().current().is_empty()
    }

    /// Replaces what its name resolved to, also by more or fewer addresses; none at all change nothing. Returns true if they are
    /// others than before.
    pub fn set_resolved(&self, mut addresses: Vec<SocketAddr>) -> bool {
        // Resolvers rotate their answers; sorted, the same answer twice is seen as the same.
        addresses.sort_unstable();
        addresses.dedup();
        let before = self.addresses.load_full();
        if addresses.is_empty() || before.are(&addresses) {
            return false;
        }
        self.addresses.store(Arc::new(before.next(&addresses, Instant::now())));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::active::Active;
    use super::super::condition::Health;
    use super::super::registry::Registry;
    use super::super::target::Target;
    use super::*;

    fn id(text: &str) -> BackendId {
        text.parse().expect("a valid address")
    }

    #[test]
    fn sessions_are_counted_from_their_begin_to_their_end() {
        let backend = Registry::new(1).get_or_create(&id("10.0.0.1:80"));
        let [first, second] = [0, 1].map(|_| Active::take(&backend).expect("there is no limit"));
        assert_eq!((backend.active(), first.id()), (2, backend.id()));
        drop((first, second));
        assert_eq!(backend.active(), 0);
    }

    /// Where the next session connects to, in order.
    fn tries(backend: &Backend) -> Vec<Endpoint> {
        let mut route = backend.route(None);
        let mut tries = Vec::new();
        while let Some(endpoint) = route.endpoint().cloned() {
            tries.push(endpoint);
            route.advance();
        }
        tries
    }

    fn addresses<const N: usize>(last: [u8; N]) -> [SocketAddr; N] {
        last.map(|last| SocketAddr::from(([10, 0, 0, last], 5432)))
    }

    #[test]
    fn a_name_is_reachable_once_resolved_and_gives_its_addresses_in_turn() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        assert_eq!((tries(&backend), backend.is_reachable()), (vec![], false));
        let [a, b] = addresses([1, 2]);
        assert!(backend.set_resolved(vec![b, a, b]));
        assert!(!backend.set_resolved(vec![a, b]) && !backend.set_resolved(vec![]));
        let seen: Vec<_> = (0..4).map(|_| tries(&backend)).collect();
        assert_eq!(seen.iter().filter(|e| **e == [Endpoint::Tcp(a), Endpoint::Tcp(b)]).count(), 2);
        assert_eq!(seen.iter().filter(|e| **e == [Endpoint::Tcp(b), Endpoint::Tcp(a)]).count(), 2);
    }

    #[test]
    fn sessions_leave_out_a_dead_address_and_take_the_others_in_turn_until_none_is_left() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        let [a, b, c] = addresses([1, 2, 3]);
        backend.set_resolved(vec![a, b, c]);
        let targets: Vec<_> = Target::all_of(&backend).collect();
        targets[1].condition().set_ejection(Ejection::Ejected);
        let seen: Vec<_> = (0..4).map(|_| tries(&backend)).collect();
        assert_eq!(seen.iter().filter(|e| **e == [Endpoint::Tcp(a), Endpoint::Tcp(c)]).count(), 2);
        assert_eq!(seen.iter().filter(|e| **e == [Endpoint::Tcp(c), Endpoint::Tcp(a)]).count(), 2);
        assert!(backend.is_usable());
        targets[0].condition().set_health(Health::Unhealthy);
        targets[2].condition().set_health(Health::Unhealthy);
        assert_eq!((backend.is_usable(), tries(&backend).len()), (false, 3), "health is ignored");
    }

    #[test]
    fn one_session_probes_an_address_and_goes_on_to_the_others_if_it_fails() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        let [a, b] = addresses([1, 2]);
        backend.set_resolved(vec![a, b]);
        let targets: Vec<_> = Target::all_of(&backend).collect();
        targets[1].condition().set_ejection(Ejection::Trial);
        let mut route = backend.route(None);
        let permit = route.take_permit().expect("a probe is wanted");
        assert_eq!((route.endpoint(), route.len()), (Some(&Endpoint::Tcp(b)), 2));
        assert_eq!(tries(&backend), [Endpoint::Tcp(a)], "one session probes");
        assert!(backend.move_trial(permit, TrialProgress::Wanted));
        assert_eq!(tries(&backend), [Endpoint::Tcp(b), Endpoint::Tcp(a)]);
    }

    #[test]
    fn an_address_keeps_its_condition_through_lookups_and_a_new_one_has_none() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        let [a, b, c] = addresses([1, 2, 3]);
        backend.set_resolved(vec![a]);
        let health = || -> Vec<_> {
            Target::all_of(&backend)
                .map(|t| (t.named_address().expect("one"), t.condition().health()))
                .collect()
        };
        Target::all_of(&backend).for_each(|target| target.condition().set_health(Health::Unhealthy));
        assert!(!backend.is_usable());
        assert!(backend.set_resolved(vec![c, b, a]));
        let new = [(b, Health::Unchecked), (c, Health::Unchecked)];
        assert_eq!(health(), [&[(a, Health::Unhealthy)], &new[..]].concat());
        assert!(backend.set_resolved(vec![b, c]));
        assert_eq!((health(), backend.is_usable()), (new.to_vec(), true));
        assert!(backend.set_resolved(vec![a, c]));
        assert_eq!(health(), [(a, Health::Unhealthy), new[1]], "it was away for a moment");
    }

    #[test]
    fn a_name_that_always_has_other_addresses_fills_no_memory() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        for n in 0..200_000u32 {
            backend.set_resolved(vec![SocketAddr::from((n.to_be_bytes(), 80))]);
        }
        let known = backend.addresses();
        assert!(format!("{known:?}").matches("NamedAddress").count() <= 65);
    }
}
