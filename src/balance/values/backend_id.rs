//! The name of a backend: the text from Redis or config.yaml, unchanged, with the address that it was parsed
//! into.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use super::address::{Address, InvalidAddress};

/// The name of one backend of a pool. Cheap to clone and compared by its text: `localhost:80` and
/// `127.0.0.1:80` are two backends.
#[derive(Clone)]
pub struct BackendId(Arc<Inner>);

struct Inner {
    text: Box<str>,
    address: Address,
}

impl BackendId {
    /// The text as it is in Redis or config.yaml.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// The parsed address.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0.address
    }
}

impl FromStr for BackendId {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let address = text.parse()?;
        Ok(Self(Arc::new(Inner { text: text.into(), address })))
    }
}

impl PartialEq for BackendId {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.as_str() == other.as_str()
    }
}

impl Eq for BackendId {}

impl PartialOrd for BackendId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for BackendId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.as_str().cmp(other.as_str())
    }
}

impl Hash for BackendId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl Borrow<str> for BackendId {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
