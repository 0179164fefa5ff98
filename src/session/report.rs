//! The report of a session: counted and logged when it is dropped, so that no path forgets it.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::Context;
use super::close_reason::CloseReason;
use super::failures::Failures;
use super::worker::Worker;
use crate::balance::Weight;
use crate::balance::backend::{
    Active, AddressNumber, Cause, Failure, TrialNumber, TrialPermit, TrialProgress,
};
use crate::balance::pool::{Pick, Source};
use crate::observe::counters::Counter;
use crate::reactor::{self, Panicked};
use crate::relay::{Ended, Limits, Meter, Shared, Side, Tally};
use crate::session::access_log::{AccessLine, millis};

/// The counters of one worker's sessions. Other workers read them at every accept, so they have cache lines
/// of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct SessionCounters {
    opened: Counter,
    /// Sessions of which a half was closed. A session that ends without a half-close is counted at its end.
    half_closed: Counter,
    closed: [Counter; CloseReason::ALL.len()],
    panicked: Counter,
}

impl SessionCounters {
    /// The number of sessions with both halves open: those that may still have much to do.
    #[must_use]
    pub fn open(&self) -> u64 {
        // One thread writes both counters and another reads them at any moment, so the second may be ahead.
        self.opened.get().saturating_sub(self.half_closed.get())
    }

    /// The counter of sessions that ended for `reason`.
    #[must_use]
    pub fn closed(&self, reason: CloseReason) -> &Counter {
        &self.closed[reason.index()]
    }

    /// Sessions that panicked.
    #[must_use]
    pub fn panicked(&self) -> &Counter {
        &self.panicked
    }
}

/// A duration of up to 71 minutes in four bytes instead of sixteen. A session keeps two for its life.
#[derive(Clone, Copy, Debug, Default)]
struct Micros(u32);

impl From<Duration> for Micros {
    fn from(duration: Duration) -> Self {
        Self(u32::try_from(duration.as_micros()).unwrap_or(u32::MAX))
    }
}

impl From<Micros> for Duration {
    fn from(Micros(micros): Micros) -> Self {
        Self::from_micros(micros.into())
    }
}

/// A client's address without an IPv6 flow label, in 24 bytes instead of 32. The 8 bytes that it saves are
/// used for [`Failures`].
#[derive(Clone, Copy, Debug)]
struct Client {
    address: IpAddr,
    port: u16,
    scope_id: u32,
}

impl From<SocketAddr> for Client {
    fn from(client: SocketAddr) -> Self {
        let scope_id = if let SocketAddr::V6(client) = client { client.scope_id() } else { 0 };
        Self { address: client.ip(), port: client.port(), scope_id }
    }
}

impl From<Client> for SocketAddr {
    fn from(Client { address, port, scope_id }: Client) -> Self {
        match address {
            IpAddr::V4(address) => (address, port).into(),
            IpAddr::V6(address) => SocketAddrV6::new(address, port, 0, scope_id).into(),
        }
    }
}

/// How many backends failed before, at most 100 (`connect.attempts`), and in the highest bit whether the
/// last one was reached. One byte, because a session is to stay small.
#[derive(Clone, Copy, Debug, Default)]
struct Progress(u8);

impl Progress {
    const CONNECTED: u8 = 1 << 7;

    fn retries(self) -> u8 {
        self.0 & !Self::CONNECTED
    }

    fn is_connected(self) -> bool {
        self.0 & Self::CONNECTED != 0
    }
}

/// The report of one session, from its begin to its end.
pub(super) struct Report {
    context: Rc<Context>,
    client: Client,
    accepted: Instant,
    /// The backend that was tried last, with the session's slot there.
    backend: Option<Active>,
    /// The address of the backend's name that was tried last, or is to be tried first.
    address: Option<AddressNumber>,
    /// Set for a trial session: the trial of that address, or else of the backend.
    trial: Option<TrialNumber>,
    /// The backend's weight when it was picked.
    weight: Weight,
    /// What the backend was picked from.
    source: Source,
    progress: Progress,
    queue_time: Micros,
    connect_time: Micros,
    /// The failed attempts.
    pub(super) failures: Failures,
    tally: Tally,
    /// Stays [`CloseReason::Shutdown`] if the session is dropped before its end.
    reason: CloseReason,
}

impl Report {
    pub(super) fn open(context: Rc<Context>, client: SocketAddr) -> Self {
        context.worker.session_opened();
        context.worker.sessions.of(context.worker.id).opened.add(1);
        context.listener.counters.of(context.worker.id).connections.add(1);
        Self {
            context,
            client: client.into(),
            accepted: Instant::now(),
            backend: None,
            address: None,
            trial: None,
            weight: Weight::ZERO,
            source: Source::Snapshot,
            progress: Progress::default(),
            queue_time: Micros::default(),
            connect_time: Micros::default(),
            failures: Failures::default(),
            tally: Tally::default(),
            reason: CloseReason::Shutdown,
        }
    }

