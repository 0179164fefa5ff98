//! Asks the backends of a pool whether they live, again and again.
//!
//! Each has its own time; those of a new table get theirs spread over an interval, and every further one comes a little early
//! by chance, so that they never come together. While a backend is in doubt it is asked twice as often, so that with a `timeout` of
//! half the `interval` at most the verdict comes within `fall` × `interval`, even where nothing answers at all.

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
use crate::balance::{Address, AdminState, BackendId};
use crate::config::HealthCheck;
use crate::control::backoff::{jittered, spread};

/// Each check under way is a descriptor. The bounds are the process's; who finds no place waits in line for one. Backends that failed
/// the last time have the second ones: they take the whole timeout, and must not make the others wait.
static PERMITS: [Semaphore; 2] = [const { Semaphore::const_new(512) }; 2];
/// Between two snapshots made for what checks found.
const REFRESH_DELAY: Duration = Duration::from_millis(10);
/// The first checks of a new table are spread over so much for each backend, up to an interval: a few are asked at once.
const FIRST_SPREAD: Duration = Duration::from_millis(1);

/// The checks of a member that left stay as they are for so long: a table that is deleted and written anew, again and again, must
/// neither keep a check from its end nor cause more of them.
const DEPARTED_KEPT_FOR: Duration = Duration::from_secs(1);
/// So many more members that left than there are members are treated like that.
const DEPARTED_SPARE: usize = 1_024;

/// So that a small pool is not swept for each member that leaves.
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
    /// Those that left a moment ago, and until when they stand here.
    departed: HashMap<BackendId, (Instant, BackendChecks)>,
    /// When the first of them is forgotten.
    forget_at: Option<Instant>,
    /// When who is asked next. What stands here and not in `known` is over.
    due: BinaryHeap<Reverse<(Instant, BackendId)>>,
    running: JoinSet<(Target, Instant, Result<(), CheckError>)>,
    /// Set while the snapshot does not go by what was found.
    refresh_at: Option<Instant>,
    lines: LineLimiter,
}

/// What is known of one backend, beside what it knows itself.
#[derive(Debug)]
struct BackendChecks {
    backend: Arc<Backend>,
    /// `None` while a check of one of its addresses waits or is under way.
    due: Option<Instant>,
    /// Those that wait or are under way, one of each address.
    checks: Vec<AbortHandle>,
    /// A lookup has brought an address while checks were under way.
    has_new_address: bool,
}

impl Checks {
    /// Nobody has been asked yet.
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

    /// Asks again and again. Never ends.
    pub async fn run(mut self) {
        self.apply_table();
        loop {
            self.step().await;
        }
    }

