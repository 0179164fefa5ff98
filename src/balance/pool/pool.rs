//! A pool as the data plane sees it, and the order in which its sources are asked for a backend.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::cell::Cell;
use super::lua_pick::LuaPicker;
use super::take::{take, take_another};
use crate::balance::backend::{
    Active, AddressNumber, Backend, Cause, Failure, Registry, Target, TrialPermit, TrialProgress,
};
use crate::balance::queue::Queue;
use crate::balance::snapshot::{Member, Origin, Snapshot, client_hash};
use crate::balance::values::{BackendId, Balance, Policy, Table, Weight};
use crate::observe::counters::{Counter, PerWorker};

/// Redis is told so many backends at most that health speaks against: each makes its work longer.
const LEFT_OUT_MAX: usize = 64;

/// Who named the backend. The log and the metrics say it by [`Source::name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A snapshot that is known to equal Redis.
    Snapshot,
    /// Redis itself, by the Lua script.
    Lua,
    /// The last snapshot of Redis, however old: also one that was saved before this process began.
    Stale,
    /// The `backends` of config.yaml.
    Configured,
}

impl Source {
    /// In the order of their declaration.
    pub const ALL: [Self; 4] = [Self::Snapshot, Self::Lua, Self::Stale, Self::Configured];

    /// As in the metrics' label and the access log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Lua => "lua",
            Self::Stale => "stale",
            Self::Configured => "configured",
        }
    }
}

/// What one worker counts of one pool.
#[derive(Debug, Default)]
pub struct PoolCounters {
    /// Backends named, by [`Source`].
    pub picks: [Counter; 4],
    /// Sessions that waited in the queue.
    pub queued: Counter,
}

/// A backend for a session.
#[derive(Debug)]
pub struct Pick {
    /// The session's place there.
    pub backend: Active,
    /// The session is to show whether the backend is back. Nobody else does until [`Pool::probed`] hears what became of it.
    pub trial: Option<TrialPermit>,
    /// The weight it was picked by.
    pub weight: Weight,
    /// Who named it.
    pub source: Source,
}

/// Why there is no backend for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPick {
    /// None has any weight, or none is left to try.
    NoBackend,
    /// Those that are have as many sessions as they may have, or others wait for a place already.
    Full,
}

/// One pool, shared by all workers.
#[derive(Debug)]
pub struct Pool {
    /// The key it stands under in config.yaml.
    pub name: Arc<str>,
    /// Its newest snapshot.
    pub cell: Arc<Cell>,
    /// Its backends that live.
    pub registry: Arc<Registry>,
    queue: Arc<Queue>,
    has_limit: bool,
    /// What the workers count of it.
    pub counters: PerWorker<PoolCounters>,
    balance: Balance,
    sync: Option<Sync>,
    /// A backend failed so often that it may have to be ejected, or the session that probes one has come further.
    suspicion: Notify,
}

/// How a pool's table follows Redis.
#[derive(Debug)]
pub struct Sync {
    /// A snapshot that was not confirmed for longer is stale.
    pub max_stale: Duration,
    /// `None`: Redis is not asked to pick.
    pub lua: Option<LuaPicker>,
}

impl Pool {
    /// `sync` is `None` where the pool runs on its configured backends alone.
    #[must_use]
    pub fn new(
        name: Arc<str>,
        policy: impl Into<Policy>,
        configured: Table,
        sync: Option<Sync>,
        workers: usize,
    ) -> Self {
        let policy = Arc::new(policy.into());
        let queue = Arc::new(Queue::new(policy.capacity.queue_size));
        let registry = Arc::new(Registry::of_pool(workers, Arc::clone(&policy), Arc::clone(&queue)));
        let (registry_of_cell, queue_of_cell) = (Arc::clone(&registry), Arc::clone(&queue));
        Self {
            name,
            balance: policy.balance,
            has_limit: policy.capacity.max_connections > 0,
            sync,
            suspicion: Notify::new(),
            cell: Arc::new(Cell::of_pool(configured, policy, registry_of_cell, queue_of_cell)),
            registry,
            queue,
            counters: PerWorker::new(workers),
        }
    }

