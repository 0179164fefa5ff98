//! A pool that runs: the pool itself, what is counted of it, and its tasks, which end with the handle.
//!
//! Sessions hold the pool, too, and may outlive the handle.

use std::sync::Arc;

use super::tasks::{Defects, Tasks};
use crate::balance::Table;
use crate::balance::pool::lua_pick::{LuaPicker, PoolId};
use crate::balance::pool::{Pool, Sync};
use crate::config::{self, Config};
use crate::health::active::Checks;
use crate::health::passive::Ejections;
use crate::health::thread::CheckRunner;
use crate::health::{fail_open, slow_start, usable};
use crate::metrics::ObservedPool;
use crate::names::resolve::Names;
use crate::redis::Followed;
use crate::state::SavedPool;
use crate::state::keeper::StateDir;

/// One entry of `pools` that runs.
#[derive(Debug)]
pub(super) struct PoolHandle {
    pub(super) settings: config::Pool,
    /// The pool, the status of its table and that of its file.
    pub(super) observed: ObservedPool,
    /// Names it in requests for Lua picks.
    id: PoolId,
    tasks: Tasks,
}

impl PoolHandle {
    /// A pool with its configured backends, and without tasks. `picker` asks Redis to pick, where that is
    /// wanted.
    pub(super) fn new(
        settings: &config::Pool,
        config: &Config,
        picker: Option<&LuaPicker>,
        defects: Defects,
    ) -> Self {
        let id = PoolId::unique();
        let lua = picker.map(|picker| picker.for_pool(id));
        let sync = config.redis.as_ref().map(|redis| Sync { max_stale: redis.max_stale, lua });
        let (name, table) = (Arc::clone(&settings.name), Table::new(settings.backends.clone()));
        let pool = Pool::new(name, settings.policy(), table, sync, config.workers.get());
        let is_saved = config.redis.is_some() && config.state_dir.is_some();
        let observed =
            ObservedPool { pool: Arc::new(pool), table: Arc::default(), saves: is_saved.then(Arc::default) };
        let tasks = Tasks::new(Some(Arc::clone(&settings.name)), defects);
        Self { settings: settings.clone(), observed, id, tasks }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.settings.name
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.observed.pool
    }

    /// What Redis is followed for.
    pub(super) fn followed(&self) -> Followed {
        Followed {
            id: self.id,
            pool: Arc::clone(self.name()),
            cell: Arc::clone(&self.pool().cell),
            key: self.settings.weights_key.clone(),
            status: Arc::clone(&self.observed.table),
        }
    }

    /// What is saved of it, if anything is.
    pub(super) fn kept(&self) -> Option<SavedPool> {
        self.observed.saves.as_ref().map(|status| SavedPool {
            pool: Arc::clone(self.name()),
            key: self.settings.weights_key.clone(),
            cell: Arc::clone(&self.pool().cell),
            status: Arc::clone(status),
        })
    }

    /// Saves each new table from now on.
    pub(super) fn save_tables(&mut self, state_dir: &Arc<StateDir>) {
        let Some(kept) = self.kept() else { return };
        let state_dir = Arc::clone(state_dir);
        self.tasks.spawn("save_table", move || state_dir.keeper(kept.clone()).run());
    }

    /// Keeps the addresses of its names up to date, beginning with what is known to `names`.
    pub(super) fn resolve(&mut self, names: Names) {
        let (pool, mut names) = (Arc::clone(self.pool()), Some(names));
        self.tasks.spawn("resolve_names", move || {
            names.take().unwrap_or_else(|| Names::new(Arc::clone(&pool))).run()
        });
    }

    /// Watches the health of its backends, and says what comes of it. `checks` is there where the pool has
    /// health checks.
    pub(super) fn watch_health(&mut self, checks: Option<CheckRunner>) {
        self.spawn("watch_fail_open", fail_open::watch);
        self.spawn("watch_usable", usable::watch);
        self.spawn("slow_start", slow_start::run);
        if let (Some(settings), Some(runner)) = (self.settings.health_check.clone(), checks) {
            self.spawn("health_checks", move |pool| {
                runner.clone().run(Checks::new(pool, settings.clone()).run())
            });
        }
        if let Some(outlier) = self.settings.outlier {
            self.spawn("ejections", move |pool| Ejections::new(pool, outlier).run());
        }
    }

    fn spawn<F>(&mut self, task: &'static str, make: impl Fn(Arc<Pool>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let pool = Arc::clone(self.pool());
        self.tasks.spawn(task, move || make(Arc::clone(&pool)));
    }
}
