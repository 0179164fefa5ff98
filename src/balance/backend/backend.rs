//! One backend, from the table that first names it until its last session ends and it is forgotten.
//!
//! What must survive a weight change (health, counters, resolved addresses) is kept here and not in the
//! snapshot.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::addresses::{AddressNumber, Addresses, Endpoint, NamedAddress, TrialPermit};
use super::condition::{Condition, Ejection, Reached};
use super::presence::{DrainingSince, Presence};
use super::route::Route;
use super::slots::Slots;
use super::trial::TrialProgress;
use crate::balance::values::{Address, BackendId};
use crate::observe::counters::{BackendCounters, PerWorker};

/// Identifies a [`Backend`] object among those of all pools, for as long as the process lives. A backend
/// that returns after it was forgotten is a new object with a new key. A session's entry in the idle clock
/// has room for a key, but not for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey(u64);

impl BackendKey {
    /// Makes a key that no other backend has.
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
    /// What a DNS name resolved to last. Empty until the first answer, and for a backend without a name.
    addresses: ArcSwap<Addresses>,
    /// Counts the sessions of a DNS name, so that they rotate over its addresses.
    rotation: AtomicUsize,
    slots: Slots,
    presence: Presence,
    /// The health, the ejection and the slow start of the backend. A DNS name has a health and an ejection
    /// for each of its addresses instead: see [`Backend::is_usable`].
    pub condition: Condition,
    /// Since when the backend is draining.
    pub draining: DrainingSince,
    /// What each worker counts of this backend.
    pub counters: PerWorker<BackendCounters>,
}

impl Backend {
    pub(super) fn new(id: BackendId, workers: usize, slots: Slots) -> Self {
        Self {
            key: BackendKey::new(),
            id,
            addresses: ArcSwap::default(),
            rotation: AtomicUsize::new(0),
            slots,
            presence: Presence::default(),
            condition: Condition::default(),
            draining: DrainingSince::default(),
            counters: PerWorker::new(workers),
        }
    }

    /// Identifies this object among all backends.
    #[inline]
    #[must_use]
    pub fn key(&self) -> BackendKey {
        self.key
    }

    /// The name of the backend.
    #[must_use]
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// The number of sessions that have a slot, including those that are still connecting.
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

    /// How many sessions have connected and were answered so far.
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

    /// The addresses that the next session connects to. `permit` came with its pick.
    #[inline]
    #[must_use]
    pub fn route(&self, permit: Option<TrialPermit>) -> Route {
        match self.id.address() {
            Address::Socket(address) => Route::own(Endpoint::Tcp(*address)),
            Address::Unix(path) => Route::own(Endpoint::Unix(path.clone())),
            Address::Name { .. } => {
                let rotation = self.rotation.fetch_add(1, Relaxed);
                Route::named(&self.addresses.load(), rotation, permit)
            }
        }
    }

    /// True if sessions may be sent to the backend: its checks do not fail and it is not ejected. A DNS name
    /// is usable if one of its addresses is, or if it has not been resolved.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        if !self.is_name() {
            return self.condition.is_usable();
        }
        let addresses = self.addresses.load();
        addresses.current().is_empty() || addresses.current().iter().any(|known| known.condition.is_usable())
    }

    /// True if the backend is on trial and its checks do not fail. A DNS name is on trial if none of its
    /// addresses is usable and one of them is on trial.
    pub(in crate::balance) fn is_on_trial(&self) -> bool {
        if !self.is_name() {
            return self.condition.ejection() == Ejection::Trial && !self.condition.fails_checks();
        }
        !self.is_usable() && self.addresses.load().current().iter().any(|known| known.is_on_trial())
    }

    /// Gives out the trial session, if there is none yet. The caller reports its progress by
    /// [`Backend::move_trial`] and ends it with `TrialProgress::Wanted`.
    pub(in crate::balance) fn take_trial(&self) -> Option<TrialPermit> {
        if self.is_name() {
            return self.addresses.load().current().iter().find_map(|known| known.take_trial());
        }
        self.condition.take_trial().map(|number| TrialPermit { number, address: None })
    }

    /// True if each address on trial has its trial session, or a result of it.
    pub(in crate::balance) fn has_trial_session(&self) -> bool {
        if !self.is_name() {
            return self.condition.has_trial_session();
        }
        let addresses = self.addresses.load();
        let waits = |known: &Arc<NamedAddress>| known.is_on_trial() && !known.condition.has_trial_session();
        !addresses.current().iter().any(waits)
    }

    /// Records the progress of the trial session that has `permit`. `Wanted`: the session is over. Returns
    /// false if `to` is another progress and the trial has ended already.
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

    /// Calls `what` with one address of the backend's name, which lookups may have ceased to return.
    /// `None`: no address with this number is remembered.
    pub(in crate::balance) fn at_address<T>(
        &self,
        number: AddressNumber,
        what: impl FnOnce(&NamedAddress) -> T,
    ) -> Option<T> {
        self.addresses.load().find(number).map(|known| what(known))
    }

    /// Counts a session that connected to this address of the backend's name.
    pub fn count_connected_at(&self, number: AddressNumber) {
        self.at_address(number, NamedAddress::count_connected);
    }

    /// Counts a session that was answered at this address of the backend's name. Called when the session
    /// ends.
    pub fn count_answered_at(&self, number: AddressNumber) {
        self.at_address(number, NamedAddress::count_answered);
    }

    /// False for a name that was never resolved, which no session could connect to.
    #[must_use]
    pub fn is_reachable(&self) -> bool {
        !self.is_name() || !self.addresses.load().current().is_empty()
    }

    /// Replaces the addresses of the backend's name, unless `addresses` is empty. Returns true if the
    /// addresses have changed.
    pub fn set_resolved(&self, mut addresses: Vec<SocketAddr>) -> bool {
        // Resolvers rotate their answers. Sorted, two answers with the same addresses are equal.
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

    /// The addresses that the next session tries, in order.
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
    fn a_name_is_reachable_once_resolved_and_rotates_over_its_addresses() {
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
    fn sessions_skip_a_dead_address_and_rotate_over_the_others_until_none_is_left() {
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
    fn one_trial_session_tries_an_ejected_address_and_goes_on_to_the_others_if_it_fails() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        let [a, b] = addresses([1, 2]);
        backend.set_resolved(vec![a, b]);
        let targets: Vec<_> = Target::all_of(&backend).collect();
        targets[1].condition().set_ejection(Ejection::Trial);
        let mut route = backend.route(None);
        let permit = route.take_permit().expect("a trial session is wanted");
        assert_eq!((route.endpoint(), route.len()), (Some(&Endpoint::Tcp(b)), 2));
        assert_eq!(tries(&backend), [Endpoint::Tcp(a)], "there is one trial session");
        assert!(backend.move_trial(permit, TrialProgress::Wanted));
        assert_eq!(tries(&backend), [Endpoint::Tcp(b), Endpoint::Tcp(a)]);
    }

    #[test]
    fn an_address_keeps_its_condition_through_lookups_and_a_new_address_starts_unchecked() {
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
    fn a_name_whose_addresses_always_change_does_not_fill_the_memory() {
        let backend = Registry::new(1).get_or_create(&id("db.internal:5432"));
        for n in 0..200_000u32 {
            backend.set_resolved(vec![SocketAddr::from((n.to_be_bytes(), 80))]);
        }
        let known = backend.addresses();
        assert!(format!("{known:?}").matches("NamedAddress").count() <= 65);
    }
}