    /// A backend for `client` that is not in `tried`, with a place there; `random` is uniform over all of `u64`. A fresh snapshot is
    /// asked first; where it is missing, stale or has none left, Redis; then the last snapshot however old, which at the start
    /// is the saved or the configured one.
    ///
    /// A fresh snapshot without any weight is an answer too ("no new sessions"), so nobody else is asked then.
    ///
    /// # Errors
    /// `Full`: the session may wait in the [`Pool::queue`].
    ///
    /// # Cost
    /// No allocation, no lock and no look at the clock while the snapshot is fresh. Otherwise at most
    /// `lua_pick.timeout`. Where backends are full, some more draws, and at worst two looks at each of them.
    pub async fn pick(
        &self,
        client: SocketAddr,
        tried: &[BackendId],
        random: u64,
        now: Instant,
    ) -> Result<Pick, NoPick> {
        match self.pick_or_point(client, tried, random, now) {
            Ok(pick) => pick,
            Err(point) => self.pick_by_redis(tried, point, now).await,
        }
    }

    /// The same as far as it needs no answer from Redis.
    ///
    /// # Errors
    /// The point for [`Pool::pick_by_redis`], where no fresh snapshot has an answer.
    #[inline]
    pub fn pick_or_point(
        &self,
        client: SocketAddr,
        tried: &[BackendId],
        random: u64,
        now: Instant,
    ) -> Result<Result<Pick, NoPick>, u64> {
        if self.has_limit() && self.queue().waiting() > 0 {
            return Ok(Err(NoPick::Full));
        }
        let point = self.point(client.ip(), random);
        self.pick_at_once(tried, point, now).ok_or(point)
    }

    /// The same, for a session of the queue whose turn it is.
    ///
    /// # Errors
    /// As there.
    pub async fn pick_for_waiter(
        &self,
        client: SocketAddr,
        tried: &[BackendId],
        random: u64,
        now: Instant,
    ) -> Result<Pick, NoPick> {
        let point = self.point(client.ip(), random);
        match self.pick_at_once(tried, point, now) {
            Some(pick) => pick,
            None => self.pick_by_redis(tried, point, now).await,
        }
    }

    /// From a fresh snapshot, or one that never ages. `None`: there is none, or it has nobody left for a session that has tried some.
    // Inlined, and no future of its own: each that a pick comes through copies it in pieces, for some 10 ns.
    #[inline]
    fn pick_at_once(&self, tried: &[BackendId], point: u64, now: Instant) -> Option<Result<Pick, NoPick>> {
        if !self.is_fresh(now) {
            return None;
        }
        let pick = self.pick_from_cell(tried, point, true);
        let is_said = self.sync.is_none() || tried.is_empty() || !matches!(pick, Err(NoPick::NoBackend));
        is_said.then_some(pick)
    }

    #[inline]
    fn is_fresh(&self, now: Instant) -> bool {
        let Some(sync) = &self.sync else { return true };
        self.cell.is_fresh_at(now, sync.max_stale)
    }

    /// Where no fresh snapshot has an answer: Redis, then the last snapshot however old.
    ///
    /// # Errors
    /// As [`Pool::pick`].
    ///
    /// # Cancel safety
    /// Dropping the future gives up the answer of Redis.
    pub async fn pick_by_redis(&self, tried: &[BackendId], point: u64, now: Instant) -> Result<Pick, NoPick> {
        let mut none = NoPick::NoBackend;
        if let Some(lua) = self.sync.as_ref().and_then(|sync| sync.lua.as_ref())
            && let Some((backend, weight)) = lua.pick(point, self.left_out(tried)).await
        {
            if let Some(backend) = Active::take(&backend) {
                return Ok(Pick { backend, trial: None, weight, source: Source::Lua });
            }
            none = NoPick::Full;
        }
        self.pick_from_cell(tried, point, self.is_fresh(now))
            .map_err(|no| if no == NoPick::Full { no } else { none })
    }

    /// Who waits for a place.
    #[must_use]
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// True where a backend may have only so many sessions.
    #[must_use]
    pub fn has_limit(&self) -> bool {
        self.has_limit
    }

