//! What all sessions of one data-plane thread share: owned by the thread, never locked.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use super::report::SessionCounters;
use crate::balance::backend::Backend;
use crate::listen::socket::exhausted;
use crate::relay;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::counters::{PerWorker, WorkerId};

/// One line an outage, not one a session.
const EXHAUSTED_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Sessions that lack a descriptor ask again every 10 ms.
const STARVED_TIME: Duration = Duration::from_millis(30);

/// One thread's own things.
#[derive(Debug)]
pub struct Worker {
    /// Which thread.
    pub id: WorkerId,
    /// What the relays of its sessions share.
    pub relay: relay::Shared,
    /// `None`: sessions are not logged.
    pub access_log: Option<AccessLog>,
    /// How sessions ended.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    rng: RefCell<fastrand::Rng>,
    active: Cell<u64>,
    became_idle: Notify,
    exhausted_logged: Cell<Option<Instant>>,
    /// When a session last lacked a descriptor.
    starved: Cell<Option<Instant>>,
}

impl Worker {
    /// Without sessions. `shortest_limit` is the shortest silence that any session will be allowed.
    #[must_use]
    pub fn new(
        id: WorkerId,
        shortest_limit: Duration,
        access_log: Option<AccessLog>,
        sessions: Arc<PerWorker<SessionCounters>>,
    ) -> Self {
        Self {
            id,
            access_log,
            sessions,
            relay: relay::Shared::new(shortest_limit),
            rng: RefCell::new(fastrand::Rng::new()),
            active: Cell::new(0),
            became_idle: Notify::new(),
            exhausted_logged: Cell::new(None),
            starved: Cell::new(None),
        }
    }

    /// Sessions that have not ended.
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

    pub(super) fn random(&self) -> u64 {
        self.rng.borrow_mut().u64(..)
    }

    /// A session lacks a descriptor for its backend.
    pub(super) fn starve(&self) {
        self.starved.set(Some(Instant::now()));
    }

    /// True while sessions that were accepted lack descriptors: accepting more would take the next ones from them.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.starved.get().is_some_and(|since| since.elapsed() < STARVED_TIME)
    }

    pub(super) fn warn_exhausted(&self, backend: &Backend, error: &io::Error) {
        let now = Instant::now();
        if self.exhausted_logged.get().is_none_or(|logged| now - logged >= EXHAUSTED_LOG_INTERVAL) {
            self.exhausted_logged.set(Some(now));
            let cure = if exhausted(error) {
                "raise `ulimit -n` (LimitNOFILE)"
            } else {
                "widen net.ipv4.ip_local_port_range or add backends; for an IPv6 backend, check that IPv6 is on"
            };
            warn!(backend = %backend.id(), %error, cure, "nothing left on this machine for a backend connection");
        }
    }
}
