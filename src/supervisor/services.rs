//! Starts the tasks of the control plane that belong to no pool: the admin server, and those that have
//! connections to Redis, which all pools share.

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

/// Answers on the admin server's socket.
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
    /// Follows `followed`, and reports until `drain` begins.
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

    /// Reads the tables, again whenever they change. The receiver hears when the first read of each has
    /// ended.
    pub(super) fn watch(&self, tasks: &mut Tasks) -> oneshot::Receiver<()> {
        let (first_try, is_over) = oneshot::channel();
        let (shared, mut first_try) = (self.clone(), Some(first_try));
        tasks.spawn_fallible(Task::WatchRedis, move || {
            let (shared, first_try) = (shared.clone(), first_try.take());
            async move {
                let Self { settings, status, followed, shards, .. } = &shared;
                // The receiver hears that the sender is dropped.
                redis::watch::run(settings, followed, shards, status, || drop(first_try)).await
            }
        });
        is_over
    }

    /// Reports to Redis which tables are applied.
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

    /// Lets Redis pick for sessions that ask by `requests`.
    pub(super) fn pick(&self, tasks: &mut Tasks, limits: &LuaPick, requests: LuaRequests) {
        // Held by the one task that runs. If it is made anew, it goes on with the same requests.
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