    /// A session failed by the fault of `backend`, which has no name.
    pub fn failed(&self, backend: &Backend, failure: Failure) {
        let Some(outlier) = self.cell.policy().outlier else { return };
        let in_a_row = backend.condition.failed(failure, backend.reached());
        // Who is out already cannot be ejected, and gets many sessions while health is ignored.
        if in_a_row >= outlier.consecutive_failures.get() && backend.condition.is_usable() {
            self.suspicion.notify_one();
        }
    }

    /// A session failed by the fault of one address of the name of `backend`. One that the name does not have any more is not
    /// ejected.
    pub fn failed_at(&self, backend: &Arc<Backend>, address: AddressNumber, failure: Failure, cause: Cause) {
        let Some(target) = Target::all_of(backend).find(|target| target.is_number(address)) else { return };
        target.condition().session_error.set(cause);
        let Some(outlier) = self.cell.policy().outlier else { return };
        let in_a_row = target.condition().failed(failure, target.reached());
        if in_a_row >= outlier.consecutive_failures.get() && target.condition().is_usable() {
            self.suspicion.notify_one();
        }
    }

    /// The session with this permit for `backend` has come so far; `Wanted`: it has ended, and where it showed nothing, the next one is
    /// to.
    pub fn report_trial(&self, backend: &Backend, permit: TrialPermit, to: TrialProgress) {
        if backend.move_trial(permit, to) && to != TrialProgress::Wanted {
            self.suspicion.notify_one();
        }
    }

    /// Waits until a backend failed so often that it may have to be ejected, or until a probe has come further. Cancel safe.
    pub async fn suspicion(&self) {
        self.suspicion.notified().await;
    }

    /// What Redis, which knows nothing of health and places, is not to pick: those in `tried`, and some of those that are not ready
    /// (of which it may know), that health speaks against or that are full.
    fn left_out(&self, tried: &[BackendId]) -> Vec<BackendId> {
        let snapshot = self.cell.load();
        let full = snapshot.pickable().iter().filter(|member| member.backend.slots().is_full());
        let out = |wants_sessions: bool| {
            snapshot.unusable().filter(move |member| member.wants_sessions() == wants_sessions)
        };
        let others = out(false).chain(out(true)).chain(full).map(|member| member.backend.id().clone());
        tried.iter().cloned().chain(others.take(LEFT_OUT_MAX)).collect()
    }

    #[inline]
    fn pick_from_cell(&self, tried: &[BackendId], point: u64, fresh: bool) -> Result<Pick, NoPick> {
        let snapshot = self.cell.load();
        let first = self.choose(&snapshot, tried, point).ok_or(NoPick::NoBackend)?;
        let (member, (backend, trial)) = match take(first) {
            Ok(place) => (first, place),
            Err(_) => take_another(&snapshot, tried, point, |point| self.draw(&snapshot, tried, point))
                .map_err(|_| NoPick::Full)?,
        };
        let source = match (snapshot.origin, fresh) {
            (Origin::Configured, _) => Source::Configured,
            // However fresh: Redis confirms it only for want of members (`on_empty: keep_last`).
            (Origin::Saved, _) => Source::Stale,
            (Origin::Redis, true) => Source::Snapshot,
            (Origin::Redis, false) => Source::Stale,
        };
        Ok(Pick { backend, trial, weight: member.weight, source })
    }

    /// What a session's choice goes by, where it is not the sequence: `random`, or who the client is.
    #[inline]
    pub(in crate::balance) fn point(&self, client: IpAddr, random: u64) -> u64 {
        if self.balance == Balance::SourceHash { client_hash(client) } else { random }
    }

