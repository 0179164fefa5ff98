//! One address of a backend with its condition: what checks and ejections work on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::addresses::{AddressNumber, Endpoint, NamedAddress};
use super::backend::Backend;
use super::condition::{Condition, Reached};
use crate::balance::values::Address;

/// One address of a backend with its condition: the backend's own address, or one of those of its name.
#[derive(Clone, Debug)]
pub struct Target {
    backend: Arc<Backend>,
    named: Option<Arc<NamedAddress>>,
    /// The name has other addresses as well.
    is_one_of_several: bool,
}

impl Target {
    /// All addresses of `backend`. None while its name has not been resolved.
    pub fn all_of(backend: &Arc<Backend>) -> impl Iterator<Item = Self> + use<> {
        let is_name = matches!(backend.id().address(), Address::Name { .. });
        let addresses = is_name.then(|| backend.addresses());
        let count = addresses.as_ref().map_or(1, |addresses| addresses.current().len());
        let backend = Arc::clone(backend);
        (0..count).map(move |n| Self {
            backend: Arc::clone(&backend),
            named: addresses.as_ref().map(|addresses| Arc::clone(&addresses.current()[n])),
            is_one_of_several: count > 1,
        })
    }

    /// The backend that has this address.
    #[must_use]
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// The condition of the address.
    #[must_use]
    pub fn condition(&self) -> &Condition {
        self.named.as_ref().map_or(&self.backend.condition, |named| &named.condition)
    }

    /// The address to connect to.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        match (&self.named, self.backend.id().address()) {
            (Some(named), _) => named.endpoint(),
            (None, Address::Unix(path)) => Endpoint::Unix(path.clone()),
            (None, Address::Socket(address)) => Endpoint::Tcp(*address),
            (None, Address::Name { .. }) => unreachable!("a target of a name has one of its addresses"),
        }
    }

    /// The address, if it belongs to a DNS name. `None`: the backend is not a DNS name.
    #[must_use]
    pub fn named_address(&self) -> Option<SocketAddr> {
        self.named.as_ref().map(|named| named.address)
    }

    pub(in crate::balance) fn is_number(&self, number: AddressNumber) -> bool {
        self.named.as_ref().is_some_and(|named| named.number == number)
    }

    /// The address, if its name has several addresses. Log lines then name the address.
    #[must_use]
    pub fn address_of_several(&self) -> Option<SocketAddr> {
        self.named_address().filter(|_| self.is_one_of_several)
    }

    /// How many sessions have connected and were answered so far.
    #[must_use]
    pub fn reached(&self) -> Reached {
        match &self.named {
            // An address counts an answer only when the session ends. With a single address, the backend's
            // own counters are exact and are used instead.
            Some(named) if self.is_one_of_several => {
                Reached { connected: named.connected.load(Relaxed), answered: named.answered.load(Relaxed) }
            }
            _ => self.backend.reached(),
        }
    }

    /// False if the last lookup of the backend's name did not return the address.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.named.as_ref().is_none_or(|named| {
            self.backend.addresses().current().iter().any(|current| Arc::ptr_eq(current, named))
        })
    }
}
