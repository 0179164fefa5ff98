//! Where a backend is reached: at its own address, or at the addresses that its name has.
//!
//! What sessions and checks find out belongs to an address, since the addresses of one name live and die apart. Each address
//! of a name has a [`Condition`] of its own, which it keeps for as long as lookups name it and for a while longer. A backend
//! without a name has one address, and its condition is the backend's.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;

use super::backend::Backend;
use super::condition::{Condition, Ejection, ProbeNumber, Reached};
use super::departed::REMEMBERED_FOR;
use crate::balance::values::Address;

/// Addresses that one name does not have any more and that are remembered.
const MOST_REMOVED: usize = 64;

/// Where to connect to, right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

/// Names one address of a backend's name for as long as that is known. Two bytes are what a session has left for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressNumber(NonZeroU16);

/// A session's permission to show whether an address is back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePermit {
    pub(in crate::balance) number: ProbeNumber,
    /// `None`: the backend's own address.
    pub(in crate::balance) address: Option<AddressNumber>,
}

impl ProbePermit {
    /// The parts of one that was given out, put together again.
    #[must_use]
    pub fn new(number: ProbeNumber, address: Option<AddressNumber>) -> Self {
        Self { number, address }
    }

    /// Which probe it is.
    #[must_use]
    pub fn number(self) -> ProbeNumber {
        self.number
    }

    /// The address of the backend's name that is probed. `None`: the backend's own.
    #[must_use]
    pub fn address(self) -> Option<AddressNumber> {
        self.address
    }
}

/// One address of a backend's name.
#[derive(Debug)]
pub(in crate::balance) struct NamedAddress {
    number: AddressNumber,
    address: SocketAddr,
    pub(in crate::balance) condition: Condition,
    connected: AtomicU64,
    answered: AtomicU64,
}

impl NamedAddress {
    pub(in crate::balance) fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address)
    }

    /// A session has connected there.
    pub(in crate::balance) fn count_connected(&self) {
        self.connected.fetch_add(1, Relaxed);
    }

    /// A session that was answered has ended.
    pub(in crate::balance) fn count_answered(&self) {
        self.answered.fetch_add(1, Relaxed);
    }

    pub(in crate::balance) fn is_probing(&self) -> bool {
        self.condition.ejection() == Ejection::Probing && !self.condition.fails_checks()
    }

    pub(in crate::balance) fn take_probe(&self) -> Option<ProbePermit> {
        let number = if self.is_probing() { self.condition.take_probe()? } else { return None };
        Some(ProbePermit { number, address: Some(self.number) })
    }
}

/// The addresses of one name, as the last lookup found them, in their order. Replaced as a whole by the control plane.
#[derive(Debug, Default)]
pub(in crate::balance) struct Addresses {
    current: Box<[Arc<NamedAddress>]>,
    /// Those that a lookup does not name any more, and since when.
    removed: Vec<(Instant, Arc<NamedAddress>)>,
    last_number: u16,
}

impl Addresses {
    pub(in crate::balance) fn current(&self) -> &[Arc<NamedAddress>] {
        &self.current
    }

    /// The same ones, sorted and named once.
    pub(in crate::balance) fn are(&self, addresses: &[SocketAddr]) -> bool {
        self.current.iter().map(|known| known.address).eq(addresses.iter().copied())
    }

    pub(in crate::balance) fn find(&self, number: AddressNumber) -> Option<&Arc<NamedAddress>> {
        let removed = self.removed.iter().map(|(_, known)| known);
        self.current.iter().chain(removed).find(|known| known.number == number)
    }

    /// What follows once a lookup has found `addresses`, sorted and each named once. Those that are known keep their condition.
    pub(in crate::balance) fn next(&self, addresses: &[SocketAddr], now: Instant) -> Self {
        let mut last_number = self.last_number;
        let mut removed = self.removed.clone();
        removed.retain(|(since, _)| now.saturating_duration_since(*since) < REMEMBERED_FOR);
        let mut current = Vec::with_capacity(addresses.len());
        for address in addresses {
            let known = self.current.iter().find(|known| known.address == *address).cloned();
            let known = known.or_else(|| {
                let place = removed.iter().position(|(_, known)| known.address == *address)?;
                Some(removed.remove(place).1)
            });
            current.push(known.unwrap_or_else(|| {
                let number = self.free_number(&mut last_number);
                Arc::new(NamedAddress {
                    number,
                    address: *address,
                    condition: Condition::default(),
                    connected: AtomicU64::new(0),
                    answered: AtomicU64::new(0),
                })
            }));
        }
        let gone = self.current.iter().filter(|known| addresses.binary_search(&known.address).is_err());
        removed.extend(gone.map(|known| (now, Arc::clone(known))));
        removed.drain(..removed.len().saturating_sub(MOST_REMOVED));
        Self { current: current.into(), removed, last_number }
    }

    /// A number that no known address has. There are more numbers than addresses that fit into an answer of a name server.
    fn free_number(&self, last: &mut u16) -> AddressNumber {
        loop {
            let next =
                AddressNumber(last.checked_add(1).and_then(NonZeroU16::new).unwrap_or(NonZeroU16::MIN));
            *last = next.0.get();
            if self.find(next).is_none() {
                return next;
            }
        }
    }
}

