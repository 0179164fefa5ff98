//! A pool that runs: the pool itself, what is counted of it, and its tasks, which end with the handle.
//!
//! Sessions hold the pool, too, and may outlive the handle.

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
        let (state_dir, mut is_first) = (Arc::clone(state_dir), true);
        self.tasks.spawn(Task::SaveTable, move || {
            let keeper = state_dir.keeper(kept.clone());
            // A table that was published while the task did not run is not saved yet.
            if std::mem::replace(&mut is_first, false) { keeper } else { keeper.behind() }.run()
        });
    }

    /// Keeps the addresses of its names up to date, beginning with what is known to `names`.
    pub(super) fn resolve(&mut self, names: Names) {
        let (pool, mut names) = (Arc::clone(self.pool()), Some(names));
        self.tasks.spawn(Task::ResolveNames, move || {
            names.take().unwrap_or_else(|| Names::new(Arc::clone(&pool))).run()
        });
    }

    /// Watches the health of its backends, and says what comes of it. `checks` runs health checks, where the
    /// pool has some.
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