    pub(super) fn client(&self) -> SocketAddr {
        self.client.into()
    }

    pub(super) fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Records the backend that is tried now.
    pub(super) fn picked(&mut self, pick: Pick) {
        self.release_backend();
        let pool = self.context.pool.counters.of(self.context.worker.id);
        pool.picks[pick.source as usize].add(1);
        self.backend = Some(pick.backend);
        self.set_trial(pick.trial.and_then(TrialPermit::address), pick.trial);
        (self.weight, self.source) = (pick.weight, pick.source);
    }

    /// Gives up the backend that was tried, before the session waits in the queue: others may use its slot
    /// and its trial.
    pub(super) fn release_backend(&mut self) {
        self.report_trial(TrialProgress::Wanted);
        (self.backend, self.address, self.trial) = (None, None, None);
    }

    /// Records how many backends failed, and that none has been reached yet.
    pub(super) fn set_retries(&mut self, retries: u32) {
        self.progress = Progress(u8::try_from(retries).unwrap_or(u8::MAX) & !Progress::CONNECTED);
    }

    /// The permit of a trial session.
    pub(super) fn trial_permit(&self) -> Option<TrialPermit> {
        self.trial.map(|number| TrialPermit::new(number, self.address))
    }

    fn set_trial(&mut self, address: Option<AddressNumber>, permit: Option<TrialPermit>) {
        (self.address, self.trial) = (address, permit.map(TrialPermit::number));
    }

    /// Records the address of the backend's name that is tried now, with the permit if it is a trial of that
    /// address.
    pub(super) fn set_address(&mut self, address: Option<AddressNumber>, permit: Option<TrialPermit>) {
        if permit.is_none() {
            self.report_trial(TrialProgress::Wanted);
        }
        self.set_trial(address, permit);
    }

    /// Adds time in which the session waited for its pick.
    pub(super) fn add_queue_time(&mut self, wait: Duration) {
        self.queue_time = (Duration::from(self.queue_time) + wait).into();
    }

    /// Records the end of an attempt, as the time since the accept.
    pub(super) fn set_connect_time(&mut self, since_accept: Duration) {
        self.connect_time = since_accept.saturating_sub(self.queue_time.into()).into();
    }

    /// Records that the backend picked last was reached, in an attempt that took `attempt`.
    pub(super) fn connected(&mut self, attempt: Duration) {
        if let Some(backend) = &self.backend {
            let counters = backend.counters.of(self.context.worker.id);
            counters.connections.add(1);
            counters.connect_duration.observe(attempt);
            self.progress.0 |= Progress::CONNECTED;
            if let Some(address) = self.address {
                backend.count_connected_at(address);
            }
            self.report_trial(TrialProgress::Connected);
        }
    }

    /// Reports a failure that is the fault of the backend picked last, or of its address.
    pub(super) fn report_failure(&self, failure: Failure, cause: Cause) {
        if let Some(backend) = &self.backend {
            match self.address {
                None => {
                    backend.condition.session_error.set(cause);
                    self.context.pool.failed(backend, failure);
                }
                Some(address) => self.context.pool.failed_at(backend.backend(), address, failure, cause),
            }
            self.report_trial(TrialProgress::Failed);
        }
    }

    /// Reports how far a trial session has come. Other sessions report nothing.
    fn report_trial(&self, to: TrialProgress) {
        if let (Some(backend), Some(permit)) = (&self.backend, self.trial_permit()) {
            self.context.pool.report_trial(backend, permit, to);
        }
    }

    fn answered_at_address(&self) {
        if let (Some(backend), Some(address)) = (&self.backend, self.address) {
            backend.count_answered_at(address);
        }
    }

    /// The name of the backend that was tried last.
    pub(super) fn backend(&self) -> &str {
        self.backend.as_ref().map_or("", |backend| backend.id().as_str())
    }

    /// What the session shares with others.
    pub(super) fn context(&self) -> &Rc<Context> {
        &self.context
    }

    /// Returns what the relay needs: limits, the worker's part, the backend's key, and the counters. The
    /// counters stay in the report, so a session that is cut is counted, too.
    pub(super) fn relay_parts(&mut self) -> (&Limits, &Shared, u64, Meter<'_>) {
        let Context { worker, settings, .. } = &*self.context;
        let backend = self.backend.as_ref().expect("only a session that reached a backend is relayed");
        let (key, backend) = (backend.key().get(), backend.counters.of(worker.id));
        let half_closed = &worker.sessions.of(worker.id).half_closed;
        (&settings.limits, &worker.relay, key, Meter { backend, half_closed, session: &mut self.tally })
    }

    /// Returns what broke the connection, if a side of the relay was reset.
    fn relay_error(&self) -> Option<Cause> {
        let is_reset = matches!(self.reason, CloseReason::Relayed(Ended::Reset(_)));
        Cause::of_errno(self.tally.errno).filter(|_| is_reset)
    }

