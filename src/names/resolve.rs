//! Keeps the addresses of backends that are DNS names up to date, so that no session ever waits for a resolver.
//!
//! A name that fails to resolve keeps the addresses that it had; one that never resolved has no share of its pool, and
//! while a table has nothing else, the backends before stand in (`balance/snapshot.rs`). The system's resolver tells no
//! time to live, so names are asked for again at a fixed pace. Names wait for each other neither in being looked up nor
//! in being used: each has its own time, and a dead one must not hold back its neighbours.

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

/// Between two looks at a name. Container platforms move a name within seconds of a restart.
const INTERVAL: Duration = Duration::from_secs(5);
/// After the first failure; then it doubles up to `INTERVAL`. New tables do not hasten it: a table that changes a
/// thousand times a second must not ask a thousand times for a name that nobody knows.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The system's resolver itself gives up after 5 s a server by default.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(6);
/// Between two looks at what is due, and between two snapshots made for names that resolved: each takes up to half a
/// millisecond in a table of 10,000.
const PACE: Duration = Duration::from_millis(50);

/// Each lookup has a thread for as long as the system's library takes, which may be longer than anyone waits for it.
/// The bounds are the whole process's.
static PLACES: Semaphore = Semaphore::const_new(96);
/// Names that failed the last time have fewer places, of their own: they are those that take long.
static PLACES_OF_FAILING: Semaphore = Semaphore::const_new(32);
/// While clients hold all descriptors that they may have: a lookup takes up to three of the last ones.
static PLACES_IN_SHORTAGE: Semaphore = Semaphore::const_new(4);

/// The names of one pool.
#[derive(Debug)]
pub struct Names {
    pool: Arc<Pool>,
    published: watch::Receiver<SystemTime>,
    known: HashMap<BackendId, Known>,
    lookups: JoinSet<(Arc<Backend>, Answer)>,
    /// When the earliest of `known` is due.
    next_look: Option<Instant>,
    /// Set while the snapshot does not go by the newest addresses.
    refresh_at: Option<Instant>,
    refreshed: Instant,
}

/// Addresses, or why there are none.
type Answer = Result<Vec<SocketAddr>, String>;

/// What is known of one name.
#[derive(Debug)]
struct Known {
    due: Instant,
    /// The task that looks it up now.
    lookup: Option<task::Id>,
    /// It was in no table when the names were last looked at.
    is_away: bool,
    /// Why it does not resolve: logged once for each new reason, not once for each look.
    error: Option<String>,
    backoff: Backoff,
}

