//! Asks the system's resolver for the addresses of a host.
//!
//! Which names are asked for, and when, is for `resolve.rs` (backends) and `redis/connection.rs`.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::control::blocking::{self, Job};

/// A lookup that a thread is busy with.
pub type Lookup = Job<io::Result<Vec<SocketAddr>>>;

/// Starts a lookup of `host`, which has one of `places` until the system's library returns: that may be long after the
/// caller has given up. Waits without limit for a place and a thread.
///
/// # Cancel safety
/// As [`blocking::start`].
pub async fn start(places: &'static Semaphore, host: Arc<str>, port: u16) -> Lookup {
    blocking::start(places, move || (&*host, port).to_socket_addrs().map(Iterator::collect)).await
}

/// The address that `host` stands for without any lookup.
#[must_use]
pub fn literal(host: &str, port: u16) -> Option<SocketAddr> {
    host.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, port))
}
