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

use super::condition::{Condition, Ejection, TrialNumber};
use super::presence::REMEMBERED_FOR;

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
pub struct TrialPermit {
    pub(in crate::balance) number: TrialNumber,
    /// `None`: the backend's own address.
    pub(in crate::balance) address: Option<AddressNumber>,
}

impl TrialPermit {
    /// The parts of one that was given out, put together again.
    #[must_use]
    pub fn new(number: TrialNumber, address: Option<AddressNumber>) -> Self {
        Self { number, address }
    }

    /// Which probe it is.
    #[must_use]
    pub fn number(self) -> TrialNumber {
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
    pub(super) number: AddressNumber,
    pub(super) address: SocketAddr,
    pub(in crate::balance) condition: Condition,
    pub(super) connected: AtomicU64,
    pub(super) answered: AtomicU64,
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

    pub(in crate::balance) fn is_on_trial(&self) -> bool {
        self.condition.ejection() == Ejection::Trial && !self.condition.fails_checks()
    }

    pub(in crate::balance) fn take_trial(&self) -> Option<TrialPermit> {
        let number = if self.is_on_trial() { self.condition.take_trial()? } else { return None };
        Some(TrialPermit { number, address: Some(self.number) })
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
