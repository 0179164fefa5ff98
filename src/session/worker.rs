//! What all sessions of one worker thread share.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{error, warn};

use super::report::SessionCounters;
use crate::balance::backend::Backend;
use crate::net::errors::exhausted;
use crate::observe::counters::{PerWorker, WorkerId};
use crate::relay;
use crate::session::access_log::AccessLog;

/// The shortest time between two log lines about exhausted descriptors or ports.
const EXHAUSTED_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The shortest time between two log lines about sessions that panicked.
const PANIC_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// How long accepting pauses after a session found no descriptor. Such sessions try again every 10 ms.
const STARVED_TIME: Duration = Duration::from_millis(30);

/// Detects a flood of clients that are reset before a byte was passed on.
///
/// Each such reset adds [`Resets::EACH`] to a count, and each session that begins subtracts one. So one
/// reset among eight sessions has no effect, and more are a flood.
#[derive(Debug, Default)]
struct Resets(Cell<u8>);

impl Resets {
    const EACH: u8 = 8;
    const MAX: u8 = 64;

    fn count(&self) {
        self.0.set((self.0.get() + Self::EACH).min(Self::MAX));
    }

    /// Counts a session that begins. True in a flood.
    fn begin_session(&self) -> bool {
        let resets = self.0.get();
        self.0.set(resets.saturating_sub(1));
        resets > Self::EACH
    }
}

/// The lack of descriptors for sessions. All workers share one, because descriptors belong to the process.
#[derive(Debug)]
pub struct Starvation {
    epoch: Instant,
    /// When the lack is over, in milliseconds since `epoch`; 0: there was none.
    until: AtomicU64,
}

impl Default for Starvation {
    fn default() -> Self {
        Self { epoch: Instant::now(), until: AtomicU64::new(0) }
    }
}

impl Starvation {
    /// Records that a session lacks a descriptor now.
    fn begin(&self) {
        let until = self.epoch.elapsed() + STARVED_TIME;
        self.until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// True for [`STARVED_TIME`] after a session lacked a descriptor.
    fn is_on(&self) -> bool {
        // The clock is not read before the first lack of descriptors.
        let until = self.until.load(Relaxed);
        until > 0 && self.epoch.elapsed() < Duration::from_millis(until)
    }
}

/// What the sessions of one worker thread share. Only that thread uses it, so there are no locks.
#[derive(Debug)]
pub struct Worker {
    /// The worker's number.
    pub id: WorkerId,
    /// What the relays of its sessions share.
    pub relay: relay::Shared,
    /// The access log. `None`: sessions are not logged.
    pub access_log: Option<AccessLog>,
    /// The counters of sessions, of all workers.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    rng: RefCell<fastrand::Rng>,
    active: Cell<u64>,
    became_idle: Notify,
    exhausted_logged: Cell<Option<Instant>>,
    panic_logged: Cell<Option<Instant>>,
    starvation: Arc<Starvation>,
    resets: Resets,
}

impl Worker {
    /// Creates a worker without sessions. `shortest_limit` is the shortest limit of silence that any session
    /// will have.
    #[must_use]
    pub fn new(
        id: WorkerId,
        shortest_limit: Duration,
        access_log: Option<AccessLog>,
        sessions: Arc<PerWorker<SessionCounters>>,
        starvation: Arc<Starvation>,
    ) -> Self {
        let (relay, error) = relay::Shared::new(shortest_limit);
        if let Some(error) = error
            && id == WorkerId(0)
        {
            let cure = "allow netlink sockets (systemd: AF_NETLINK in RestrictAddressFamilies=), \
                        or load the module tcp_diag";
            warn!(
                %error,
                cure,
                "the kernel does not report the state of TCP connections: a slow reader may be closed as \
                 idle, and a peer that vanishes with unacknowledged bytes is noticed late"
            );
        }
        Self {
            id,
            access_log,
            sessions,
            relay,
            rng: RefCell::new(fastrand::Rng::new()),
            active: Cell::new(0),
            became_idle: Notify::new(),
            exhausted_logged: Cell::new(None),
            panic_logged: Cell::new(None),
            starvation,
            resets: Resets::default(),
        }
    }

    /// The number of open sessions.
    #[must_use]
    pub fn active(&self) -> u64 {
        self.active.get()
    }

    /// Waits until no session is left. Cancel safe.
    pub async fn idle(&self) {
        while self.active.get() > 0 {
            self.became_idle.notified().await;
        }
    }

    pub(super) fn session_opened(&self) {
        self.active.set(self.active.get() + 1);
    }

    pub(super) fn session_closed(&self) {
        self.active.set(self.active.get() - 1);
        if self.active.get() == 0 {
            self.became_idle.notify_one();
        }
    }

    /// Counts a session that begins. Returns true in a flood of clients that are reset at once: the client
    /// of this session probably is, too.
    pub(super) fn expects_reset(&self) -> bool {
        self.resets.begin_session()
    }

    /// Counts a client that was reset before a byte was passed on.
    pub(super) fn count_reset(&self) {
        self.resets.count();
    }

    /// A random number of the worker's own generator.
    pub(super) fn random(&self) -> u64 {
        self.rng.borrow_mut().u64(..)
    }

    /// Records that a session lacks a descriptor for its backend.
    pub(super) fn begin_starvation(&self) {
        self.starvation.begin();
    }

    /// True while accepted sessions, here or on another worker, lack descriptors. Accepting more connections
    /// would take the descriptors that become free.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.starvation.is_on()
    }

    /// Logs that a session panicked, at most once per [`PANIC_LOG_INTERVAL`]: all sessions may meet the same
    /// defect, and each has its session line.
    pub(super) fn log_panic(&self, listener: &str, pool: &str, backend: Option<&str>) {
        let now = Instant::now();
        if self.panic_logged.get().is_none_or(|logged| now - logged >= PANIC_LOG_INTERVAL) {
            self.panic_logged.set(Some(now));
            error!(
                listener,
                pool, backend, "a session panicked, which is a defect: it is closed, and all others go on"
            );
        }
    }

    /// Logs that no descriptor, port or memory is left for a connection to `backend`, at most once per
    /// [`EXHAUSTED_LOG_INTERVAL`].
    pub(super) fn warn_exhausted(&self, backend: &Backend, error: &io::Error) {
        let now = Instant::now();
        if self.exhausted_logged.get().is_none_or(|logged| now - logged >= EXHAUSTED_LOG_INTERVAL) {
            self.exhausted_logged.set(Some(now));
            let cure = if exhausted(error) {
                "raise `ulimit -n` (LimitNOFILE)"
            } else {
                "widen net.ipv4.ip_local_port_range or add backends; for an IPv6 backend, check that IPv6 \
                 is on"
            };
            warn!(
                backend = %backend.id(), %error, cure,
                "nothing left on this machine for a backend connection"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_reset_changes_nothing_and_a_flood_does() {
        let resets = Resets::default();
        assert!(!resets.begin_session());
        resets.count();
        assert!((0..20).all(|_| !resets.begin_session()), "a health check that ends by a reset is no flood");
        resets.count();
        resets.count();
        assert!(resets.begin_session());
        (0..100).for_each(|_| resets.count());
        let after = (0..100).take_while(|_| resets.begin_session()).count();
        assert_eq!(after, usize::from(Resets::MAX - Resets::EACH), "it is over soon");
    }
}
