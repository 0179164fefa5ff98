//! A pool as the data plane sees it, and the order in which its sources are asked for a backend.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::cell::Cell;
use super::lua_pick::LuaPicker;
use super::pick::{NoPick, Pick, PoolCounters, Source};
use super::take::{take, take_another};
use crate::balance::backend::{
    Active, AddressNumber, Backend, Cause, Failure, Registry, Target, TrialPermit, TrialProgress,
};
use crate::balance::queue::Queue;
use crate::balance::snapshot::{Member, Origin, Snapshot, client_hash};
use crate::balance::values::{BackendId, Balance, Policy, Table};
use crate::observe::counters::PerWorker;

/// At most how many unusable or full backends Redis is told to leave out, beside those already tried. Each
/// makes the script slower.
const LEFT_OUT_MAX: usize = 64;

/// One pool, shared by all workers.
#[derive(Debug)]
pub struct Pool {
    /// Its key in config.yaml.
    pub name: Arc<str>,
    /// Publishes the newest snapshot.
    pub cell: Arc<Cell>,
    /// Finds its living backends.
    pub registry: Arc<Registry>,
    queue: Arc<Queue>,
    has_limit: bool,
    /// What each worker counts of the pool.
    pub counters: PerWorker<PoolCounters>,
    balance: Balance,
    sync: Option<Sync>,
    /// Wakes the task that ejects backends. Notified when a row of failures is long enough to eject a
    /// backend, and when a trial session has made progress.
    outlier_event: Notify,
}

/// How the pool follows Redis.
#[derive(Debug)]
pub struct Sync {
    /// A snapshot is stale if it was not confirmed for longer than this.
    pub max_stale: Duration,
    /// Asks Redis to pick. `None`: the Lua pick is off.
    pub lua: Option<LuaPicker>,
}

