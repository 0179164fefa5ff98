//! The addresses of a backend: its own, or those that its DNS name resolved to.
//!
//! The addresses of one name fail and recover independently, so each has a [`Condition`] of its own. An
//! address keeps its condition for as long as lookups return it, and for some minutes after. A backend
//! without a name has one address, whose condition is the backend's.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;

use super::condition::{Condition, Ejection};
use super::presence::REMEMBERED_FOR;
use super::trial::TrialNumber;

/// The most removed addresses of one name that are remembered.
const MOST_REMOVED: usize = 64;

/// An address to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

/// Identifies one address of a backend's name for as long as the address is remembered. Two bytes, since a
/// session has no room for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressNumber(NonZeroU16);

/// Makes a session the trial session of a backend or of one address of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrialPermit {
    pub(in crate::balance) number: TrialNumber,
    /// `None`: the backend's own address.
    pub(in crate::balance) address: Option<AddressNumber>,
}

impl TrialPermit {
    /// Puts a permit together again from its parts.
    #[must_use]
    pub fn new(number: TrialNumber, address: Option<AddressNumber>) -> Self {
        Self { number, address }
    }

    /// The number of the trial.
    #[must_use]
    pub fn number(self) -> TrialNumber {
        self.number
    }

    /// The address that is on trial. `None`: the backend's own.
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

    /// Counts a session that has connected.
    pub(in crate::balance) fn count_connected(&self) {
        self.connected.fetch_add(1, Relaxed);
    }

    /// Counts a session that was answered, when it ends.
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

/// The addresses of one name. The control plane replaces this value as a whole.
#[derive(Debug, Default)]
pub(in crate::balance) struct Addresses {
    current: Box<[Arc<NamedAddress>]>,
    /// The addresses that the last lookup did not return, and since when.
    removed: Vec<(Instant, Arc<NamedAddress>)>,
    last_number: u16,
}

impl Addresses {
    pub(in crate::balance) fn current(&self) -> &[Arc<NamedAddress>] {
        &self.current
    }

    /// True if the current addresses equal `addresses`, which are sorted and without duplicates.
    pub(in crate::balance) fn are(&self, addresses: &[SocketAddr]) -> bool {
        self.current.iter().map(|known| known.address).eq(addresses.iter().copied())
    }

    pub(in crate::balance) fn find(&self, number: AddressNumber) -> Option<&Arc<NamedAddress>> {
        let removed = self.removed.iter().map(|(_, known)| known);
        self.current.iter().chain(removed).find(|known| known.number == number)
    }

    /// The addresses after a lookup has returned `addresses`, which are sorted and without duplicates. Known
    /// addresses keep their condition.
    pub(in crate::balance) fn next(&self, addresses: &[SocketAddr], now: Instant) -> Self {
        let mut last_number = self.last_number;
        let mut removed = self.removed.clone();
        removed.retain(|(since, _)| now.saturating_duration_since(*since) < REMEMBERED_FOR);
        let mut current = Vec::with_capacity(addresses.len());
        for address in addresses {
            let known = self.current.iter().find(|known| known.address == *address).cloned();
            let known = known.or_else(|| {
                let index = removed.iter().position(|(_, known)| known.address == *address)?;
                Some(removed.remove(index).1)
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

    /// Returns a number that no known address has. A number is always free: an answer of a name server has
    /// room for fewer addresses than there are numbers.
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
