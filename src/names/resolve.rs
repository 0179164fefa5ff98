//! Keeps the addresses of backends that are DNS names up to date, so that no session ever waits for a
//! resolver.
//!
//! A name that fails to resolve keeps its last addresses. A name that never resolved has no share of its
//! pool; while a table has nothing but such names, the backends of the table before serve
//! (`balance/snapshot/snapshot.rs`). The system's resolver does not report a time to live, so names are
//! looked up again at a fixed interval. Each name has its own schedule and is used as soon as it resolves: a
//! dead name holds back no other.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, watch};
use tokio::task::{self, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{error, info, warn};

use super::lookup;
use crate::balance::backend::Backend;
use crate::balance::pool::Pool;
use crate::balance::{Address, BackendId};
use crate::control::backoff::{Backoff, jittered};
use crate::net::descriptors;

/// The time between two lookups of a name. Container platforms move a name within seconds of a restart.
const INTERVAL: Duration = Duration::from_secs(5);
/// The longest pause after the first failure; each failure doubles it, up to `INTERVAL`. New tables do not
/// shorten the pause: a table that changes a thousand times a second must not cause a thousand lookups of
/// an unknown name.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// How long a lookup may take. The system's resolver gives up after 5 s a server by default.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(6);
/// The shortest time until the timer searches for due names again (a new table does so at once), and
/// between two snapshots made for names that resolved: each takes up to half a millisecond in a table of
/// 10,000.
const PACE: Duration = Duration::from_millis(50);

/// Permits for lookups, for the whole process. Each lookup occupies a thread until the system's library
/// returns, which may be after [`LOOKUP_TIMEOUT`].
static PERMITS: Semaphore = Semaphore::const_new(96);
/// Permits for names whose last lookup failed. They have their own, because their lookups take longest.
static PERMITS_OF_FAILING: Semaphore = Semaphore::const_new(32);
/// Permits while clients use all descriptors that they may have: a lookup takes up to three descriptors
/// from the reserve.
static PERMITS_IN_SHORTAGE: Semaphore = Semaphore::const_new(4);

/// Resolves the names of one pool.
#[derive(Debug)]
pub struct Names {
    pool: Arc<Pool>,
    published: watch::Receiver<SystemTime>,
    states: HashMap<BackendId, NameState>,
    lookups: JoinSet<(Arc<Backend>, Answer)>,
    /// When the next name is due, of the names without a lookup under way.
    next_due: Option<Instant>,
    /// When to make a new snapshot. `None` while the snapshot has the newest addresses.
    refresh_at: Option<Instant>,
    refreshed: Instant,
}

/// The addresses of a name, or why it has none.
type Answer = Result<Vec<SocketAddr>, String>;

/// The state of one name.
#[derive(Debug)]
struct NameState {
    /// When the next lookup is due.
    due: Instant,
    /// The task that looks the name up now.
    lookup: Option<task::Id>,
    /// The newest table does not have the name.
    is_absent: bool,
    /// Why the last lookup failed. Each new reason is logged once, not at every lookup.
    error: Option<String>,
    backoff: Backoff,
}

/// Looks up the names of all pools, and of tables that come meanwhile, until no lookup is under way.
///
/// # Cancel safety
/// A lookup that is under way goes on: [`Names::run`] applies its result.
pub async fn settle(pools: &mut [Names]) {
    let mut open: Vec<_> = pools.iter_mut().map(|names| Box::pin(names.settle())).collect();
    poll_fn(|context| {
        open.retain_mut(|settles| settles.as_mut().poll(context).is_pending());
        if open.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

impl Names {
    /// Makes the object for the names of `pool`. Looks up none of them yet.
    #[must_use]
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            published: pool.cell.published(),
            pool,
            states: HashMap::new(),
            lookups: JoinSet::new(),
            next_due: None,
            refresh_at: None,
            refreshed: Instant::now() - PACE,
        }
    }

    /// Keeps the names of the pool resolved. Never ends.
    pub async fn run(mut self) {
        self.look_up_due();
        loop {
            self.step().await;
        }
    }

    async fn settle(&mut self) {
        self.look_up_due();
        while !self.lookups.is_empty() || self.refresh_at.is_some() {
            self.step().await;
        }
    }

    /// Waits for one event and handles it. Cancel safe.
    async fn step(&mut self) {
        let (next_due, refresh_at) = (self.next_due, self.refresh_at);
        tokio::select! {
            // The timers come first, so that a storm of new tables cannot starve them.
            biased;
            () = sleep_until_some(refresh_at) => self.refresh(),
            () = sleep_until_some(next_due) => self.look_up_due(),
            Some(done) = self.lookups.join_next_with_id() => match done {
                Ok((_, (backend, result))) => self.apply(&backend, result),
                Err(panicked) => self.schedule_after_panic(panicked.id()),
            },
            // Never an error: `self.pool` keeps the cell alive.
            Ok(()) = self.published.changed() => self.look_up_due(),
        }
    }

    /// Starts a lookup of each name that is due or new in the table.
    fn look_up_due(&mut self) {
        let now = Instant::now();
        let snapshot = self.pool.cell.load();
        let names = snapshot.members().iter().map(|member| &member.backend).filter(|b| is_name(b));
        let mut absent = std::mem::take(&mut self.states);
        for backend in names {
            let mut state = absent.remove(backend.id()).unwrap_or_else(|| NameState {
                due: now,
                lookup: None,
                is_absent: false,
                error: None,
                backoff: Backoff::new(FIRST_PAUSE, INTERVAL),
            });
            // A backend that returns to the table has its old addresses or none, and its name may have moved
            // meanwhile.
            let is_back = std::mem::take(&mut state.is_absent);
            let is_new = state.error.is_none() && (is_back || !backend.is_reachable());
            if state.lookup.is_none() && (is_new || state.due <= now) {
                let permits = if state.error.is_some() { &PERMITS_OF_FAILING } else { &PERMITS };
                state.lookup = Some(self.lookups.spawn(look_up(Arc::clone(backend), permits)).id());
            }
            self.states.insert(backend.id().clone(), state);
        }
        let waiting = self.states.values().filter(|state| state.lookup.is_none());
        self.next_due = waiting.map(|state| state.due.max(now + PACE)).min();
        // Absent names are remembered for a while, so that a name that comes and goes with every other table
        // keeps its pauses.
        absent.retain(|_, state| state.lookup.is_some() || state.due + INTERVAL > now);
        absent.values_mut().for_each(|state| state.is_absent = true);
        self.states.extend(absent);
    }

    fn apply(&mut self, backend: &Backend, result: Answer) {
        let now = Instant::now();
        let Some(state) = self.states.get_mut(backend.id()) else { return };
        state.lookup = None;
        let (pool, name) = (&self.pool.name, backend.id());
        match result {
            Ok(addresses) => {
                if state.error.take().is_some() {
                    info!(%pool, backend = %name, ?addresses, "the name resolves again");
                }
                state.backoff.reset();
                state.due = now + jittered(INTERVAL);
                let was_out = backend.is_reachable() && !backend.is_usable();
                if backend.set_resolved(addresses) {
                    if was_out && backend.is_usable() {
                        backend.condition.begin_ramp(now);
                    }
                    self.refresh_at.get_or_insert(self.refreshed + PACE);
                }
            }
            Err(error) => {
                state.due = now + state.backoff.patient_pause();
                if state.error.as_ref() != Some(&error) {
                    warn!(
                        %pool, backend = %name, error, keeps_last_addresses = backend.is_reachable(),
                        "the backend's name does not resolve: check its spelling and this machine's resolver"
                    );
                    state.error = Some(error);
                }
            }
        }
        let due = state.due.max(now + PACE);
        self.next_due = Some(self.next_due.map_or(due, |other| other.min(due)));
    }

    /// Schedules the next lookup of a name whose lookup's task panicked, which is a defect, with the pause
    /// after a failure.
    fn schedule_after_panic(&mut self, lookup: task::Id) {
        let Some((name, state)) = self.states.iter_mut().find(|(_, state)| state.lookup == Some(lookup))
        else {
            return;
        };
        error!(pool = %self.pool.name, backend = %name, "a DNS lookup panicked, which is a defect: retrying");
        state.lookup = None;
        state.due = Instant::now() + state.backoff.patient_pause();
        let due = state.due;
        self.next_due = Some(self.next_due.map_or(due, |other| other.min(due)));
    }

    fn refresh(&mut self) {
        self.pool.cell.readdress();
        self.refresh_at = None;
        self.refreshed = Instant::now();
    }
}

/// Sleeps until `time`; for ever if there is none.
async fn sleep_until_some(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn is_name(backend: &Backend) -> bool {
    matches!(backend.id().address(), Address::Name { .. })
}

async fn look_up(backend: Arc<Backend>, permits: &'static Semaphore) -> (Arc<Backend>, Answer) {
    let Address::Name { host, port } = backend.id().address() else { return (backend, Ok(Vec::new())) };
    let permits = if descriptors::are_short() { &PERMITS_IN_SHORTAGE } else { permits };
    // The wait for a permit and a thread is not part of the timeout: it says nothing about the name.
    let lookup = lookup::start(permits, Arc::clone(host), *port).await;
    let result = match timeout(LOOKUP_TIMEOUT, lookup).await {
        Ok(Ok(Ok(addresses))) if addresses.is_empty() => Err("the name has no address".to_owned()),
        Ok(Ok(Ok(addresses))) => Ok(addresses),
        Ok(Ok(Err(error))) => Err(error.to_string()),
        Ok(Err(panicked)) => Err(panicked.to_string()),
        Err(_) => Err("the resolver did not answer in time".to_owned()),
    };
    (backend, result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Balance, Table};
    use crate::control::blocking;
    use tokio::time::advance;

    fn names(members: &[(&str, f64)]) -> Names {
        let pool = Pool::new("web".into(), Balance::WeightedRandom, Table::of(members), None, 1);
        Names::new(Arc::new(pool))
    }

    /// Returns the number of lookups begun since the last call, and drops them before they ask the
    /// resolver.
    async fn begun(names: &mut Names) -> usize {
        let lookups = std::mem::take(&mut names.lookups);
        let count = lookups.len();
        drop(lookups);
        tokio::task::yield_now().await;
        count
    }

    fn backend(names: &Names, id: &str) -> Arc<Backend> {
        names.pool.registry.get_or_create(&id.parse().expect("an address"))
    }

    #[tokio::test(start_paused = true)]
    async fn new_tables_do_not_shorten_the_pauses_of_a_name_that_failed() {
        let mut names = names(&[("dead.test:80", 1.0)]);
        let dead = backend(&names, "dead.test:80");
        names.look_up_due();
        assert_eq!(begun(&mut names).await, 1);
        names.look_up_due();
        assert_eq!(begun(&mut names).await, 0, "it is under way");
        let mut pauses = Vec::new();
        for _ in 0..5 {
            names.apply(&dead, Err("no such name".to_owned()));
            let (failed, mut weight) = (Instant::now(), 1.0);
            while begun(&mut names).await == 0 {
                advance(Duration::from_millis(10)).await;
                weight += 1.0;
                // The name leaves the table and comes back.
                names.pool.cell.publish(Table::of(&[("10.0.0.1:80", weight)]));
                names.look_up_due();
                names.pool.cell.publish(Table::of(&[("10.0.0.1:80", weight), ("dead.test:80", 1.0)]));
                names.look_up_due();
            }
            pauses.push(failed.elapsed());
        }
        for (pause, longest) in pauses.iter().zip([1, 2, 4, 5, 5]) {
            let longest = Duration::from_secs(longest);
            assert!(*pause >= longest / 2 && *pause <= longest + PACE, "{pauses:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn new_tables_do_not_delay_the_next_lookup_of_a_name() {
        let mut names = names(&[("good.test:80", 1.0)]);
        let good = backend(&names, "good.test:80");
        names.look_up_due();
        assert_eq!(begun(&mut names).await, 1);
        names.apply(&good, Ok(vec!["10.0.0.1:80".parse().expect("an address")]));
        let answered = Instant::now();
        let mut weight = 1.0;
        while begun(&mut names).await == 0 {
            assert!(answered.elapsed() < 2 * INTERVAL, "it is not looked up again");
            weight += 1.0;
            names.pool.cell.publish(Table::of(&[("good.test:80", weight)]));
            names.step().await;
            advance(Duration::from_millis(10)).await;
        }
        // `jittered` makes the interval up to a fifth shorter.
        assert!(answered.elapsed() >= INTERVAL.mul_f64(0.8), "{:?}", answered.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_resolves_is_used_while_other_lookups_still_run() {
        let dead: Vec<String> = (0..80).map(|i| format!("dead{i}.test:80")).collect();
        let mut members: Vec<(&str, f64)> = dead.iter().map(|name| (&**name, 1.0)).collect();
        members.push(("good.test:80", 1.0));
        let mut names = names(&members);
        names.look_up_due();
        assert!(PERMITS.available_permits() > 80, "all are looked up at once");
        let good = backend(&names, "good.test:80");
        let picked = |names: &Names| names.pool.cell.load().pick(7, &[]).map(|m| m.backend.id().to_string());
        assert_eq!(picked(&names), None);
        names.apply(&good, Ok(vec!["10.0.0.1:80".parse().expect("an address")]));
        names.step().await;
        assert_eq!(picked(&names), Some("good.test:80".to_owned()));
        assert_eq!(begun(&mut names).await, 81);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_left_and_came_back_is_looked_up_at_once() {
        let mut names = names(&[("a.test:80", 1.0)]);
        names.look_up_due();
        assert_eq!(begun(&mut names).await, 1);
        names.apply(&backend(&names, "a.test:80"), Ok(vec!["10.0.0.1:80".parse().expect("an address")]));
        names.pool.cell.publish(Table::of(&[("10.0.0.1:80", 1.0)]));
        names.look_up_due();
        names.pool.cell.publish(Table::of(&[("a.test:80", 1.0)]));
        names.look_up_due();
        assert_eq!(begun(&mut names).await, 1);
    }

    #[tokio::test]
    async fn a_lookup_that_gets_no_thread_is_started_once_there_is_one() {
        let mut names = names(&[("localhost:80", 1.0)]);
        let backend = backend(&names, "localhost:80");
        blocking::refusals::refuse(3);
        names.look_up_due();
        while !backend.is_reachable() {
            names.step().await;
        }
        assert_eq!(blocking::refusals::left(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_whose_lookup_panicked_is_looked_up_again() {
        let mut names = names(&[("a.test:80", 1.0)]);
        names.look_up_due();
        assert_eq!(begun(&mut names).await, 1);
        let state = names.states.values_mut().next().expect("its state");
        state.lookup = Some(names.lookups.spawn(async { panic!("a defect that this test makes") }).id());
        names.step().await;
        while begun(&mut names).await == 0 {
            names.step().await;
        }
    }
}