impl Pool {
    /// `sync` is `None` if the pool uses its configured backends alone.
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
            outlier_event: Notify::new(),
            cell: Arc::new(Cell::of_pool(configured, policy, registry_of_cell, queue_of_cell)),
            registry,
            queue,
            counters: PerWorker::new(workers),
        }
    }

    /// Picks a backend for `client` that is not in `tried`, and takes a slot there. `random` is uniform over
    /// `u64`.
    ///
    /// A fresh snapshot is asked first. If there is none, or the session has tried all of its backends,
    /// Redis is asked. The last source is the newest snapshot, even if it is stale; before the first answer
    /// of Redis, that is the saved or the configured table. If no backend of a fresh snapshot has weight,
    /// the session gets no backend, and no other source is asked.
    ///
    /// # Errors
    /// `Full`: the session may wait in the [`Pool::queue`].
    ///
    /// # Cost
    /// While the snapshot is fresh: no allocation, no lock, and the clock is not read. Otherwise at most
    /// `lua_pick.timeout`. If backends are full, some more draws, and at worst each backend is asked twice.
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

    /// The part of [`Pool::pick`] that does not need Redis, and so does not wait.
    ///
    /// # Errors
    /// The point for [`Pool::pick_by_redis`], if no fresh snapshot has an answer.
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

    /// As [`Pool::pick`], for a session that the queue has woken.
    ///
    /// # Errors
    /// As [`Pool::pick`].
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

    /// Picks from a fresh snapshot. In a pool without Redis every snapshot is fresh. `None`: no snapshot is
    /// fresh, or the session has tried all backends of the snapshot.
    // Inlined, and without a future of its own: each future that returns a pick copies it in pieces, for
    // about 10 ns.
    #[inline]
    fn pick_at_once(&self, tried: &[BackendId], point: u64, now: Instant) -> Option<Result<Pick, NoPick>> {
        if !self.is_fresh(now) {
            return None;
        }
        let pick = self.pick_from_cell(tried, point, true);
        let is_answer = self.sync.is_none() || tried.is_empty() || !matches!(pick, Err(NoPick::NoBackend));
        is_answer.then_some(pick)
    }

    #[inline]
    fn is_fresh(&self, now: Instant) -> bool {
        let Some(sync) = &self.sync else { return true };
        self.cell.is_fresh_at(now, sync.max_stale)
    }

    /// Picks for a session for which no fresh snapshot has an answer: asks Redis, then the newest snapshot,
    /// even if it is stale.
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

    /// The sessions that wait for a slot.
    #[must_use]
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// True if backends have a limit of sessions.
    #[must_use]
    pub fn has_limit(&self) -> bool {
        self.has_limit
    }

    /// Counts a session that failed by the fault of `backend`, which is not a DNS name.
    pub fn failed(&self, backend: &Backend, failure: Failure) {
        let Some(outlier) = self.cell.policy().outlier else { return };
        let in_a_row = backend.condition.failed(failure, backend.reached());
        // During fail-open an unusable backend gets sessions, too. Their failures cannot eject it.
        if in_a_row >= outlier.consecutive_failures.get() && backend.condition.is_usable() {
            self.outlier_event.notify_one();
        }
    }

    /// Counts a session that failed by the fault of one address of a DNS name. An address that the name does
    /// not have any more is not ejected.
    pub fn failed_at(&self, backend: &Arc<Backend>, address: AddressNumber, failure: Failure, cause: Cause) {
        let Some(target) = Target::all_of(backend).find(|target| target.is_number(address)) else { return };
        target.condition().session_error.set(cause);
        let Some(outlier) = self.cell.policy().outlier else { return };
        let in_a_row = target.condition().failed(failure, target.reached());
        if in_a_row >= outlier.consecutive_failures.get() && target.condition().is_usable() {
            self.outlier_event.notify_one();
        }
    }

    /// Records the progress of the trial session that has `permit`. `to` is `Wanted` when the session has
    /// ended. If it ended without a result, the next session becomes the trial session.
    pub fn report_trial(&self, backend: &Backend, permit: TrialPermit, to: TrialProgress) {
        if backend.move_trial(permit, to) && to != TrialProgress::Wanted {
            self.outlier_event.notify_one();
        }
    }

    /// Waits until a row of failures is long enough to eject a backend, or a trial session has come further.
    /// Cancel safe.
    pub async fn outlier_event(&self) {
        self.outlier_event.notified().await;
    }

    /// The backends that Redis must not pick: those in `tried`, and up to [`LEFT_OUT_MAX`] others that are
    /// in drain or maint, unhealthy, ejected or full. Redis does not know health and slots.
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
            Ok(taken) => (first, taken),
            Err(_) => take_another(&snapshot, tried, point, |point| self.draw(&snapshot, tried, point))
                .map_err(|_| NoPick::Full)?,
        };
        let source = match (snapshot.origin, fresh) {
            (Origin::Configured, _) => Source::Configured,
            // A saved table is stale even while it is confirmed: Redis confirms it only while the key in
            // Redis has no members (`on_empty: keep_last`).
            (Origin::Saved, _) => Source::Stale,
            (Origin::Redis, true) => Source::Snapshot,
            (Origin::Redis, false) => Source::Stale,
        };
        Ok(Pick { backend, trial, weight: member.weight, source })
    }

    /// The point that decides a session's choice: `random`, or the hash of the client's address.
    /// `weighted_round_robin` uses its sequence instead.
    #[inline]
    pub(in crate::balance) fn point(&self, client: IpAddr, random: u64) -> u64 {
        if self.balance == Balance::SourceHash { client_hash(client) } else { random }
    }

    /// Chooses a backend, before it is asked for a slot.
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

    /// Chooses a backend at `point`: always for `weighted_random` and `least_conn`, and for the other
    /// balances after a refusal. `weighted_round_robin` also uses this after a failure, because the next
    /// point of its sequence would give all sessions of a failing backend to the backend that follows it
    /// there.
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
    use crate::balance::values::Weight;
    use std::sync::atomic::Ordering::Relaxed;

    const MAX_STALE: Duration = Duration::from_secs(5);
    const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    fn pool(sync: Option<Sync>) -> Pool {
        let configured = Table::of(&[("10.0.0.1:80", 1.0)]);
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
    async fn without_redis_the_configured_backends_never_become_stale() {
        let pool = pool(None);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.1:80", Source::Configured));
    }

    #[tokio::test(start_paused = true)]
    async fn sources_are_asked_in_the_order_of_the_contract() {
        let (lua, mut requests) = lua_pick::channel(4, Duration::from_millis(50));
        let pool = Arc::new(pool(Some(Sync { max_stale: MAX_STALE, lua: Some(lua) })));
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.1:80", Source::Configured));

        pool.cell.publish(Table::of(&[("10.0.0.2:80", 1.0)]));
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
    async fn a_saved_table_is_stale_even_while_an_empty_redis_keeps_it() {
        let pool = pool(Some(Sync { max_stale: MAX_STALE, lua: None }));
        pool.cell.restore(Table::of(&[("10.0.0.9:80", 1.0)]));
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.9:80", Source::Stale));
        pool.cell.confirm();
        assert_eq!(pick(&pool, &[]).await, named("10.0.0.9:80", Source::Stale));
    }

    #[tokio::test(start_paused = true)]
    async fn redis_is_asked_when_all_were_tried_but_not_when_all_weigh_nothing() {
        let (lua, mut requests) = lua_pick::channel(4, Duration::from_millis(50));
        requests.answering.store(true, Relaxed);
        let pool = pool(Some(Sync { max_stale: MAX_STALE, lua: Some(lua) }));
        pool.cell.publish(Table::of(&[("10.0.0.2:80", 0.0)]));
        assert_eq!(pick(&pool, &[]).await, None);
        assert!(requests.queue.try_recv().is_err(), "redis was asked although its table refuses sessions");

        pool.cell.publish(Table::of(&[("10.0.0.2:80", 1.0)]));
        let tried = ["10.0.0.2:80".parse().expect("an address")];
        assert_eq!(pick(&pool, &tried).await, None);
        assert_eq!(requests.queue.try_recv().expect("redis was asked").tried, tried);
    }
}