    /// The choice itself.
    #[inline]
    pub(in crate::balance) fn choose<'a>(
        &self,
        snapshot: &'a Snapshot,
        tried: &[BackendId],
        point: u64,
    ) -> Option<&'a Member> {
        match self.balance {
            Balance::WeightedRoundRobin if tried.is_empty() => snapshot.pick(snapshot.next_point(), tried),
            Balance::SourceHash => snapshot.pick_for(point, tried),
            _ => self.draw(snapshot, tried, point),
        }
    }

    /// A choice after one that did not do. It takes no point of the sequence: each failure would take the same next one, and the
    /// backends that come behind the failing one in the sequence would get all its sessions. Nor is it the client's own.
    #[inline]
    fn draw<'a>(&self, snapshot: &'a Snapshot, tried: &[BackendId], point: u64) -> Option<&'a Member> {
        match self.balance {
            Balance::LeastConn => snapshot.pick_least_busy(point, tried),
            _ => snapshot.pick(point, tried),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lua_pick;
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    const MAX_STALE: Duration = Duration::from_secs(5);
    const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    fn table(members: &[(&str, f64)]) -> Table {
        let member = |(text, weight): &(&str, f64)| {
            (text.parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        Table::new(members.iter().map(member).collect())
    }

    fn pool(sync: Option<Sync>) -> Pool {
        let configured = table(&[("10.0.0.1:80", 1.0)]);
        Pool::new("web".into(), Balance::WeightedRandom, configured, sync, 1)
    }

    async fn pick(pool: &Pool, tried: &[BackendId]) -> Option<(String, Source)> {
        let pick = pool.pick(CLIENT, tried, 7, Instant::now()).await.ok()?;
        Some((pick.backend.id().to_string(), pick.source))
    }

    fn named(text: &str, source: Source) -> Option<(String, Source)> {
        Some((text.to_owned(), source))
    }

    #[tokio::test(start_paused = true)]
    async fn without_redis_the_configured_backends_serve_for_ever() {
        let pool = pool(None);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.1:80", Source::Configured));
    }

    #[tokio::test(start_paused = true)]
    async fn sources_are_asked_in_the_order_of_the_contract() {
        let (lua, mut requests) = lua_pick::channel(4, Duration::from_millis(50));
        let pool = Arc::new(pool(Some(Sync { max_stale: MAX_STALE, lua: Some(lua) })));
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.1:80", Source::Configured));

        pool.cell.publish(table(&[("10.0.0.2:80", 1.0)]));
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.2:80", Source::Snapshot));

        tokio::time::advance(MAX_STALE + Duration::from_millis(1)).await;
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.2:80", Source::Stale));

        requests.answering.store(true, Relaxed);
        let asking = Arc::clone(&pool);
        let asked = tokio::spawn(async move { pick(&asking, &[]).await });
        let request = requests.queue.recv().await.expect("a request");
        let backend = pool.registry.get_or_create(&"10.0.0.3:80".parse().expect("an address"));
        request.answer.send(Some((backend, Weight::ZERO))).expect("the session waits");
        assert_eq!(asked.await.expect("the task ends"), named("10.0.0.3:80", Source::Lua));

        pool.cell.confirm();
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.2:80", Source::Snapshot));
    }

    #[tokio::test(start_paused = true)]
    async fn a_saved_table_is_stale_even_where_an_emptied_redis_lets_it_stand() {
        let pool = pool(Some(Sync { max_stale: MAX_STALE, lua: None }));
        pool.cell.restore(table(&[("10.0.0.9:80", 1.0)]));
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.9:80", Source::Stale));
        pool.cell.confirm();
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.9:80", Source::Stale));
    }

    #[tokio::test(start_paused = true)]
    async fn redis_is_asked_when_all_were_tried_but_not_when_all_weigh_nothing() {
        let (lua, mut requests) = lua_pick::channel(4, Duration::from_millis(50));
        requests.answering.store(true, Relaxed);
        let pool = pool(Some(Sync { max_stale: MAX_STALE, lua: Some(lua) }));
        pool.cell.publish(table(&[("10.0.0.2:80", 0.0)]));
        assert_eq!(pick(&pool, &[]).await, None);
        assert!(requests.queue.try_recv().is_err(), "redis was asked although its table says: none");

        pool.cell.publish(table(&[("10.0.0.2:80", 1.0)]));
        let tried = ["10.0.0.2:80".parse().expect("an address")];
        assert_eq!(pick(&pool, &tried).await, None);
        assert_eq!(requests.queue.try_recv().expect("redis was asked").tried, tried);
    }
}
