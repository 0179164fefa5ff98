//! A pool as the data plane sees it, and the order in which its sources are asked for a backend.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::backend::Backend;
use super::cell::Cell;
use super::lua_pick::LuaPicker;
use super::snapshot::Origin;
use super::{BackendId, Balance, Table, Weight};
use crate::telemetry::counters::{Counter, PerWorker};

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
}

/// A backend for a session.
#[derive(Clone, Debug)]
pub struct Pick {
    /// The backend itself.
    pub backend: Arc<Backend>,
    /// The weight it was picked by.
    pub weight: Weight,
    /// Who named it.
    pub source: Source,
}

/// One pool, shared by all workers.
#[derive(Debug)]
pub struct Pool {
    /// The key it stands under in config.yaml.
    pub name: Arc<str>,
    /// Its newest snapshot.
    pub cell: Arc<Cell>,
    /// What the workers count of it.
    pub counters: PerWorker<PoolCounters>,
    /// Its place in the configuration.
    index: usize,
    balance: Balance,
    sync: Option<Sync>,
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
        index: usize,
        balance: Balance,
        configured: Table,
        sync: Option<Sync>,
        workers: usize,
    ) -> Self {
        Self {
            name,
            index,
            balance,
            sync,
            cell: Arc::new(Cell::new(configured, workers)),
            counters: PerWorker::new(workers),
        }
    }

    /// A backend that is not in `tried`; `random` is uniform over all of `u64`. A fresh snapshot is asked first; where
    /// it is missing, stale or has none left, Redis; then the last snapshot however old, which at the start is the
    /// saved or the configured one. `None`: there is none.
    ///
    /// A fresh snapshot without any weight is an answer too ("no new sessions"), so nobody else is asked then.
    ///
    /// # Cost
    /// No allocation, no lock and no look at the clock while the snapshot is fresh. Otherwise at most
    /// `lua_pick.timeout`.
    pub async fn pick(&self, tried: &[BackendId], random: u64, now: Instant) -> Option<Pick> {
        let Some(sync) = &self.sync else { return self.pick_from_cell(tried, random, true) };

        let fresh = self.cell.age_at(now).is_some_and(|age| age <= sync.max_stale);
        if fresh {
            let pick = self.pick_from_cell(tried, random, true);
            if pick.is_some() || tried.is_empty() {
                return pick;
            }
        }
        if let Some(lua) = &sync.lua
            && let Some((backend, weight)) = lua.pick(self.index, random, tried).await
        {
            return Some(Pick { backend, weight, source: Source::Lua });
        }
        self.pick_from_cell(tried, random, fresh)
    }

    fn pick_from_cell(&self, tried: &[BackendId], random: u64, fresh: bool) -> Option<Pick> {
        let snapshot = self.cell.load();
        let point = match self.balance {
            // A retry takes no point of the sequence: each failure would take the same next one, and the backends that
            // come behind the failing one in the sequence would get all its sessions.
            Balance::WeightedRoundRobin if tried.is_empty() => snapshot.next_point(),
            Balance::WeightedRoundRobin | Balance::WeightedRandom => random,
        };
        let member = snapshot.pick(point, tried)?;
        let source = match (snapshot.origin, fresh) {
            (Origin::Configured, _) => Source::Configured,
            // However fresh: Redis confirms it only for want of members (`on_empty: keep_last`).
            (Origin::Saved, _) => Source::Stale,
            (Origin::Redis, true) => Source::Snapshot,
            (Origin::Redis, false) => Source::Stale,
        };
        Some(Pick { backend: Arc::clone(&member.backend), weight: member.weight, source })
    }
}

#[cfg(test)]
mod tests {
    use super::super::lua_pick;
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    const MAX_STALE: Duration = Duration::from_secs(5);

    fn table(members: &[(&str, f64)]) -> Table {
        let member = |(text, weight): &(&str, f64)| {
            (text.parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        Table::new(members.iter().map(member).collect())
    }

    fn pool(sync: Option<Sync>) -> Pool {
        let configured = table(&[("10.0.0.1:80", 1.0)]);
        Pool::new("web".into(), 0, Balance::WeightedRandom, configured, sync, 1)
    }

    async fn pick(pool: &Pool, tried: &[BackendId]) -> Option<(String, Source)> {
        let pick = pool.pick(tried, 7, Instant::now()).await?;
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
        let backend = pool.cell.registry().get_or_create(&"10.0.0.3:80".parse().expect("an address"));
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