/// One address of a backend with what is known of it: its own, or one of those that its name has.
#[derive(Clone, Debug)]
pub struct Target {
    backend: Arc<Backend>,
    named: Option<Arc<NamedAddress>>,
    /// The name has others beside it.
    is_one_of_several: bool,
}

impl Target {
    /// All addresses of `backend`; none while its name has not been resolved.
    pub fn all_of(backend: &Arc<Backend>) -> impl Iterator<Item = Self> + use<> {
        let is_name = matches!(backend.id().address(), Address::Name { .. });
        let addresses = is_name.then(|| backend.addresses());
        let count = addresses.as_ref().map_or(1, |addresses| addresses.current.len());
        let backend = Arc::clone(backend);
        (0..count).map(move |n| Self {
            backend: Arc::clone(&backend),
            named: addresses.as_ref().map(|addresses| Arc::clone(&addresses.current[n])),
            is_one_of_several: count > 1,
        })
    }

    /// Whose address it is.
    #[must_use]
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// What is known of it.
    #[must_use]
    pub fn condition(&self) -> &Condition {
        self.named.as_ref().map_or(&self.backend.condition, |named| &named.condition)
    }

    /// Where to connect to.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        match (&self.named, self.backend.id().address()) {
            (Some(named), _) => named.endpoint(),
            (None, Address::Unix(path)) => Endpoint::Unix(path.clone()),
            (None, Address::Socket(address)) => Endpoint::Tcp(*address),
            (None, Address::Name { .. }) => unreachable!("a target of a name has one of its addresses"),
        }
    }

    /// The address among those of a name. `None`: the backend's own.
    #[must_use]
    pub fn named_address(&self) -> Option<SocketAddr> {
        self.named.as_ref().map(|named| named.address)
    }

    pub(in crate::balance) fn is_number(&self, number: AddressNumber) -> bool {
        self.named.as_ref().is_some_and(|named| named.number == number)
    }

    /// The address, where it is one of several: a line of the log says then which one it is about.
    #[must_use]
    pub fn address_of_several(&self) -> Option<SocketAddr> {
        self.named_address().filter(|_| self.is_one_of_several)
    }

    /// What its sessions have reached so far.
    #[must_use]
    pub fn reached(&self) -> Reached {
        match &self.named {
            // Each answer is counted when its session ends. A name with one address has better figures: its own.
            Some(named) if self.is_one_of_several => {
                Reached { connected: named.connected.load(Relaxed), answered: named.answered.load(Relaxed) }
            }
            _ => self.backend.reached(),
        }
    }

    /// False for an address that its name does not have any more.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.named.as_ref().is_none_or(|named| {
            self.backend.addresses().current.iter().any(|current| Arc::ptr_eq(current, named))
        })
    }
}

/// The addresses that a session tries at one backend, in order.
#[derive(Debug)]
pub struct Route {
    first: Option<Endpoint>,
    /// Of a name, the last one first; `first` is in there.
    named: Vec<Arc<NamedAddress>>,
    /// The session is to show whether the first address is back.
    permit: Option<ProbePermit>,
}

impl Route {
    pub(in crate::balance) fn own(endpoint: Endpoint) -> Self {
        Self { first: Some(endpoint), named: Vec::new(), permit: None }
    }

    /// Through those of `addresses` that are usable, of which `turn` says the first. Before them comes the address that the
    /// session has the permit `given` for, or one that waits for a session to show that it is back. Where there is none of
    /// all these, health is ignored.
    pub(in crate::balance) fn named(addresses: &Addresses, turn: usize, given: Option<ProbePermit>) -> Self {
        let current = addresses.current();
        let is_usable = |known: &&Arc<NamedAddress>| known.condition.is_usable();
        let mut named: Vec<_> = current.iter().filter(is_usable).cloned().collect();
        let mut permit = given;
        if permit.is_none() && !named.is_empty() && named.len() < current.len() {
            permit = current.iter().find_map(|known| known.take_probe());
        }
        let probed = permit.and_then(|permit| addresses.find(permit.address?)).cloned();
        if named.is_empty() && probed.is_none() {
            named = current.to_vec();
        }
        // A session with a permit takes no turn, and the last one is the first to be tried.
        let turns = turn % named.len().max(1);
        named.rotate_left(turns);
        named.reverse();
        named.extend(probed);
        Self { first: named.last().map(|known| known.endpoint()), named, permit }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        if self.named.is_empty() { usize::from(self.first.is_some()) } else { self.named.len() }
    }

    /// True for a name that has not been resolved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The one that is tried now. `None`: there is no other.
    #[must_use]
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.first.as_ref()
    }

    /// Which one that is among those of the backend's name.
    #[must_use]
    pub fn address(&self) -> Option<AddressNumber> {
        self.named.last().map(|known| known.number)
    }

    /// The permit that the session has for the address that is tried now, told once.
    pub fn take_permit(&mut self) -> Option<ProbePermit> {
        self.permit.take()
    }

    /// Goes on to the next one.
    pub fn advance(&mut self) {
        self.named.pop();
        self.first = self.named.last().map(|known| known.endpoint());
    }
}
