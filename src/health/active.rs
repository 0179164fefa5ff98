//! Checks the backends of a pool periodically.
//!
//! Each backend has its own schedule. The first checks of a new table are spread over an interval, and each
//! further check comes a little early by a random time, so that checks do not synchronize. A backend with
//! failed checks that is still healthy is checked twice as often. So it becomes unhealthy within `fall` ×
//! `interval` even if it never answers, provided that `timeout` is at most half the `interval`.
//!
//! Next: `check.rs` does one check, `verdict.rs` decides what a result means.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error};

use super::check::check;
use super::check_error::CheckError;
use super::lines::{self, LineLimiter};
use super::verdict::{failed_last, judge};
use crate::balance::backend::{Backend, Ejection, Health, Target};
use crate::balance::pool::Pool;
use crate::balance::snapshot::Member;
use crate::balance::{Address, AdminState, BackendId};
use crate::config::HealthCheck;
use crate::control::backoff::{jittered, spread};
use crate::fault;

/// Limits the checks under way in the whole process, since each has a descriptor; further checks wait for a
/// permit in order. Addresses whose last check failed use the second semaphore: their checks may take the
/// whole timeout and must not delay the others.
static PERMITS: [Semaphore; 2] = [const { Semaphore::const_new(512) }; 2];
/// The pause before a snapshot is made after a change of health, so that several changes share one.
const REFRESH_DELAY: Duration = Duration::from_millis(10);
/// The first checks of new backends are spread over this time for each of them, up to one interval. So a few
/// new backends are checked almost immediately.
const FIRST_SPREAD: Duration = Duration::from_millis(1);

/// The schedule and running checks of a member that left are kept for this time. So a table that is deleted
/// and written again and again neither aborts its checks nor causes more of them.
const DEPARTED_KEPT_FOR: Duration = Duration::from_secs(1);
/// How many more departed members than current members are kept at most.
const DEPARTED_SPARE: usize = 1_024;

/// Obsolete entries that the heap of due checks may have in any case, so that a small pool is not swept at
/// each change.
const DUE_SPARE: usize = 64;

/// The checks of one pool.
#[derive(Debug)]
pub struct Checks {
    pool: Arc<Pool>,
    settings: Arc<HealthCheck>,
    permits: &'static [Semaphore; 2],
    published: watch::Receiver<SystemTime>,
    readdressed: watch::Receiver<()>,
    backends: HashMap<BackendId, BackendChecks>,
    /// Members that left the table a moment ago, and until when they are kept.
    departed: HashMap<BackendId, (Instant, BackendChecks)>,
    /// When the first departed member is forgotten.
    forget_at: Option<Instant>,
    /// When each backend is checked next. An entry is obsolete unless the backend's own `due` is the same.
    due: BinaryHeap<Reverse<(Instant, BackendId)>>,
    running: JoinSet<(Target, Instant, Result<(), CheckError>)>,
    /// When the next snapshot is made. Set while the current one does not have the newest health.
    refresh_at: Option<Instant>,
    lines: LineLimiter,
}

/// The schedule and the running checks of one backend.
#[derive(Debug)]
struct BackendChecks {
    backend: Arc<Backend>,
    /// `None` while checks of its addresses wait for a permit or are under way.
    due: Option<Instant>,
    /// The checks that wait for a permit or are under way: one for each address.
    checks: Vec<AbortHandle>,
    /// True if a lookup found a new address while checks were under way.
    has_new_address: bool,
}

impl Checks {
    /// The checks of `pool`, none of which has begun.
    #[must_use]
    pub fn new(pool: Arc<Pool>, settings: HealthCheck) -> Self {
        Self {
            published: pool.cell.published(),
            readdressed: pool.cell.readdressed(),
            pool,
            settings: Arc::new(settings),
            permits: &PERMITS,
            backends: HashMap::new(),
            departed: HashMap::new(),
            forget_at: None,
            due: BinaryHeap::new(),
            running: JoinSet::new(),
            refresh_at: None,
            lines: LineLimiter::new(),
        }
    }

