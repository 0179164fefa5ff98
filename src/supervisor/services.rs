//! Starts the tasks of the control plane that belong to no pool: the admin server, and the tasks with
//! connections to Redis. All pools share these connections.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::{Mutex, oneshot};

use super::tasks::Tasks;
use crate::admin::{self, AdminState};
use crate::balance::pool::lua_pick::LuaRequests;
use crate::config::{LuaPick, Redis};
use crate::drain::Drain;
use crate::observe::tasks::Task;
use crate::redis::status::RedisStatus;
use crate::redis::{self, Followed, Shards};

/// Starts the task that answers on the admin server's socket.
pub(super) fn serve_admin(tasks: &mut Tasks, socket: TcpListener, state: AdminState) {
    let (socket, state) = (Arc::new(socket), Arc::new(state));
    tasks.spawn(Task::Admin, move || admin::serve(Arc::clone(&socket), Arc::clone(&state)));
}

/// What the tasks that follow Redis share.
#[derive(Clone)]
pub(super) struct Following {
    settings: Arc<Redis>,
    status: Arc<RedisStatus>,
    followed: Arc<[Followed]>,
    shards: Arc<Shards>,
    drain: Drain,
}

impl Following {
    /// Prepares to follow the pools in `followed`. Starts no task. Reports end when `drain` begins.
    pub(super) fn new(
        settings: &Redis,
        status: Arc<RedisStatus>,
        followed: Arc<[Followed]>,
        drain: Drain,
    ) -> Self {
        let settings = Arc::new(settings.clone());
        let shards = Arc::new(Shards::of(&settings, &followed));
        Self { settings, status, followed, shards, drain }
    }

    /// Starts the task that reads each table, and reads it again whenever it changes. The returned receiver
    /// completes when the first read of each table has ended.
    pub(super) fn watch(&self, tasks: &mut Tasks) -> oneshot::Receiver<()> {
        let (first_try, is_over) = oneshot::channel();
        let (shared, mut first_try) = (self.clone(), Some(first_try));
        tasks.spawn_fallible(Task::WatchRedis, move || {
            let (shared, first_try) = (shared.clone(), first_try.take());
            async move {
                let Self { settings, status, followed, shards, .. } = &shared;
                // Dropping the sender wakes the receiver.
                redis::watch::run(settings, followed, shards, status, || drop(first_try)).await
            }
        });
        is_over
    }

    /// Starts the task that reports to Redis which tables are applied.
    pub(super) fn report(&self, tasks: &mut Tasks) {
        let shared = self.clone();
        tasks.spawn(Task::ReportApplied, move || {
            let shared = shared.clone();
            async move {
                let Self { settings, followed, shards, drain, .. } = &shared;
                redis::applied::run(settings, followed, shards, drain.started()).await;
            }
        });
    }

    /// Starts the task that lets Redis pick for the sessions that send `requests`.
    pub(super) fn pick(&self, tasks: &mut Tasks, limits: &LuaPick, requests: LuaRequests) {
        // The task locks the requests while it runs. A restarted task goes on with the same requests.
        let requests = Arc::new(Mutex::new(requests));
        let (shared, limits) = (self.clone(), limits.clone());
        tasks.spawn(Task::LuaPick, move || {
            let (shared, limits, requests) = (shared.clone(), limits.clone(), Arc::clone(&requests));
            async move {
                let Self { settings, shards, .. } = &shared;
                let mut requests = requests.lock().await;
                redis::lua_pick::run(settings, &limits, shards, &mut requests).await;
            }
        });
    }
}
