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

use super::check::{CheckError, check};
use super::lines::{self, Lines};
use crate::balance::backend::Backend;
use crate::balance::backend::Target;
use crate::balance::backend::{Condition, Ejection, Health};
use crate::balance::pool::Pool;
use crate::balance::{Address, AdminState, BackendId};
use crate::config::HealthCheck;
use crate::control::backoff::{jittered, spread};

/// Each check under way is a descriptor. The bounds are the process's; who finds no place waits in line for one. Backends that failed
/// the last time have the second ones: they take the whole timeout, and must not make the others wait.
static PLACES: [Semaphore; 2] = [const { Semaphore::const_new(512) }; 2];
/// Between two snapshots made for what checks found.
const PACE: Duration = Duration::from_millis(10);
/// The first checks of a new table are spread over so much for each backend, up to an interval: a few are asked at once.
const FIRST_SPREAD: Duration = Duration::from_millis(1);

/// The checks of a member that left stay as they are for so long: a table that is deleted and written anew, again and again, must
/// neither keep a check from its end nor cause more of them.
const AWAY_PATIENCE: Duration = Duration::from_secs(1);
/// So many more members that left than there are members are treated like that.
const AWAY_SPARE: usize = 1_024;

/// So that a small pool is not swept for each member that leaves.
const DUE_SPARE: usize = 64;

/// The checks of one pool.
#[derive(Debug)]
pub struct Checks {
    pool: Arc<Pool>,
    settings: Arc<HealthCheck>,
    places: &'static [Semaphore; 2],
    published: watch::Receiver<SystemTime>,
    readdressed: watch::Receiver<()>,
    known: HashMap<BackendId, Known>,
    /// Those that left a moment ago, and until when they stand here.
    away: HashMap<BackendId, (Instant, Known)>,
    /// When the first of them is forgotten.
    forget_at: Option<Instant>,
    /// When who is asked next. What stands here and not in `known` is over.
    due: BinaryHeap<Reverse<(Instant, BackendId)>>,
    running: JoinSet<(Target, Instant, Result<(), CheckError>)>,
    /// Set while the snapshot does not go by what was found.
    refresh_at: Option<Instant>,
    lines: Lines,
}

