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
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::check::{CheckError, check};
use super::lines::Lines;
use crate::balance::backend::Backend;
use crate::balance::condition::{Ejection, Health};
use crate::balance::pool::Pool;
use crate::balance::{AdminState, BackendId};
use crate::config::HealthCheck;
use crate::runtime::backoff::{jittered, spread};

/// Each check under way is a descriptor. The bounds are the process's; who finds no place waits in line for one. Backends that failed
/// the last time have the second ones: they take the whole timeout, and must not make the others wait.
static PLACES: [Semaphore; 2] = [const { Semaphore::const_new(512) }; 2];
/// Between two snapshots made for what checks found.
const PACE: Duration = Duration::from_millis(10);
/// The first checks of a new table are spread over so much for each backend, up to an interval: a few are asked at once.
const FIRST_SPREAD: Duration = Duration::from_millis(1);

/// So that a small pool is not swept for each member that leaves.
const DUE_SPARE: usize = 64;

/// The checks of one pool.
#[derive(Debug)]
pub struct Checks {
    pool: Arc<Pool>,
    settings: Arc<HealthCheck>,
    places: &'static [Semaphore; 2],
    published: watch::Receiver<SystemTime>,
    known: HashMap<BackendId, Known>,
    /// When who is asked next. What stands here and not in `known` is over.
    due: BinaryHeap<Reverse<(Instant, BackendId)>>,
    running: JoinSet<(Arc<Backend>, Instant, Result<(), CheckError>)>,
    /// Set while the snapshot does not go by what was found.
    refresh_at: Option<Instant>,
    lines: Lines,
}

/// What is known of one backend, beside what it knows itself.
#[derive(Debug)]
struct Known {
    backend: Arc<Backend>,
    /// `None` while a check waits or is under way.
    due: Option<Instant>,
    check: Option<AbortHandle>,
    /// Checks in a row that spoke against its health as it stands.
    against: u32,
    failed_last: bool,
}

