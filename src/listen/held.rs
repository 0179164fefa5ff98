//! Holds a connection whose descriptor is in the control plane's reserve (`net/descriptors.rs`) until
//! another descriptor is free.
//!
//! Meanwhile the listening socket accepts nothing, and clients wait in the kernel's queue.

use std::time::Duration;

use socket2::Socket;

use crate::net::descriptors::{User, is_reserved};
use crate::observe::counters::ListenerCounters;
use crate::reactor::sleep;

/// The time between two tries to get another descriptor.
const PAUSE: Duration = Duration::from_millis(50);

/// The reason why a connection is held, for the log.
#[derive(Debug, thiserror::Error)]
#[error("too many open files: the last descriptors are kept for the admin server, Redis and health checks")]
pub(super) struct Reserved;

/// Returns `socket` with a descriptor outside of the reserve, as soon as one is free and no earlier session
/// lacks one (`is_starved`). Returns it unchanged once `goes_on` is false. Each pause counts as a failed
/// accept.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(super) async fn until_not_reserved(
    socket: Socket,
    counters: &ListenerCounters,
    is_starved: impl Fn() -> bool,
    goes_on: impl Fn() -> bool,
) -> Socket {
    while goes_on() {
        counters.accept_exhausted.add(1);
        sleep(PAUSE).await;
        if is_starved() {
            continue;
        }
        // The copy has the lowest free number. Dropping the original frees its number.
        if let Ok(copy) = socket.try_clone()
            && !is_reserved(&copy, User::Sessions)
        {
            return copy;
        }
    }
    socket
}
