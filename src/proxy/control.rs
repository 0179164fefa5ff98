//! Starts the tasks of the control plane: the admin server, the saved tables, Redis, the names, the
//! backends' health.
//!
//! What they do is their modules' business; that they run to the end of the proxy is `proxy.rs`'s.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use super::Control;
use crate::health::active::Checks;
use crate::health::passive::Ejections;
use crate::health::{standing, thread};
use crate::redis::{self, Followed, Parts};
use crate::runtime::resolve::{self, Names};
use crate::state::{Kept, keeper};
use crate::telemetry::admin::{self, AdminState};

/// How long accepting waits for Redis's first answer and for the first names. Clients that connect meanwhile wait in
/// the kernel's queue.
const FIRST_LOOK: Duration = Duration::from_secs(1);

impl Control {
    /// Starts the tasks of the control plane, and waits for the first names and for Redis's first answer.
    pub(super) async fn begin(&mut self, tasks: &mut JoinSet<()>) -> keeper::Keepers {
        if let Some(socket) = self.admin_socket.take() {
            let token = self.config.admin.as_ref().and_then(|admin| admin.token.clone());
            let state =
                AdminState { observed: self.observed.clone(), drain: self.shared.drain.clone(), token };
            tasks.spawn(admin::serve(socket, Arc::new(state)));
        }
        let keepers = self.keep_tables().await;
        let (first_try_over, over) = oneshot::channel::<()>();
        self.follow_redis(tasks, first_try_over);
        let mut names: Vec<Names> = self.observed.pools.iter().cloned().map(Names::new).collect();
        let first_look = async {
            // At once, so that a Redis that hangs does not use up the time of the configured names. The sender is dropped
            // where there is no Redis: nothing to wait for.
            let _ = tokio::join!(over, resolve::settle(&mut names));
            // Those that came with Redis's answer.
            resolve::settle(&mut names).await;
        };
        if timeout(FIRST_LOOK, first_look).await.is_err() {
            warn!("redis has not told its weights yet, or a name is not resolved yet: starting without");
        }
        for names in names {
            tasks.spawn(names.run());
        }
        self.look_after_health(tasks);
        keepers
    }

    fn look_after_health(&self, tasks: &mut JoinSet<()>) {
        let mut checked = Vec::new();
        for (pool, settings) in self.observed.pools.iter().zip(&self.config.pools) {
            tasks.spawn(standing::watch_fail_open(Arc::clone(pool)));
            tasks.spawn(standing::grow(Arc::clone(pool)));
            if let Some(checks) = &settings.health_check {
                checked.push(Checks::new(Arc::clone(pool), checks.clone()));
            }
            if let Some(outlier) = settings.outlier {
                tasks.spawn(Ejections::new(Arc::clone(pool), outlier).run());
            }
        }
        if !checked.is_empty() {
            tasks.spawn(thread::run(checked));
        }
    }

    /// Begins with what was saved. Redis comes after it: its answer is newer.
    async fn keep_tables(&self) -> keeper::Keepers {
        let (Some(redis), Some(folder), Some(saves)) =
            (&self.config.redis, &self.config.state_dir, &self.observed.saves)
        else {
            return keeper::Keepers::default();
        };
        let pools = self.observed.pools.iter().zip(&self.config.pools);
        let kept = pools.map(|(pool, settings)| Kept {
            pool: Arc::clone(&pool.name),
            key: settings.weights_key.clone(),
            cell: Arc::clone(&pool.cell),
        });
        keeper::open(folder, redis.on_empty, kept.collect(), saves).await
    }

    fn follow_redis(&mut self, tasks: &mut JoinSet<()>, first_try_over: oneshot::Sender<()>) {
        let (Some(settings), Some(status)) = (self.config.redis.clone(), self.observed.redis.clone()) else {
            return;
        };
        let followed: Arc<[Followed]> = self
            .observed
            .pools
            .iter()
            .zip(&self.config.pools)
            .map(|(pool, settings)| Followed {
                pool: Arc::clone(&pool.name),
                cell: Arc::clone(&pool.cell),
                key: settings.weights_key.clone(),
            })
            .collect();
        let settings = Arc::new(settings);
        let parts = Arc::new(Parts::of(&settings, &followed));
        if let Some(requests) = self.lua_requests.take() {
            let (settings, limits, followed) =
                (Arc::clone(&settings), self.config.lua_pick.clone(), Arc::clone(&followed));
            let parts = Arc::clone(&parts);
            tasks.spawn(async move {
                redis::lua_pick::run(&settings, &limits, &followed, &parts, requests).await;
            });
        }
        let (reporting, reported, drain) =
            (Arc::clone(&settings), Arc::clone(&followed), self.shared.drain.clone());
        let reported_to = Arc::clone(&parts);
        tasks.spawn(async move {
            redis::applied::run(&reporting, &reported, &reported_to, drain.started()).await;
        });
        let tables = Arc::clone(&self.observed.tables);
        tasks.spawn(async move {
            // Nobody waits any more once the start has gone on without Redis.
            let first_try_over = || first_try_over.send(()).unwrap_or_default();
            redis::watch::run(&settings, &followed, &parts, &status, &tables, first_try_over).await;
        });
    }
}