    /// Checks the backends periodically. Never ends.
    pub async fn run(mut self) {
        self.apply_table();
        loop {
            self.step().await;
        }
    }

    /// Waits for one event and handles it.
    async fn step(&mut self) {
        fault::point("health_checks", &self.pool.name);
        let far = Instant::now() + Duration::from_secs(3600);
        let next_check = self.due.peek().map_or(far, |Reverse((due, _))| *due);
        let forget_at = self.forget_at.unwrap_or(far);
        let refresh_at = self.refresh_at.unwrap_or(far);
        tokio::select! {
            Ok(()) = self.published.changed() => self.apply_table(),
            Ok(()) = self.readdressed.changed() => self.apply_addresses(),
            Some(ended) = self.running.join_next_with_id() => match ended {
                Ok((id, (target, started, result))) => self.on_result(id, &target, started, result),
                Err(error) => self.on_panic(&error),
            },
            () = sleep_until(next_check) => self.begin_due(),
            () = sleep_until(forget_at) => self.forget_departed(),
            () = sleep_until(refresh_at) => {
                self.refresh_at = None;
                self.pool.cell.refresh();
            }
        }
    }

    /// Schedules the members of the newest table and forgets the ones that left, after a while. Members with
    /// weight zero are checked too, since they may get weight at any moment, and so are the stand-ins of
    /// unresolved names.
    fn apply_table(&mut self) {
        self.published.mark_unchanged();
        let now = Instant::now();
        let snapshot = Arc::clone(&self.pool.cell.load());
        let members = || snapshot.members_and_stand_ins();
        let mut before = std::mem::replace(&mut self.backends, HashMap::with_capacity(members().count()));
        self.forget_maint(members().filter(|member| member.state == AdminState::Maint), &mut before);
        let mut new = Vec::new();
        for member in members().filter(|member| member.state != AdminState::Maint) {
            if !self.keep(&member.backend, &mut before, now) {
                new.push(Arc::clone(&member.backend));
            }
        }
        self.add_new(new, now);
        self.remember_departed(before, now);
        self.drop_obsolete_entries();
    }