/// Looks at the names of all pools until each has been answered, also at those of tables that come meanwhile. Cancel
/// safe: `run` goes on with what is under way.
pub async fn settle(pools: &mut [Names]) {
    let mut open: Vec<_> = pools.iter_mut().map(|names| Box::pin(names.settle())).collect();
    poll_fn(|context| {
        open.retain_mut(|settles| settles.as_mut().poll(context).is_pending());
        if open.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

impl Names {
    /// Not looked at yet.
    #[must_use]
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            published: pool.cell.published(),
            pool,
            known: HashMap::new(),
            lookups: JoinSet::new(),
            next_look: None,
            refresh_at: None,
            refreshed: Instant::now() - PACE,
        }
    }

    /// Resolves them again and again. Never ends.
    pub async fn run(mut self) {
        self.look();
        loop {
            self.step().await;
        }
    }

    async fn settle(&mut self) {
        self.look();
        while !self.lookups.is_empty() || self.refresh_at.is_some() {
            self.step().await;
        }
    }

    /// Waits for one event and does what it asks for. Cancel safe.
    async fn step(&mut self) {
        let (next_look, refresh_at) = (self.next_look, self.refresh_at);
        tokio::select! {
            // The clocks come first: a storm of new tables must not keep them from their turn.
            biased;
            () = at(refresh_at) => self.refresh(),
            () = at(next_look) => self.look(),
            Some(done) = self.lookups.join_next_with_id() => match done {
                Ok((_, (backend, result))) => self.take(&backend, result),
                Err(died) => self.died(died.id()),
            },
            // The pool is held here, and with it the cell.
            Ok(()) = self.published.changed() => self.look(),
        }
    }

    /// Begins to look up all names that are due, or new in the table.
    fn look(&mut self) {
        let now = Instant::now();
        let snapshot = self.pool.cell.load();
        let names = snapshot.members().iter().map(|member| &member.backend).filter(|b| is_name(b));
        let mut gone = std::mem::take(&mut self.known);
        for backend in names {
            let mut known = gone.remove(backend.id()).unwrap_or_else(|| Known {
                due: now,
                lookup: None,
                is_away: false,
                error: None,
                backoff: Backoff::new(FIRST_PAUSE, INTERVAL),
            });
            // A backend that returns to the table has the addresses that it had, or none: its name may have moved meanwhile.
            let is_back = std::mem::take(&mut known.is_away);
            let is_new = known.error.is_none() && (is_back || !backend.is_reachable());
            if known.lookup.is_none() && (is_new || known.due <= now) {
                let places = if known.error.is_some() { &PLACES_OF_FAILING } else { &PLACES };
                known.lookup = Some(self.lookups.spawn(look_up(Arc::clone(backend), places)).id());
            }
            self.known.insert(backend.id().clone(), known);
        }
        let waiting = self.known.values().filter(|known| known.lookup.is_none());
        self.next_look = waiting.map(|known| known.due.max(now + PACE)).min();
        // A name that comes and goes with every other table has its pauses nevertheless.
        gone.retain(|_, known| known.lookup.is_some() || known.due + INTERVAL > now);
        gone.values_mut().for_each(|known| known.is_away = true);
        self.known.extend(gone);
    }

    /// A lookup has ended.
    fn take(&mut self, backend: &Backend, result: Answer) {
        let now = Instant::now();
        let Some(known) = self.known.get_mut(backend.id()) else { return };
        known.lookup = None;
        let (pool, name) = (&self.pool.name, backend.id());
        match result {
            Ok(addresses) => {
                if known.error.take().is_some() {
                    info!(%pool, backend = %name, ?addresses, "the name resolves again");
                }
                known.backoff.reset();
                known.due = now + jittered(INTERVAL);
                let was_out = backend.is_reachable() && !backend.is_usable();
                if backend.set_resolved(addresses) {
                    if was_out && backend.is_usable() {
                        backend.condition.begin_ramp(now);
                    }
                    self.refresh_at.get_or_insert(self.refreshed + PACE);
                }
            }
            Err(error) => {
                known.due = now + known.backoff.patient_pause();
                if known.error.as_ref() != Some(&error) {
                    warn!(
                        %pool, backend = %name, error, keeps_last_addresses = backend.is_reachable(),
                        "the backend's name does not resolve: check its spelling and this machine's resolver"
                    );
                    known.error = Some(error);
                }
            }
        }
        let due = known.due.max(now + PACE);
        self.next_look = Some(self.next_look.map_or(due, |other| other.min(due)));
    }

    /// A lookup's task died, which is a defect: its name is looked up again, at the pace of a name that fails.
    fn died(&mut self, lookup: task::Id) {
        let Some((name, known)) = self.known.iter_mut().find(|(_, known)| known.lookup == Some(lookup))
        else {
            return;
        };
        error!(pool = %self.pool.name, backend = %name, "a DNS lookup ended without a result: the name is looked up again");
        known.lookup = None;
        known.due = Instant::now() + known.backoff.patient_pause();
        let due = known.due;
        self.next_look = Some(self.next_look.map_or(due, |other| other.min(due)));
    }

    fn refresh(&mut self) {
        self.pool.cell.readdress();
        self.refresh_at = None;
        self.refreshed = Instant::now();
    }
}

/// Never, where there is no time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn is_name(backend: &Backend) -> bool {
    matches!(backend.id().address(), Address::Name { .. })
}

