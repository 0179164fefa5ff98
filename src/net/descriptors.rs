//! Reserves the last descriptors of the process for the control plane.
//!
//! Clients decide how many descriptors the data plane wants. If it took all of them, the control plane
//! could answer no request of the admin server, connect to no Redis, save no table and resolve no name. So
//! the data plane may use all but a reserve.
//!
//! The kernel gives out the lowest free number. A new descriptor with a number in the reserve therefore
//! means that all lower numbers are in use. The data plane closes such a descriptor and treats it like
//! EMFILE. Reading the number costs no system call.
//!
//! | numbers, of `limit` | data plane | health checks | admin server | Redis, saved tables, lookups |
//! |---|---|---|---|---|
//! | below `limit - reserve` | yes | yes | yes | yes |
//! | the lower half of the reserve | no | yes | few connections | few lookups of backends |
//! | the upper half | no | no | few connections | few lookups of backends |
//!
//! The limit is the process's, so the state is static.

use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};

/// The size of the reserve. With a small limit it is a quarter of the limit.
const RESERVE: u64 = 128;

/// The first number that the data plane may not use, and the first that health checks may not use. Nothing
/// is reserved before [`keep_reserve`] is called.
static END_OF_SESSIONS: AtomicU64 = AtomicU64::new(u64::MAX);
static END_OF_CHECKS: AtomicU64 = AtomicU64::new(u64::MAX);
static LISTENING_SOCKETS: AtomicU64 = AtomicU64::new(0);

/// A part of the process that may use only a part of the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// The data plane: connections of clients, connections to backends, and pipes.
    Sessions,
    /// Health checks, which may use half of the reserve.
    Checks,
}

impl User {
    fn end(self) -> u64 {
        match self {
            Self::Sessions => &END_OF_SESSIONS,
            Self::Checks => &END_OF_CHECKS,
        }
        .load(Relaxed)
    }
}

/// Keeps a reserve from now on. The reserve has one more descriptor for each of the `listening_sockets` (at
/// most a quarter of the limit), because each may hold one accepted connection that waits for a lower
/// number.
pub fn keep_reserve(listening_sockets: usize) {
    LISTENING_SOCKETS.fetch_max(listening_sockets as u64, Relaxed);
    read_limit();
}

/// True if `descriptor`, which was just opened, is in a part of the reserve that `user` may not use.
#[must_use]
pub fn is_reserved(descriptor: &impl AsFd, user: User) -> bool {
    let number = u64::try_from(descriptor.as_fd().as_raw_fd()).unwrap_or(u64::MAX);
    number >= user.end() && is_still_reserved(number, user)
}

/// Reads the limit again, which may have been raised meanwhile (`prlimit`), and compares `number` with it.
#[cold]
fn is_still_reserved(number: u64, user: User) -> bool {
    read_limit();
    number >= user.end()
}

fn read_limit() {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let (sessions, checks) = ends(limit, LISTENING_SOCKETS.load(Relaxed));
    END_OF_SESSIONS.store(sessions, Relaxed);
    END_OF_CHECKS.store(checks, Relaxed);
}

/// The first numbers that sessions and checks may not use.
fn ends(limit: u64, listening_sockets: u64) -> (u64, u64) {
    let reserve = RESERVE.min(limit / 4);
    (limit - reserve - listening_sockets.min(limit / 4), limit - reserve / 2)
}

/// True while the data plane has used all descriptors that it may use. Costs two system calls.
#[must_use]
pub fn are_short() -> bool {
    if END_OF_SESSIONS.load(Relaxed) == u64::MAX {
        return false;
    }
    // The new descriptor has the lowest free number.
    eventfd(0, EventfdFlags::CLOEXEC).map_or(true, |probe| is_reserved(&probe, User::Sessions))
}

/// Returns about how many descriptors the data plane could open now, for a warning at the start. Counts all
/// numbers above the lowest free one as free, although a few may be in use.
#[must_use]
pub fn left_for_sessions() -> u64 {
    let lowest =
        eventfd(0, EventfdFlags::CLOEXEC).ok().and_then(|probe| u64::try_from(probe.as_raw_fd()).ok());
    END_OF_SESSIONS.load(Relaxed).saturating_sub(lowest.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Rlimit, setrlimit};

    #[test]
    fn the_reserve_is_a_quarter_of_a_small_limit_and_128_of_a_large_one() {
        for (limit, expected) in [
            (16, (12, 14)),
            (64, (48, 56)),
            (256, (192, 224)),
            (1_024, (896, 960)),
            (1_048_576, (1_048_448, 1_048_512)),
        ] {
            assert_eq!(ends(limit, 0), expected, "of {limit}");
        }
        assert_eq!(ends(256, 10), (182, 224), "one more for each listening socket");
        assert_eq!(ends(256, 1_000), (128, 224), "sessions keep half");
    }

    #[test]
    fn a_descriptor_in_the_reserve_is_recognized_by_its_number() {
        let low = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
        assert!(!is_reserved(&low, User::Sessions), "nothing is reserved yet");
        keep_reserve(0);
        let limit = getrlimit(Resource::Nofile).current.expect("a limit");
        let high = |number: u64| {
            let number = i32::try_from(number).expect("Linux has fewer");
            rustix::io::fcntl_dupfd_cloexec(&low, number).expect("a free number")
        };
        let (sessions, checks) = ends(limit, 0);
        assert!(!is_reserved(&low, User::Sessions) && !are_short());
        assert!(!is_reserved(&high(sessions - 1), User::Sessions));
        let reserved = high(sessions);
        assert!(is_reserved(&reserved, User::Sessions) && !is_reserved(&reserved, User::Checks));
        assert!(is_reserved(&high(checks), User::Checks));
        drop(reserved);

        // A limit that is raised while the process runs takes effect.
        let usual = getrlimit(Resource::Nofile);
        let limit_to =
            |current| setrlimit(Resource::Nofile, Rlimit { current, ..usual }).expect("a soft limit");
        limit_to(Some(200));
        keep_reserve(0);
        let reserved = high(160);
        assert!(is_reserved(&reserved, User::Sessions));
        limit_to(usual.current);
        assert!(!is_reserved(&reserved, User::Sessions));
    }
}