    /// Forgets the members in maint. Such a backend may be switched off, so it is not checked and its health
    /// is unknown.
    fn forget_maint<'m>(
        &mut self,
        members: impl Iterator<Item = &'m Member>,
        before: &mut HashMap<BackendId, BackendChecks>,
    ) {
        for member in members {
            for target in Target::all_of(&member.backend) {
                target.condition().set_health(Health::Unchecked);
            }
            before.remove(member.backend.id());
            self.departed.remove(member.backend.id());
        }
    }

    /// Keeps the checks of a backend that was a member before, or that departed a short time ago. False for
    /// a backend that has no checks yet.
    fn keep(
        &mut self,
        backend: &Arc<Backend>,
        before: &mut HashMap<BackendId, BackendChecks>,
        now: Instant,
    ) -> bool {
        let id = backend.id();
        let is_same = |entry: &BackendChecks| Arc::ptr_eq(&entry.backend, backend);
        if let Some(entry) = before.remove(id).filter(is_same) {
            self.backends.insert(id.clone(), entry);
            return true;
        }
        let Some((_, entry)) = self.departed.remove(id).filter(|(_, entry)| is_same(entry)) else {
            return false;
        };
        let passed_meanwhile = entry.due.is_some_and(|due| due <= now);
        self.backends.insert(id.clone(), entry);
        if passed_meanwhile {
            self.schedule(id, now);
        }
        true
    }

    /// Schedules the first checks of `new` backends, spread over a while.
    fn add_new(&mut self, new: Vec<Arc<Backend>>, now: Instant) {
        let spread_over =
            (FIRST_SPREAD * u32::try_from(new.len()).unwrap_or(u32::MAX)).min(self.settings.interval);
        for backend in new {
            let id = backend.id().clone();
            self.backends.insert(
                id.clone(),
                BackendChecks { backend, due: None, checks: Vec::new(), has_new_address: false },
            );
            self.schedule(&id, now + spread(spread_over));
        }
    }

    /// Keeps the checks of members that left the table, up to a bound, since they may return.
    fn remember_departed(&mut self, left: HashMap<BackendId, BackendChecks>, now: Instant) {
        let room = (self.backends.len() + DEPARTED_SPARE).saturating_sub(self.departed.len());
        let left = left.into_iter().take(room);
        self.departed.extend(left.map(|(id, entry)| (id, (now + DEPARTED_KEPT_FOR, entry))));
        if !self.departed.is_empty() {
            self.forget_at.get_or_insert(now + DEPARTED_KEPT_FOR);
        }
    }

    /// Removes obsolete entries from the heap of schedules. A member that leaves and returns leaves one
    /// behind each time.
    fn drop_obsolete_entries(&mut self) {
        if self.due.len() > 2 * (self.backends.len() + self.departed.len()) + DUE_SPARE {
            let mut due = std::mem::take(&mut self.due);
            due.retain(|Reverse((due, id))| self.is_due(id, *due));
            self.due = due;
        }
    }

    /// A lookup has changed the addresses of a name: new ones are checked at once, or after the checks under
    /// way.
    fn apply_addresses(&mut self) {
        let is_new = |target: Target| target.condition().health() == Health::Unchecked;
        let mut new = Vec::new();
        for (id, entry) in &mut self.backends {
            let is_name = matches!(id.address(), Address::Name { .. });
            if is_name && Target::all_of(&entry.backend).any(is_new) {
                if entry.due.is_some() {
                    new.push(id.clone());
                } else {
                    entry.has_new_address = true;
                }
            }
        }
        let now = Instant::now();
        new.iter().for_each(|id| self.schedule(id, now));
    }

    /// Forgets the departed members that have not returned in time.
    fn forget_departed(&mut self) {
        let now = Instant::now();
        self.departed.retain(|_, (until, _)| *until > now);
        self.forget_at = self.departed.values().map(|(until, _)| *until).min();
    }

    fn is_due(&self, id: &BackendId, due: Instant) -> bool {
        let entry = self.backends.get(id).or_else(|| self.departed.get(id).map(|(_, entry)| entry));
        entry.is_some_and(|entry| entry.due == Some(due))
    }

    /// The checks of a member, or of one that left less than [`DEPARTED_KEPT_FOR`] ago and may return.
    fn find(&mut self, id: &BackendId) -> Option<&mut BackendChecks> {
        self.backends.get_mut(id).or_else(|| self.departed.get_mut(id).map(|(_, entry)| entry))
    }

    fn schedule(&mut self, id: &BackendId, at: Instant) {
        if let Some(entry) = self.find(id) {
            entry.due = Some(at);
            self.due.push(Reverse((at, id.clone())));
        }
    }

    fn begin_due(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((due, _))) = self.due.peek()
            && *due <= now
            && let Some(Reverse((due, id))) = self.due.pop()
        {
            let Some(entry) = self.backends.get_mut(&id).filter(|entry| entry.due == Some(due)) else {
                continue;
            };
            entry.due = None;
            for target in Target::all_of(&entry.backend) {
                let permits = &self.permits[usize::from(failed_last(target.condition()))];
                let settings = Arc::clone(&self.settings);
                entry.checks.push(self.running.spawn(async move {
                    let _permit = permits.acquire().await.expect("the semaphores are never closed");
                    // Lets threads with sessions run first: see `thread.rs`.
                    std::thread::yield_now();
                    let started = Instant::now();
                    let result = check(&target, &settings).await;
                    std::thread::yield_now();
                    (target, started, result)
                }));
            }
            if entry.checks.is_empty() {
                // Its name has not been resolved yet.
                let interval = jittered(self.settings.interval);
                self.schedule(&id, now + interval);
            }
        }
    }

    /// Handles the result of a check that began at `started`.
    fn on_result(&mut self, check: Id, target: &Target, started: Instant, result: Result<(), CheckError>) {
        let (settings, backend) = (Arc::clone(&self.settings), target.backend());
        let id = backend.id();
        let Some(entry) = self.find(id).filter(|entry| Arc::ptr_eq(&entry.backend, backend)) else {
            return;
        };
        entry.checks.retain(|other| other.id() != check);
        let was_usable = backend.is_usable();
        // If the name has lost this address meanwhile, the result does not count.
        if target.is_current() {
            if let Err(error) = &result
                && !error.is_of_backend()
            {
                debug!(pool = %self.pool.name, backend = %id, %error, "a check was not counted: its failure is due to this machine");
            } else {
                backend.condition.checks[usize::from(result.is_err())].add(1);
                if let Err(error) = &result {
                    target.condition().check_error.set(error.cause());
                }
                if let Some(checks) = judge(target.condition(), result.is_ok(), &settings) {
                    self.on_change(target, was_usable, checks, result.err());
                }
            }
        }
        self.schedule_next(id, started);
    }

    /// Schedules the next check once all addresses have a result. The last check began at `started`.
    fn schedule_next(&mut self, id: &BackendId, started: Instant) {
        let mut interval = jittered(self.settings.interval);
        let Some(entry) = self.find(id).filter(|entry| entry.checks.is_empty()) else { return };
        if std::mem::take(&mut entry.has_new_address) {
            return self.schedule(id, Instant::now());
        }
        let in_doubt = |target: Target| {
            target.condition().health() == Health::Healthy && target.condition().is_in_doubt()
        };
        if Target::all_of(&entry.backend).any(in_doubt) {
            interval /= 2;
        }
        self.schedule(id, (started + interval).max(Instant::now()));
    }

    /// Handles a check that ended without a result: it panicked, unless it was aborted because its backend
    /// left.
    fn on_panic(&mut self, error: &JoinError) {
        if error.is_cancelled() {
            return;
        }
        let is_lost = |entry: &BackendChecks| entry.checks.iter().any(|check| check.id() == error.id());
        let mut all = self.backends.values().chain(self.departed.values().map(|(_, entry)| entry));
        let Some(id) = all.find(|entry| is_lost(entry)).map(|entry| entry.backend.id().clone()) else {
            return;
        };
        if self.lines.allow(&self.pool.name) {
            let pool = &*self.pool.name;
            error!(pool, backend = %id, %error, "a health check panicked, which is a defect: it is repeated");
        }
        if let Some(entry) = self.find(&id) {
            entry.checks.retain(|check| check.id() != error.id());
        }
        // At the usual interval: a check that panics each time must not use a whole core.
        self.schedule_next(&id, Instant::now());
    }

    /// The health of `target` has changed after this number of checks in a row. With an `error`, it is
    /// unhealthy now.
    fn on_change(&mut self, target: &Target, was_usable: bool, checks: u32, error: Option<CheckError>) {
        let (backend, condition) = (target.backend(), target.condition());
        let allowed = self.lines.allow(&self.pool.name);
        if let Some(error) = error {
            if allowed {
                lines::unhealthy(&self.pool.name, target, checks, &error);
            }
        } else {
            // Checks that pass end an ejection, which was due to earlier failures of sessions.
            if condition.ejection() != Ejection::None {
                condition.set_ejection(Ejection::None);
            }
            // A name that was usable by its other addresses keeps its full weight.
            if !was_usable {
                backend.condition.begin_ramp(Instant::now());
            }
            if allowed {
                lines::healthy(&self.pool.name, target, checks);
            }
        }
        self.refresh_at.get_or_insert(Instant::now() + REFRESH_DELAY);
    }
}

/// Aborts the checks of a member that left, so that they do not occupy permits.
impl Drop for BackendChecks {
    fn drop(&mut self) {
        self.checks.iter().for_each(AbortHandle::abort);
    }
}

#[cfg(test)]
mod tests;