async fn look_up(backend: Arc<Backend>, places: &'static Semaphore) -> (Arc<Backend>, Answer) {
    let Address::Name { host, port } = backend.id().address() else { return (backend, Ok(Vec::new())) };
    let places = if descriptors::are_short() { &PLACES_IN_SHORTAGE } else { places };
    // Waits for as long as the system gives no thread: that says nothing of the name.
    let asked = lookup::start(places, Arc::clone(host), *port).await;
    let result = match timeout(LOOKUP_TIMEOUT, asked).await {
        Ok(Ok(Ok(addresses))) if addresses.is_empty() => Err("it has no address".to_owned()),
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
    use crate::balance::{Balance, Table, Weight};
    use crate::control::blocking;
    use tokio::time::advance;

    fn table(members: &[(&str, f64)]) -> Table {
        let member = |(text, weight): &(&str, f64)| {
            (text.parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        Table::new(members.iter().map(member).collect())
    }

    fn names(members: &[(&str, f64)]) -> Names {
        let pool = Pool::new("web".into(), Balance::WeightedRandom, table(members), None, 1);
        Names::new(Arc::new(pool))
    }

    /// How many lookups were begun. They are dropped before they do anything: no resolver is asked.
    async fn begun(names: &mut Names) -> usize {
        let lookups = std::mem::take(&mut names.lookups);
        let count = lookups.len();
        drop(lookups);
        tokio::task::yield_now().await;
        count
    }

    fn backend(names: &Names, id: &str) -> Arc<Backend> {
        names.pool.cell.registry().get_or_create(&id.parse().expect("an address"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_tables_do_not_ask_again_for_a_name_that_failed() {
        let mut names = names(&[("dead.test:80", 1.0)]);
        let dead = backend(&names, "dead.test:80");
        names.look();
        assert_eq!(begun(&mut names).await, 1);
        names.look();
        assert_eq!(begun(&mut names).await, 0, "it is under way");
        let mut pauses = Vec::new();
        for _ in 0..5 {
            names.take(&dead, Err("nobody knows it".to_owned()));
            let (failed, mut weight) = (Instant::now(), 1.0);
            while begun(&mut names).await == 0 {
                advance(Duration::from_millis(10)).await;
                weight += 1.0;
                // Away and back, too.
                names.pool.cell.publish(table(&[("10.0.0.1:80", weight)]));
                names.look();
                names.pool.cell.publish(table(&[("10.0.0.1:80", weight), ("dead.test:80", 1.0)]));
                names.look();
            }
            pauses.push(failed.elapsed());
        }
        for (pause, longest) in pauses.iter().zip([1, 2, 4, 5, 5]) {
            let longest = Duration::from_secs(longest);
            assert!(*pause >= longest / 2 && *pause <= longest + PACE, "{pauses:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn new_tables_do_not_keep_a_name_from_its_next_look() {
        let mut names = names(&[("good.test:80", 1.0)]);
        let good = backend(&names, "good.test:80");
        names.look();
        assert_eq!(begun(&mut names).await, 1);
        names.take(&good, Ok(vec!["10.0.0.1:80".parse().expect("an address")]));
        let answered = Instant::now();
        let mut weight = 1.0;
        while begun(&mut names).await == 0 {
            assert!(answered.elapsed() < 2 * INTERVAL, "never looked at again");
            weight += 1.0;
            names.pool.cell.publish(table(&[("good.test:80", weight)]));
            names.step().await;
            advance(Duration::from_millis(10)).await;
        }
        // `jittered`: up to a fifth early.
        assert!(answered.elapsed() >= INTERVAL.mul_f64(0.8), "{:?}", answered.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_resolves_is_used_while_others_are_still_waited_for() {
        let dead: Vec<String> = (0..80).map(|i| format!("dead{i}.test:80")).collect();
        let mut members: Vec<(&str, f64)> = dead.iter().map(|name| (&**name, 1.0)).collect();
        members.push(("good.test:80", 1.0));
        let mut names = names(&members);
        names.look();
        assert!(PLACES.available_permits() > 80, "all are looked up at once");
        let good = backend(&names, "good.test:80");
        let picked = |names: &Names| names.pool.cell.load().pick(7, &[]).map(|m| m.backend.id().to_string());
        assert_eq!(picked(&names), None);
        names.take(&good, Ok(vec!["10.0.0.1:80".parse().expect("an address")]));
        names.step().await;
        assert_eq!(picked(&names), Some("good.test:80".to_owned()));
        assert_eq!(begun(&mut names).await, 81);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_left_and_came_back_is_looked_up_at_once() {
        let mut names = names(&[("a.test:80", 1.0)]);
        names.look();
        assert_eq!(begun(&mut names).await, 1);
        names.take(&backend(&names, "a.test:80"), Ok(vec!["10.0.0.1:80".parse().expect("an address")]));
        names.pool.cell.publish(table(&[("10.0.0.1:80", 1.0)]));
        names.look();
        names.pool.cell.publish(table(&[("a.test:80", 1.0)]));
        names.look();
        assert_eq!(begun(&mut names).await, 1);
    }

    #[tokio::test]
    async fn a_lookup_that_gets_no_thread_is_started_once_there_is_one() {
        let mut names = names(&[("localhost:80", 1.0)]);
        let backend = backend(&names, "localhost:80");
        blocking::refusals::refuse(3);
        names.look();
        while !backend.is_reachable() {
            names.step().await;
        }
        assert_eq!(blocking::refusals::left(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_whose_lookup_died_is_looked_up_again() {
        let mut names = names(&[("a.test:80", 1.0)]);
        names.look();
        assert_eq!(begun(&mut names).await, 1);
        let known = names.known.values_mut().next().expect("it is known");
        known.lookup = Some(names.lookups.spawn(async { panic!("a defect that this test makes") }).id());
        names.step().await;
        while begun(&mut names).await == 0 {
            names.step().await;
        }
    }
}