/// What is known of one backend, beside what it knows itself.
#[derive(Debug)]
struct Known {
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
            places: &PLACES,
            known: HashMap::new(),
            away: HashMap::new(),
            forget_at: None,
            due: BinaryHeap::new(),
            running: JoinSet::new(),
            refresh_at: None,
            lines: Lines::new(),
        }
    }

    /// Asks again and again. Never ends.
    pub async fn run(mut self) {
        self.look();
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
            Ok(()) = self.published.changed() => self.look(),
            Ok(()) = self.readdressed.changed() => self.look_at_addresses(),
            Some(ended) = self.running.join_next_with_id() => match ended {
                Ok((id, (target, started, result))) => self.take(id, &target, started, result),
                Err(error) => self.lose(&error),
            },
            () = sleep_until(next_check) => self.begin_due(),
            () = sleep_until(forget_at) => self.forget(),
            () = sleep_until(refresh_at) => {
                self.refresh_at = None;
                self.pool.cell.refresh();
            }
        }
    }

    /// Goes by the newest table: a new member gets a time, one that left is forgotten soon. Weight zero is checked, too: it may have
    /// weight the next moment; and so are those that stand in for names.
    fn look(&mut self) {
        self.published.mark_unchanged();
        let now = Instant::now();
        let snapshot = Arc::clone(&self.pool.cell.load());
        let members = || snapshot.members_and_stand_ins();
        let mut before = std::mem::replace(&mut self.known, HashMap::with_capacity(members().count()));
        // Who is in maint may be switched off: it is not asked, and nothing is known of it any more.
        for member in members().filter(|member| member.state == AdminState::Maint) {
            for target in Target::all_of(&member.backend) {
                target.condition().set_health(Health::Unchecked);
            }
            before.remove(member.backend.id());
            self.away.remove(member.backend.id());
        }
        let mut new = Vec::new();
        for member in members().filter(|member| member.state != AdminState::Maint) {
            let id = member.backend.id();
            let is_same = |known: &Known| Arc::ptr_eq(&known.backend, &member.backend);
            if let Some(known) = before.remove(id).filter(is_same) {
                self.known.insert(id.clone(), known);
            } else if let Some((_, known)) = self.away.remove(id).filter(|(_, known)| is_same(known)) {
                let passed_meanwhile = known.due.is_some_and(|due| due <= now);
                self.known.insert(id.clone(), known);
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
            self.known
                .insert(id.clone(), Known { backend, due: None, checks: Vec::new(), has_new_address: false });
            self.schedule(&id, now + spread(spread_over));
        }
        let room = (self.known.len() + AWAY_SPARE).saturating_sub(self.away.len());
        let left = before.into_iter().take(room);
        self.away.extend(left.map(|(id, known)| (id, (now + AWAY_PATIENCE, known))));
        if !self.away.is_empty() {
            self.forget_at.get_or_insert(now + AWAY_PATIENCE);
        }
        // Whoever left and came back, again and again, has a time of each stay in there.
        if self.due.len() > 2 * (self.known.len() + self.away.len()) + DUE_SPARE {
            let mut due = std::mem::take(&mut self.due);
            due.retain(|Reverse((due, id))| self.is_due(id, *due));
            self.due = due;
        }
    }

    /// A lookup has found other addresses of a name: those that were never asked are asked at once, or after the checks that are
    /// under way.
    fn look_at_addresses(&mut self) {
        let is_new = |target: Target| target.condition().health() == Health::Unchecked;
        let mut new = Vec::new();
        for (id, known) in &mut self.known {
            let is_name = matches!(id.address(), Address::Name { .. });
            if is_name && Target::all_of(&known.backend).any(is_new) {
                if known.due.is_some() {
                    new.push(id.clone());
                } else {
                    known.has_new_address = true;
                }
            }
        }
        let now = Instant::now();
        new.iter().for_each(|id| self.schedule(id, now));
    }

    /// Forgets those that have not returned in time.
    fn forget(&mut self) {
        let now = Instant::now();
        self.away.retain(|_, (until, _)| *until > now);
        self.forget_at = self.away.values().map(|(until, _)| *until).min();
    }

    fn is_due(&self, id: &BackendId, due: Instant) -> bool {
        let known = self.known.get(id).or_else(|| self.away.get(id).map(|(_, known)| known));
        known.is_some_and(|known| known.due == Some(due))
    }

    /// Also one that left a moment ago: it may be back at any time.
    fn find(&mut self, id: &BackendId) -> Option<&mut Known> {
        self.known.get_mut(id).or_else(|| self.away.get_mut(id).map(|(_, known)| known))
    }

    fn schedule(&mut self, id: &BackendId, at: Instant) {
        if let Some(known) = self.find(id) {
            known.due = Some(at);
            self.due.push(Reverse((at, id.clone())));
        }
    }

    fn begin_due(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((due, _))) = self.due.peek()
            && *due <= now
            && let Some(Reverse((due, id))) = self.due.pop()
        {
            let Some(known) = self.known.get_mut(&id).filter(|known| known.due == Some(due)) else {
                continue;
            };
            known.due = None;
            for target in Target::all_of(&known.backend) {
                let places = &self.places[usize::from(failed_last(target.condition()))];
                let settings = Arc::clone(&self.settings);
                known.checks.push(self.running.spawn(async move {
                    let _place = places.acquire().await.expect("never closed them");
                    // Sessions first: see `thread.rs`.
                    std::thread::yield_now();
                    let started = Instant::now();
                    let result = check(&target, &settings).await;
                    std::thread::yield_now();
                    (target, started, result)
                }));
            }
            if known.checks.is_empty() {
                // Its name has not been resolved.
                let interval = jittered(self.settings.interval);
                self.schedule(&id, now + interval);
            }
        }
    }

    /// Hears how a check ended that was begun at `started`.
    fn take(&mut self, check: Id, target: &Target, started: Instant, result: Result<(), CheckError>) {
        let (settings, backend) = (Arc::clone(&self.settings), target.backend());
        let id = backend.id();
        let Some(known) = self.find(id).filter(|known| Arc::ptr_eq(&known.backend, backend)) else {
            return;
        };
        known.checks.retain(|other| other.id() != check);
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
                    self.tell(target, was_usable, checks, result.err());
                }
            }
        }
        self.schedule_next(id, started);
    }

    /// The next time follows once all addresses have been asked; the last one was at `started`.
    fn schedule_next(&mut self, id: &BackendId, started: Instant) {
        let mut interval = jittered(self.settings.interval);
        let Some(known) = self.find(id).filter(|known| known.checks.is_empty()) else { return };
        if std::mem::take(&mut known.has_new_address) {
            return self.schedule(id, Instant::now());
        }
        let in_doubt = |target: Target| {
            target.condition().health() == Health::Healthy && target.condition().is_in_doubt()
        };
        if Target::all_of(&known.backend).any(in_doubt) {
            interval /= 2;
        }
        self.schedule(id, (started + interval).max(Instant::now()));
    }

    /// A check ended without a result: it panicked. One that was given up, because its backend left, needs nothing more.
    fn lose(&mut self, error: &JoinError) {
        if error.is_cancelled() {
            return;
        }
        let is_lost = |known: &Known| known.checks.iter().any(|check| check.id() == error.id());
        let mut all = self.known.values().chain(self.away.values().map(|(_, known)| known));
        let Some(id) = all.find(|known| is_lost(known)).map(|known| known.backend.id().clone()) else {
            return;
        };
        if self.lines.allow(&self.pool.name) {
            let pool = &*self.pool.name;
            error!(pool, backend = %id, %error, "a health check ended without a result: this is a defect; it is repeated");
        }
        if let Some(known) = self.find(&id) {
            known.checks.retain(|check| check.id() != error.id());
        }
        // Not sooner than any other: a check that panics each time must not take a core.
        self.schedule_next(&id, Instant::now());
    }

    /// So many checks in a row have changed what is known of `target`; with the last one's `error`, for the worse.
    fn tell(&mut self, target: &Target, was_usable: bool, checks: u32, error: Option<CheckError>) {
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
        self.refresh_at.get_or_insert(Instant::now() + PACE);
    }
}

