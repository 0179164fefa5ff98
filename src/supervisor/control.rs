//! Starts the tasks of the control plane (the admin server, the saved tables, Redis, the names, the backends' health) and the
//! workers, and ends them again where a start fails.
//!
//! What they do is their modules' business; that they run to the end of the proxy is `proxy.rs`'s.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use super::Control;
use crate::admin::{self, AdminState};
use crate::config;
use crate::data_plane::{handover, worker};
use crate::drain::Phase;
use crate::health::active::Checks;
use crate::health::passive::Ejections;
use crate::health::{standing, thread, usable};
use crate::metrics::ObservedPool;
use crate::names::resolve::{self, Names};
use crate::observe::counters::WorkerId;
use crate::redis::{self, Followed, Parts};
use crate::state::Kept;
use crate::state::keeper::StateDir;

/// How long accepting waits for Redis's first answer and for the first names. Clients that connect meanwhile wait in
/// the kernel's queue.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// Unresolved names in one line.
const MOST_NAMED: usize = 10;

/// What a start has begun: the tasks of the control plane, those that save tables, the threads of the data plane.
#[derive(Default)]
pub(super) struct Begun {
    pub(super) tasks: JoinSet<()>,
    pub(super) keepers: JoinSet<()>,
    pub(super) state_dir: Option<StateDir>,
    pub(super) workers: Vec<JoinHandle<()>>,
}

impl Control {
    /// Starts the tasks of the control plane, waits for the first names and for Redis's first answer, and starts the workers.
    /// What was begun is in `begun`, also where the rest fails.
    ///
    /// # Errors
    /// The system gives no thread or no descriptor.
    pub(super) async fn begin(
        &mut self,
        begun: &mut Begun,
        tell: mpsc::UnboundedSender<Option<u64>>,
    ) -> io::Result<()> {
        let tasks = &mut begun.tasks;
        if let Some(socket) = self.admin_socket.take() {
            let token = self.config.admin.as_ref().and_then(|admin| admin.token.clone());
            let state = AdminState::new(self.observed.clone(), self.shared.drain.clone(), token);
            tasks.spawn(admin::serve(TcpListener::from_std(socket)?, Arc::new(state)));
        }
        begun.state_dir = self.keep_tables(&mut begun.keepers).await;
        let (first_try_over, over) = oneshot::channel::<()>();
        self.follow_redis(tasks, first_try_over);
        let mut names: Vec<Names> =
            self.observed.pools().iter().map(|observed| Names::new(Arc::clone(&observed.pool))).collect();
        let mut redis_told = false;
        let first_look = async {
            // At once, so that a Redis that hangs does not use up the time of the configured names. The sender is dropped
            // where there is no Redis: nothing to wait for.
            let redis = async {
                let _ = over.await;
                redis_told = true;
            };
            tokio::join!(redis, resolve::settle(&mut names));
            // Those that came with Redis's answer.
            resolve::settle(&mut names).await;
        };
        if timeout(FIRST_LOOK, first_look).await.is_err() {
            self.warn_of_missing(redis_told);
        }
        for names in names {
            tasks.spawn(names.run());
        }
        self.look_after_health(tasks)?;
        let sharing = handover::between(self.doors.len(), &self.shared.sessions);
        for (id, (doors, (neighbours, inbox))) in self.doors.drain(..).zip(sharing).enumerate() {
            let sharing = worker::Sharing { neighbours, inbox };
            let ended = worker::Ended::new(tell.clone());
            begun.workers.push(worker::spawn(WorkerId(id), doors, sharing, self.shared.clone(), ended)?);
        }
        Ok(())
    }

    /// Ends what a start has begun that failed then, and waits for it: the addresses can be bound again, no thread is left but
    /// those that wait for a disk or a resolver.
    pub(super) async fn give_up(&self, begun: Begun) {
        let Begun { mut tasks, keepers: _keepers, state_dir, workers } = begun;
        self.drain.advance(Phase::Closing);
        tasks.shutdown().await;
        if let Some(state_dir) = state_dir {
            state_dir.finish().await;
        }
        for worker in workers {
            // It ends because the drain is at its end, and has told how.
            let _ = worker.join();
        }
    }

