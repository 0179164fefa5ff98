//! One lookup: asks the system's resolver for the addresses of a host.
//!
//! `resolve.rs` (names of backends) and `redis` (names of servers) decide which names are looked up, and
//! when.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::control::blocking::{self, Job};

/// A lookup that runs on a thread. Ready with its result.
pub type Lookup = Job<io::Result<Vec<SocketAddr>>>;

/// Starts a lookup of `host`. Waits without limit for one of `permits` and for a thread.
///
/// The lookup keeps its permit until the system's library returns, which may be long after the caller has
/// given up.
///
/// # Cancel safety
/// As [`blocking::start`].
pub async fn start(permits: &'static Semaphore, host: Arc<str>, port: u16) -> Lookup {
    blocking::start(permits, move || (&*host, port).to_socket_addrs().map(Iterator::collect)).await
}

/// Returns the address that `host` is, if `host` is an IP address, which needs no lookup.
#[must_use]
pub fn literal(host: &str, port: u16) -> Option<SocketAddr> {
    host.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, port))
}