    /// Waits for one event and does what it asks for.
    async fn step(&mut self) {
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

    /// Goes by the newest table: a new member gets a time, one that left is forgotten soon. Weight zero is checked, too: it may have
    /// weight the next moment; and so are those that stand in for names.
    fn apply_table(&mut self) {
        self.published.mark_unchanged();
        let now = Instant::now();
        let snapshot = Arc::clone(&self.pool.cell.load());
        let members = || snapshot.members_and_stand_ins();
        let mut before = std::mem::replace(&mut self.backends, HashMap::with_capacity(members().count()));
        // Who is in maint may be switched off: it is not asked, and nothing is known of it any more.
        for member in members().filter(|member| member.state == AdminState::Maint) {
            for target in Target::all_of(&member.backend) {
                target.condition().set_health(Health::Unchecked);
            }
            before.remove(member.backend.id());
            self.departed.remove(member.backend.id());
        }
        let mut new = Vec::new();
        for member in members().filter(|member| member.state != AdminState::Maint) {
            let id = member.backend.id();
            let is_same = |entry: &BackendChecks| Arc::ptr_eq(&entry.backend, &member.backend);
            if let Some(entry) = before.remove(id).filter(is_same) {
                self.backends.insert(id.clone(), entry);
            } else if let Some((_, entry)) = self.departed.remove(id).filter(|(_, entry)| is_same(entry)) {
                let passed_meanwhile = entry.due.is_some_and(|due| due <= now);
                self.backends.insert(id.clone(), entry);
                if passed_meanwhile {
                    self.schedule(id, now);
                }
            } else {
                new.push(Arc::clone(&member.backend));
            }
        }
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
        let room = (self.backends.len() + DEPARTED_SPARE).saturating_sub(self.departed.len());
        let left = before.into_iter().take(room);
        self.departed.extend(left.map(|(id, entry)| (id, (now + DEPARTED_KEPT_FOR, entry))));
        if !self.departed.is_empty() {
            self.forget_at.get_or_insert(now + DEPARTED_KEPT_FOR);
        }
        // Whoever left and came back, again and again, has a time of each stay in there.
        if self.due.len() > 2 * (self.backends.len() + self.departed.len()) + DUE_SPARE {
            let mut due = std::mem::take(&mut self.due);
            due.retain(|Reverse((due, id))| self.is_due(id, *due));
            self.due = due;
        }
    }

    /// A lookup has found other addresses of a name: those that were never asked are asked at once, or after the checks that are
    /// under way.
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

    /// Forgets those that have not returned in time.
    fn forget_departed(&mut self) {
        let now = Instant::now();
        self.departed.retain(|_, (until, _)| *until > now);
        self.forget_at = self.departed.values().map(|(until, _)| *until).min();
    }

    fn is_due(&self, id: &BackendId, due: Instant) -> bool {
        let entry = self.backends.get(id).or_else(|| self.departed.get(id).map(|(_, entry)| entry));
        entry.is_some_and(|entry| entry.due == Some(due))
    }

    /// Also one that left a moment ago: it may be back at any time.
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
                    let _permit = permits.acquire().await.expect("never closed them");
                    // Sessions first: see `thread.rs`.
                    std::thread::yield_now();
                    let started = Instant::now();
                    let result = check(&target, &settings).await;
                    std::thread::yield_now();
                    (target, started, result)
                }));
            }
            if entry.checks.is_empty() {
                // Its name has not been resolved.
                let interval = jittered(self.settings.interval);
                self.schedule(&id, now + interval);
            }
        }
    }

    /// Hears how a check ended that was begun at `started`.
    fn on_result(&mut self, check: Id, target: &Target, started: Instant, result: Result<(), CheckError>) {
        let (settings, backend) = (Arc::clone(&self.settings), target.backend());
        let id = backend.id();
        let Some(entry) = self.find(id).filter(|entry| Arc::ptr_eq(&entry.backend, backend)) else {
            return;
        };
        entry.checks.retain(|other| other.id() != check);
        let was_usable = backend.is_usable();
        // The name may have lost this address meanwhile: what it did does not count any more.
        if target.is_current() {
            if let Err(error) = &result
                && !error.is_of_backend()
            {
                debug!(pool = %self.pool.name, backend = %id, %error, "a check showed nothing");
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

    /// The next time follows once all addresses have been asked; the last one was at `started`.
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

    /// A check ended without a result: it panicked. One that was given up, because its backend left, needs nothing more.
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
            error!(pool, backend = %id, %error, "a health check ended without a result: this is a defect; it is repeated");
        }
        if let Some(entry) = self.find(&id) {
            entry.checks.retain(|check| check.id() != error.id());
        }
        // Not sooner than any other: a check that panics each time must not take a core.
        self.schedule_next(&id, Instant::now());
    }

    /// So many checks in a row have changed what is known of `target`; with the last one's `error`, for the worse.
    fn on_change(&mut self, target: &Target, was_usable: bool, checks: u32, error: Option<CheckError>) {
        let (backend, condition) = (target.backend(), target.condition());
        let allowed = self.lines.allow(&self.pool.name);
        if let Some(error) = error {
            if allowed {
                lines::unhealthy(&self.pool.name, target, checks, &error);
            }
        } else {
            // What its sessions saw is from before.
            if condition.ejection() != Ejection::None {
                condition.set_ejection(Ejection::None);
            }
            // A name that got sessions at its other addresses has its weight.
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

/// Who left is not asked any more, and holds nobody up.
impl Drop for BackendChecks {
    fn drop(&mut self) {
        self.checks.iter().for_each(AbortHandle::abort);
    }
}

#[cfg(test)]
mod tests;
