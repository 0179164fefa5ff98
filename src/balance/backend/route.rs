//! The addresses that a session tries at one backend, in order.

use std::sync::Arc;

use super::addresses::{AddressNumber, Addresses, Endpoint, NamedAddress, TrialPermit};

/// The addresses that a session tries at one backend, in order.
#[derive(Debug)]
pub struct Route {
    first: Option<Endpoint>,
    /// The addresses of a name that are left, in reverse order: the last one is that in `first`.
    named: Vec<Arc<NamedAddress>>,
    /// The permit of the trial session, if this session is that of the first address.
    permit: Option<TrialPermit>,
}

impl Route {
    pub(in crate::balance) fn own(endpoint: Endpoint) -> Self {
        Self { first: Some(endpoint), named: Vec::new(), permit: None }
    }

    /// A route over the usable ones of `addresses`, of which `rotation` chooses the first. An address on
    /// trial comes before the usable ones: the one that the permit `given` is for, or else one that waits
    /// for a trial session. If no address is usable or on trial, health is ignored and all addresses are
    /// tried.
    pub(in crate::balance) fn named(
        addresses: &Addresses,
        rotation: usize,
        given: Option<TrialPermit>,
    ) -> Self {
        let current = addresses.current();
        let is_usable = |known: &&Arc<NamedAddress>| known.condition.is_usable();
        let mut named: Vec<_> = current.iter().filter(is_usable).cloned().collect();
        let mut permit = given;
        if permit.is_none() && !named.is_empty() && named.len() < current.len() {
            permit = current.iter().find_map(|known| known.take_trial());
        }
        let on_trial = permit.and_then(|permit| addresses.find(permit.address?)).cloned();
        if named.is_empty() && on_trial.is_none() {
            named = current.to_vec();
        }
        // The last address is tried first: `reverse` puts the rotated first one there, and the address on
        // trial, which is appended, comes before it.
        let first = rotation % named.len().max(1);
        named.rotate_left(first);
        named.reverse();
        named.extend(on_trial);
        Self { first: named.last().map(|known| known.endpoint()), named, permit }
    }

    /// The number of addresses left.
    #[must_use]
    pub fn len(&self) -> usize {
        if self.named.is_empty() { usize::from(self.first.is_some()) } else { self.named.len() }
    }

    /// True if no address is left, or the name has not been resolved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The address to try now. `None`: no address is left.
    #[must_use]
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.first.as_ref()
    }

    /// The number of the address to try now. `None`: the backend is not a DNS name, or no address is left.
    #[must_use]
    pub fn address(&self) -> Option<AddressNumber> {
        self.named.last().map(|known| known.number)
    }

    /// Takes the permit for the address that is tried now, if the session has one.
    pub fn take_permit(&mut self) -> Option<TrialPermit> {
        self.permit.take()
    }

    /// Goes on to the next address.
    pub fn advance(&mut self) {
        self.named.pop();
        self.first = self.named.last().map(|known| known.endpoint());
    }
}