/// Who left is not asked any more, and holds nobody up.
impl Drop for Known {
    fn drop(&mut self) {
        self.checks.iter().for_each(AbortHandle::abort);
    }
}

/// Its last check failed: each one that speaks against its health, or the last one if none does.
fn failed_last(condition: &Condition) -> bool {
    match condition.health() {
        Health::Unchecked => false,
        Health::Healthy => condition.is_in_doubt(),
        Health::Unhealthy => !condition.is_in_doubt(),
    }
}

/// Counts a check. Returns how many in a row have changed the address's health with this one, if it changed.
fn judge(condition: &Condition, passed: bool, settings: &HealthCheck) -> Option<u32> {
    let (needed, verdict) = match (condition.health(), passed) {
        (Health::Unchecked, true) => {
            condition.set_health(Health::Healthy);
            return None;
        }
        (Health::Unchecked, false) => (1, Health::Unhealthy),
        (Health::Healthy, false) => (settings.fall.get(), Health::Unhealthy),
        (Health::Unhealthy, true) => (settings.rise.get(), Health::Healthy),
        (Health::Healthy, true) | (Health::Unhealthy, false) => {
            condition.forget_checks_against();
            return None;
        }
    };
    let decided = condition.count_check_against() >= needed;
    if decided {
        condition.forget_checks_against();
        condition.set_health(verdict);
    }
    decided.then_some(needed)
}

#[cfg(test)]
mod tests;
