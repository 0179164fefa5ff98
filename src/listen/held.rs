//! Holds a connection that was accepted on one of the last descriptors, which are kept for the control plane, until another
//! descriptor is free. Meanwhile its socket accepts nothing, and clients wait in the kernel's queue.

use std::time::Duration;

use socket2::Socket;

use crate::net::descriptors::{User, is_reserved};
use crate::observe::counters::ListenerCounters;
use crate::reactor::sleep;

/// Between two looks at whether a descriptor is free.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a connection is held.
#[derive(Debug, thiserror::Error)]
#[error("too many open files: the last descriptors are kept for the admin server, Redis and health checks")]
pub(super) struct Reserved;

/// Gives `socket` a number outside of the reserve as soon as there is one that no session which was accepted before lacks
/// (`is_starved`). Gives it back as it is once it need not wait any more (`goes_on`). Each pause counts as a failed accept.
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
        // A copy has the lowest number that is free, and the number of the one before is free then.
        if let Ok(copy) = socket.try_clone()
            && !is_reserved(&copy, User::Sessions)
        {
            return copy;
        }
    }
    socket
}
