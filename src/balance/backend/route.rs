//! The addresses that a session tries at one backend, in order.

use std::sync::Arc;

use super::addresses::{AddressNumber, Addresses, Endpoint, NamedAddress, TrialPermit};

/// The addresses that a session tries at one backend, in order.
#[derive(Debug)]
pub struct Route {
    first: Option<Endpoint>,
    /// Of a name, the last one first; `first` is in there.
    named: Vec<Arc<NamedAddress>>,
    /// The session is to show whether the first address is back.
    permit: Option<TrialPermit>,
}

impl Route {
    pub(in crate::balance) fn own(endpoint: Endpoint) -> Self {
        Self { first: Some(endpoint), named: Vec::new(), permit: None }
    }

    /// Through those of `addresses` that are usable, of which `turn` says the first. Before them comes the address that the
    /// session has the permit `given` for, or one that waits for a session to show that it is back. Where there is none of
    /// all these, health is ignored.
    pub(in crate::balance) fn named(addresses: &Addresses, turn: usize, given: Option<TrialPermit>) -> Self {
        let current = addresses.current();
        let is_usable = |known: &&Arc<NamedAddress>| known.condition.is_usable();
        let mut named: Vec<_> = current.iter().filter(is_usable).cloned().collect();
        let mut permit = given;
        if permit.is_none() && !named.is_empty() && named.len() < current.len() {
            permit = current.iter().find_map(|known| known.take_trial());
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
    pub fn take_permit(&mut self) -> Option<TrialPermit> {
        self.permit.take()
    }

    /// Goes on to the next one.
    pub fn advance(&mut self) {
        self.named.pop();
        self.first = self.named.last().map(|known| known.endpoint());
    }
}