impl Checks {
    /// Nobody has been asked yet.
    #[must_use]
    pub fn new(pool: Arc<Pool>, settings: HealthCheck) -> Self {
        Self {
            published: pool.cell.published(),
            pool,
            settings: Arc::new(settings),
            places: &PLACES,
            known: HashMap::new(),
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
        let refresh_at = self.refresh_at.unwrap_or(far);
        tokio::select! {
            Ok(()) = self.published.changed() => self.look(),
            Some(ended) = self.running.join_next() => match ended {
                Ok((backend, started, result)) => self.take(&backend, started, result),
                // Its backend left.
                Err(error) if error.is_cancelled() => {}
                Err(error) => warn!(pool = %self.pool.name, %error, "a health check died"),
            },
            () = sleep_until(next_check) => self.begin_due(),
            () = sleep_until(refresh_at) => {
                self.refresh_at = None;
                self.pool.cell.refresh();
            }
        }
    }

    /// Goes by the newest table: whoever is new gets a time, whoever left is forgotten. Weight zero is checked, too: it may have
    /// weight the next moment; and so are those that stand in for names.
    fn look(&mut self) {
        self.published.mark_unchanged();
        let snapshot = self.pool.cell.load();
        let members = || snapshot.members_and_stand_ins();
        let mut before = std::mem::replace(&mut self.known, HashMap::with_capacity(members().count()));
        let mut new = Vec::new();
        // Who is in maint may be switched off: it is not asked, and nothing is known of it any more.
        for member in members().filter(|member| member.state == AdminState::Maint) {
            member.backend.condition.set_health(Health::Unchecked);
        }
        for member in members().filter(|member| member.state != AdminState::Maint) {
            let id = member.backend.id();
            match before.remove(id).filter(|known| Arc::ptr_eq(&known.backend, &member.backend)) {
                Some(known) => {
                    self.known.insert(id.clone(), known);
                }
                None => new.push(Arc::clone(&member.backend)),
            }
        }
        drop(snapshot);
        let spread_over =
            (FIRST_SPREAD * u32::try_from(new.len()).unwrap_or(u32::MAX)).min(self.settings.interval);
        let now = Instant::now();
        for backend in new {
            let id = backend.id().clone();
            let known = Known { backend, due: None, check: None, against: 0, failed_last: false };
            self.known.insert(id.clone(), known);
            self.schedule(&id, now + spread(spread_over));
        }
        // Whoever left and came back, again and again, has a time of each stay in there.
        if self.due.len() > 2 * self.known.len() + DUE_SPARE {
            let known = &self.known;
            self.due.retain(|Reverse((due, id))| known.get(id).is_some_and(|known| known.due == Some(*due)));
        }
    }

    fn schedule(&mut self, id: &BackendId, at: Instant) {
        if let Some(known) = self.known.get_mut(id) {
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
            let places = &self.places[usize::from(known.failed_last)];
            known.due = None;
            let (backend, settings) = (Arc::clone(&known.backend), Arc::clone(&self.settings));
            known.check = Some(self.running.spawn(async move {
                let _place = places.acquire().await.expect("nobody closes them");
                // Sessions first: see `thread.rs`.
                std::thread::yield_now();
                let started = Instant::now();
                let result = check(&backend, &settings).await;
                std::thread::yield_now();
                (backend, started, result)
            }));
        }
    }

    /// Hears how a check ended that was begun at `started`.
    fn take(&mut self, backend: &Arc<Backend>, started: Instant, result: Result<(), CheckError>) {
        let id = backend.id();
        let Some(known) = self.known.get_mut(id).filter(|known| Arc::ptr_eq(&known.backend, backend)) else {
            return;
        };
        let mut interval = jittered(self.settings.interval);
        if let Err(error) = &result
            && !error.is_of_backend()
        {
            debug!(pool = %self.pool.name, backend = %id, %error, "a check showed nothing");
        } else {
            let changed = known.judge(result.is_ok(), &self.settings);
            if known.against > 0 && known.backend.condition.health() == Health::Healthy {
                interval /= 2;
            }
            if changed {
                self.tell(backend, result.err());
            }
        }
        self.schedule(id, (started + interval).max(Instant::now()));
    }

    fn tell(&mut self, backend: &Arc<Backend>, error: Option<CheckError>) {
        let condition = &backend.condition;
        let allowed = self.lines.allow(&self.pool.name);
        if let Some(error) = error {
            if allowed {
                warn!(pool = %self.pool.name, backend = %backend.id(), %error, "its health checks fail: it gets no sessions");
            }
        } else {
            // What its sessions saw is from before.
            if condition.ejection() != Ejection::None {
                condition.set_ejection(Ejection::None);
            }
            condition.begin_ramp(Instant::now());
            if allowed {
                info!(pool = %self.pool.name, backend = %backend.id(), "its health checks pass again");
            }
        }
        self.refresh_at.get_or_insert(Instant::now() + PACE);
    }
}

/// Who left is not asked any more, and holds nobody up.
impl Drop for Known {
    fn drop(&mut self) {
        if let Some(check) = &self.check {
            check.abort();
        }
    }
}

impl Known {
    /// Counts a check. True if the backend is to be treated otherwise than before.
    fn judge(&mut self, passed: bool, settings: &HealthCheck) -> bool {
        let condition = &self.backend.condition;
        condition.checks[usize::from(!passed)].add(1);
        self.failed_last = !passed;
        let (needed, verdict) = match (condition.health(), passed) {
            (Health::Unchecked, true) => {
                condition.set_health(Health::Healthy);
                return false;
            }
            (Health::Unchecked, false) => (1, Health::Unhealthy),
            (Health::Healthy, false) => (settings.fall.get(), Health::Unhealthy),
            (Health::Unhealthy, true) => (settings.rise.get(), Health::Healthy),
            (Health::Healthy, true) | (Health::Unhealthy, false) => {
                self.against = 0;
                return false;
            }
        };
        self.against += 1;
        let decided = self.against >= needed;
        if decided {
            self.against = 0;
            condition.set_health(verdict);
        }
        decided
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    use crate::balance::{Balance, Table, Weight};

    fn table(members: &[&str]) -> Table {
        let member = |id: &&str| (id.parse().expect("an address"), Weight::new(1.0).expect("a weight"));
        Table::new(members.iter().map(member).collect())
    }

    fn checks(members: &[&str], interval: Duration, timeout: Duration) -> Checks {
        let pool = Pool::new("web".into(), 0, Balance::WeightedRandom, table(members), None, 1);
        let (rise, fall) = (NonZeroU32::MIN, NonZeroU32::MIN);
        let expect = Some(b"nobody says so"[..].into());
        let settings = HealthCheck { interval, timeout, rise, fall, port: None, send: None, expect };
        Checks::new(Arc::new(pool), settings)
    }

    /// Takes connections and says nothing; with the names of so many backends that are all there.
    fn silent(backends: u8) -> (std::net::TcpListener, Vec<String>) {
        let listener = std::net::TcpListener::bind("0.0.0.0:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        (listener, (1..=backends).map(|n| format!("127.0.0.{n}:{port}")).collect())
    }

    #[tokio::test]
    async fn who_finds_no_place_is_asked_in_his_turn() {
        let (_listener, names) = silent(7);
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let mut checks = checks(&names, Duration::from_millis(20), Duration::from_millis(20));
        checks.places = Box::leak(Box::new([Semaphore::new(2), Semaphore::new(2)]));
        checks.look();
        let asked = |checks: &Checks| -> Vec<u64> {
            let members = checks.pool.cell.load();
            members.members().iter().map(|m| m.backend.condition.checks[1].get()).collect()
        };
        while asked(&checks).iter().sum::<u64>() < 70 {
            checks.step().await;
        }
        assert!(asked(&checks).iter().all(|asked| (8..=12).contains(asked)), "{:?}", asked(&checks));
    }

    #[tokio::test]
    async fn the_check_of_one_that_left_holds_nobody_up() {
        let (_listener, names) = silent(1);
        let hour = Duration::from_secs(3600);
        let mut checks = checks(&[&names[0]], Duration::from_secs(1), hour);
        checks.places = Box::leak(Box::new([Semaphore::new(1), Semaphore::new(1)]));
        checks.look();
        while checks.places[0].available_permits() > 0 {
            tokio::time::timeout(Duration::from_millis(10), checks.step()).await.unwrap_or_default();
        }
        // Nothing listens there.
        checks.pool.cell.publish(table(&["127.0.0.1:1"]));
        while checks.pool.cell.load().members()[0].backend.condition.health() != Health::Unhealthy {
            checks.step().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_stands_in_for_a_name_is_asked_and_the_table_too() {
        let mut checks = checks(&["10.0.0.1:80"], Duration::from_secs(3600), Duration::from_secs(1));
        checks.pool.cell.publish(table(&["10.0.0.1:80"]));
        checks.pool.cell.publish(table(&["new.internal:80"]));
        checks.look();
        let mut known: Vec<_> = checks.known.keys().map(BackendId::as_str).collect();
        known.sort_unstable();
        assert_eq!(known, ["10.0.0.1:80", "new.internal:80"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_comes_and_goes_leaves_no_times_behind() {
        let second = Duration::from_secs(1);
        let mut checks = checks(&["10.0.0.1:80", "10.0.0.2:80"], 3600 * second, second);
        for _ in 0..1_000 {
            for members in [&["10.0.0.1:80"][..], &["10.0.0.1:80", "10.0.0.2:80"]] {
                checks.pool.cell.publish(table(members));
                checks.look();
            }
        }
        assert!(checks.due.len() <= 2 * 2 + DUE_SPARE, "{} times of two members", checks.due.len());
        assert!(checks.known.iter().all(|(id, known)| {
            checks.due.iter().any(|Reverse((due, of))| of == id && known.due == Some(*due))
        }));
    }
}