    /// Warns that the picked backend cannot be connected to for lack of a descriptor or of memory.
    pub(super) fn warn_exhausted(&self, error: &io::Error) {
        if let Some(backend) = &self.backend {
            self.context.worker.warn_exhausted(backend, error);
        }
    }

    fn term(&self) -> &'static str {
        match self.reason {
            CloseReason::Shutdown if !self.progress.is_connected() => "KC",
            CloseReason::Defect if !self.progress.is_connected() => "IC",
            reason => reason.term(),
        }
    }

    pub(super) fn close(&mut self, reason: CloseReason) {
        self.reason = reason;
    }

    /// Returns why the session is dropped before it has ended. Counts and logs a panic of its task.
    #[cold]
    fn why_dropped(&self) -> CloseReason {
        match reactor::panicked() {
            None => CloseReason::Shutdown,
            Some(Panicked::Thread) => CloseReason::Defect,
            Some(Panicked::Task) => {
                let Context { worker, listener, pool, .. } = &*self.context;
                worker.sessions.of(worker.id).panicked.add(1);
                let backend = self.backend.as_ref().map(|backend| backend.id().as_str());
                worker.log_panic(&listener.name, &pool.name, backend);
                CloseReason::Defect
            }
        }
    }

    /// Counts and logs the session.
    fn publish(&mut self) {
        // Count the end for the worker and the listener.
        let worker = &self.context.worker;
        let _ends = Ends(worker);
        let (duration, relay_error) = (self.accepted.elapsed(), self.relay_error());
        let sessions = worker.sessions.of(worker.id);
        sessions.closed(self.reason).add(1);
        if !self.tally.half_closed {
            sessions.half_closed.add(1);
        }
        let listener = self.context.listener.counters.of(worker.id);
        listener.closed.add(1);
        match self.reason {
            CloseReason::NoBackend => listener.no_backend.add(1),
            CloseReason::QueueFull => listener.queue_full.add(1),
            CloseReason::QueueTimeout => listener.queue_timeout.add(1),
            CloseReason::ConnectLeft => worker.count_reset(),
            // The event of the reset came just after the connect.
            CloseReason::Relayed(Ended::Reset(Side::Client)) if self.tally.is_empty() => worker.count_reset(),
            _ => {}
        }
        // Count it for the backend, and report whether the backend works.
        if let (true, Some(backend)) = (self.progress.is_connected(), &self.backend) {
            let counters = backend.counters.of(worker.id);
            counters.closed.add(1);
            counters.session_duration.observe(duration);
            match self.reason {
                _ if self.tally.to_client > 0 => {
                    self.answered_at_address();
                    self.report_trial(TrialProgress::Succeeded);
                }
                CloseReason::Relayed(Ended::Reset(Side::Backend)) => {
                    self.report_failure(Failure::Reset, relay_error.unwrap_or(Cause::RESET));
                }
                // A backend that only reads works, too.
                CloseReason::Relayed(Ended::Finished | Ended::IdleTimeout) => {
                    counters.answered.add(1);
                    self.answered_at_address();
                    self.report_trial(TrialProgress::Succeeded);
                }
                _ => {}
            }
        }
        // A trial without a result is given back, so that another session can have it.
        self.report_trial(TrialProgress::Wanted);
        // Write the line of the access log.
        if let Some(log) = &worker.access_log {
            let term = self.term();
            let error = match self.reason {
                _ if self.progress.is_connected() => relay_error,
                CloseReason::ConnectFailed | CloseReason::ConnectTimeout | CloseReason::Exhausted => {
                    self.failures.last_cause()
                }
                _ => None,
            };
            let is_last = error.is_some() && !self.progress.is_connected() && self.backend.is_some();
            let failed = if is_last { self.failures.earlier() } else { self.failures.all() };
            log.write(&AccessLine {
                time: SystemTime::now() - duration,
                listener: &self.context.listener.name,
                client: self.client.into(),
                pool: &self.context.pool.name,
                backend: self.backend.as_ref().map(|backend| backend.id().as_str()),
                source: self.backend.as_ref().map(|_| self.source.name()),
                weight: self.backend.as_ref().map(|_| self.weight.get()),
                retries: self.progress.retries().into(),
                queue_ms: millis(self.queue_time.into()),
                connect_ms: millis(self.connect_time.into()),
                duration_ms: millis(duration),
                bytes_in: self.tally.to_backend,
                bytes_out: self.tally.to_client,
                close_reason: self.reason.name(),
                term,
                error,
                failed,
            });
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.reason == CloseReason::Shutdown {
            // A second panic while the first one unwinds would end the process.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                self.reason = self.why_dropped();
                self.publish();
            }));
        } else {
            self.publish();
        }
    }
}

/// Counts the session as ended when it is dropped, even if the report panics. Otherwise the worker would
/// wait for the session for ever.
struct Ends<'a>(&'a Worker);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.session_closed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_and_a_name_of_its_own() {
        let mut names: Vec<_> = CloseReason::ALL.map(CloseReason::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CloseReason::ALL.len());
        for (index, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), index);
        }
    }
}
