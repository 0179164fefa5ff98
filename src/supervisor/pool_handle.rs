//! A pool that runs: the pool itself, its counters and statuses, and its tasks, which end with the handle.
//!
//! Sessions refer to the pool, too, and may outlive the handle.

use std::sync::Arc;

use super::tasks::{Supervision, Tasks};
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
use crate::observe::tasks::Task;
use crate::redis::Followed;
use crate::state::SavedPool;
use crate::state::keeper::StateDir;

/// One entry of `pools` that runs.
#[derive(Debug)]
pub(super) struct PoolHandle {
    pub(super) settings: config::Pool,
    /// The pool, the status of its table in Redis and the status of its saved table.
    pub(super) observed: ObservedPool,
    /// Identifies the pool in requests for Lua picks.
    id: PoolId,
    tasks: Tasks,
}

impl PoolHandle {
    /// Makes a pool with its configured backends and without tasks. `picker` asks Redis to pick; `None` if
    /// Lua picks are off.
    pub(super) fn new(
        settings: &config::Pool,
        config: &Config,
        picker: Option<&LuaPicker>,
        supervision: Supervision,
    ) -> Self {
        let id = PoolId::unique();
        let lua = picker.map(|picker| picker.for_pool(id));
        let sync = config.redis.as_ref().map(|redis| Sync { max_stale: redis.max_stale, lua });
        let (name, table) = (Arc::clone(&settings.name), Table::new(settings.backends.clone()));
        let pool = Pool::new(name, settings.policy(), table, sync, config.workers.get());
        let is_saved = config.redis.is_some() && config.state_dir.is_some();
        let observed =
            ObservedPool { pool: Arc::new(pool), table: Arc::default(), saves: is_saved.then(Arc::default) };
        let tasks = Tasks::new(Some(Arc::clone(&settings.name)), supervision);
        Self { settings: settings.clone(), observed, id, tasks }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.settings.name
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.observed.pool
    }

    /// Returns what a task that follows Redis needs to know of the pool.
    pub(super) fn followed(&self) -> Followed {
        Followed {
            id: self.id,
            pool: Arc::clone(self.name()),
            cell: Arc::clone(&self.pool().cell),
            key: self.settings.weights_key.clone(),
            status: Arc::clone(&self.observed.table),
        }
    }

    /// Returns what is saved of the pool; `None` if its tables are not saved.
    pub(super) fn kept(&self) -> Option<SavedPool> {
        self.observed.saves.as_ref().map(|status| SavedPool {
            pool: Arc::clone(self.name()),
            key: self.settings.weights_key.clone(),
            cell: Arc::clone(&self.pool().cell),
            status: Arc::clone(status),
        })
    }

    /// Starts the task that saves each new table. Does nothing if tables are not saved.
    pub(super) fn save_tables(&mut self, state_dir: &Arc<StateDir>) {
        let Some(kept) = self.kept() else { return };
        let (state_dir, mut is_first) = (Arc::clone(state_dir), true);
        self.tasks.spawn(Task::SaveTable, move || {
            let keeper = state_dir.keeper(kept.clone());
            // A table that was published while the task did not run is not saved yet.
            if std::mem::replace(&mut is_first, false) { keeper } else { keeper.behind() }.run()
        });
    }

    /// Starts the task that keeps the addresses of the pool's names up to date. `names` has the results so
    /// far.
    pub(super) fn resolve(&mut self, names: Names) {
        let (pool, mut names) = (Arc::clone(self.pool()), Some(names));
        self.tasks.spawn(Task::ResolveNames, move || {
            names.take().unwrap_or_else(|| Names::new(Arc::clone(&pool))).run()
        });
    }

    /// Starts the tasks that keep the health of the backends up to date and log its effects. `checks` runs
    /// the pool's health checks, if it has any.
    pub(super) fn watch_health(&mut self, checks: &CheckRunner) {
        self.spawn(Task::WatchFailOpen, fail_open::watch);
        self.spawn(Task::WatchUsable, usable::watch);
        self.spawn(Task::SlowStart, slow_start::run);
        if let Some(settings) = self.settings.health_check.clone() {
            let (pool, checks) = (Arc::clone(self.pool()), checks.clone());
            self.tasks.spawn_fallible(Task::HealthChecks, move || {
                checks.clone().run(Checks::new(Arc::clone(&pool), settings.clone()).run())
            });
        }
        if let Some(outlier) = self.settings.outlier {
            self.spawn(Task::Ejections, move |pool| Ejections::new(pool, outlier).run());
        }
    }

    fn spawn<F>(&mut self, task: Task, make: impl Fn(Arc<Pool>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let pool = Arc::clone(self.pool());
        self.tasks.spawn(task, move || make(Arc::clone(&pool)));
    }
}