    /// Says what the start did not wait for any longer.
    fn warn_of_missing(&self, redis_told: bool) {
        let mut unresolved = Vec::new();
        for ObservedPool { pool, .. } in self.observed.pools().iter() {
            let snapshot = pool.cell.load();
            let members = snapshot.members().iter().filter(|member| !member.backend.is_reachable());
            unresolved.extend(members.map(|member| member.backend.id().to_string()));
        }
        let (count, redis) = (unresolved.len(), if redis_told { "answered" } else { "no answer yet" });
        unresolved.truncate(MOST_NAMED);
        let named = unresolved.join(", ");
        warn!(
            redis, unresolved = count, names = named, waited = ?FIRST_LOOK,
            "starting without redis's weights, or without the addresses of some names"
        );
    }

    fn look_after_health(&self, tasks: &mut JoinSet<()>) -> io::Result<()> {
        let mut checked = Vec::new();
        for (ObservedPool { pool, .. }, settings) in self.observed.pools().iter().zip(&self.config.pools) {
            tasks.spawn(standing::watch_fail_open(Arc::clone(pool)));
            tasks.spawn(usable::watch(Arc::clone(pool)));
            tasks.spawn(standing::grow(Arc::clone(pool)));
            if let Some(checks) = &settings.health_check {
                checked.push(Checks::new(Arc::clone(pool), checks.clone()));
            }
            if let Some(outlier) = settings.outlier {
                tasks.spawn(Ejections::new(Arc::clone(pool), outlier).run());
            }
        }
        if !checked.is_empty() {
            tasks.spawn(thread::start(checked)?.ended());
        }
        Ok(())
    }

    /// Begins with what was saved. Redis comes after it: its answer is newer.
    async fn keep_tables(&self, keepers: &mut JoinSet<()>) -> Option<StateDir> {
        let (redis, folder) = (self.config.redis.as_ref()?, self.config.state_dir.as_ref()?);
        let pools = self.observed.pools();
        let pools = pools.iter().zip(&self.config.pools);
        let kept = |(ObservedPool { pool, saves, .. }, settings): (&ObservedPool, &config::Pool)| {
            Some(Kept {
                pool: Arc::clone(&pool.name),
                key: settings.weights_key.clone(),
                cell: Arc::clone(&pool.cell),
                status: Arc::clone(saves.as_ref()?),
            })
        };
        let kept: Vec<Kept> = pools.filter_map(kept).collect();
        let state_dir = StateDir::open(folder, redis.on_empty, &kept).await;
        kept.into_iter().for_each(|kept| {
            keepers.spawn(state_dir.keeper(kept).run());
        });
        Some(state_dir)
    }

    fn follow_redis(&mut self, tasks: &mut JoinSet<()>, first_try_over: oneshot::Sender<()>) {
        let (Some(settings), Some(status)) = (self.config.redis.clone(), self.observed.redis.clone()) else {
            return;
        };
        let followed: Arc<[Followed]> = self
            .observed
            .pools()
            .iter()
            .zip(&self.config.pools)
            .zip(&self.ids)
            .map(|((ObservedPool { pool, table, .. }, settings), id)| Followed {
                id: *id,
                pool: Arc::clone(&pool.name),
                cell: Arc::clone(&pool.cell),
                key: settings.weights_key.clone(),
                status: Arc::clone(table),
            })
            .collect();
        let settings = Arc::new(settings);
        let parts = Arc::new(Parts::of(&settings, &followed));
        if let Some(mut requests) = self.lua_requests.take() {
            let (settings, limits, followed) =
                (Arc::clone(&settings), self.config.lua_pick.clone(), Arc::clone(&followed));
            let parts = Arc::clone(&parts);
            tasks.spawn(async move {
                redis::lua_pick::run(&settings, &limits, &followed, &parts, &mut requests).await;
            });
        }
        let (reporting, reported, drain) =
            (Arc::clone(&settings), Arc::clone(&followed), self.shared.drain.clone());
        let reported_to = Arc::clone(&parts);
        tasks.spawn(async move {
            redis::applied::run(&reporting, &reported, &reported_to, drain.started()).await;
        });
        tasks.spawn(async move {
            // Nobody waits any more once the start has gone on without Redis.
            let first_try_over = || first_try_over.send(()).unwrap_or_default();
            redis::watch::run(&settings, &followed, &parts, &status, first_try_over).await;
        });
    }
}
