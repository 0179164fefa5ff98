//! The supervisor: it owns all running parts of a proxy, and leads them through start, serving, drain and
//! end.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::listener_handle::ListenerHandle;
use super::phases::{self, Stop, Stops};
use super::plan::Plan;
use super::pool_handle::PoolHandle;
use super::reconcile::{Desired, difference};
use super::tasks::{Supervision, Tasks};
use super::workers::Workers;
use super::{Started, Summary, TellStarted};
use crate::balance::pool::lua_pick::{self, LuaPicker, LuaRequests};
use crate::config::Config;
use crate::data_plane::worker::Shared;
use crate::drain::{self, DrainControl, Phase};
use crate::health::thread::CheckThread;
use crate::metrics::Observed;
use crate::session::Settings;
use crate::state::keeper::StateDir;

/// What runs, and what is needed to change it. The control thread owns it.
pub(super) struct Supervisor {
    pub(super) config: Arc<Config>,
    pub(super) observed: Observed,
    pub(super) drain: DrainControl,
    /// What all workers share.
    pub(super) shared: Shared,
    pub(super) workers: Workers,
    pub(super) pools: Vec<PoolHandle>,
    pub(super) listeners: Vec<ListenerHandle>,
    /// Listeners that accept nothing more, and whose sessions may go on.
    pub(super) closing: Vec<ListenerHandle>,
    /// The tasks that belong to no pool.
    pub(super) tasks: Tasks,
    pub(super) supervision: Supervision,
    /// The address of the admin server; `None`: it does not run.
    pub(super) admin: Option<std::net::SocketAddr>,
    /// The thread of the health checks.
    pub(super) checks: CheckThread,
    /// `None`: tables are not saved.
    pub(super) state_dir: Option<Arc<StateDir>>,
    /// `None`: Redis is not asked to pick.
    pub(super) picker: Option<LuaPicker>,
    /// Receives the requests of `picker`. `None` once a task has taken it, or without a `picker`.
    pub(super) lua_requests: Option<LuaRequests>,
}

impl Supervisor {
    /// Starts the workers. There are no pools and no listeners yet. Also returns the receiver of defects.
    pub(super) fn new(config: Arc<Config>, observed: Observed) -> io::Result<Self> {
        let (drain, heard) = drain::channel();
        let supervision = Supervision::new(&observed.restarts, heard.clone());
        let log = observed.log.clone().filter(|_| config.log.access);
        let shared = Shared {
            access_log: log.map(|sink| (config.log.format, sink)),
            sessions: Arc::clone(&observed.sessions),
            starvation: Arc::default(),
            shortest_limit: shortest_limit(&config),
            defects: Arc::clone(&supervision.defects),
            drain: heard,
        };
        let lua = (config.redis.is_some() && config.lua_pick.enabled)
            .then(|| lua_pick::channel(config.lua_pick.max_in_flight.get(), config.lua_pick.timeout));
        let (picker, lua_requests) = lua.unzip();
        let saved_in = config.state_dir.as_ref().filter(|_| config.redis.is_some());
        Ok(Self {
            workers: Workers::start(config.workers.get(), &shared)?,
            state_dir: saved_in.map(|folder| Arc::new(StateDir::new(folder))),
            pools: Vec::new(),
            listeners: Vec::new(),
            closing: Vec::new(),
            tasks: Tasks::new(None, supervision.clone()),
            admin: None,
            checks: CheckThread::new(supervision.watchdog.pulse("statera-checks")),
            config,
            observed,
            drain,
            shared,
            supervision,
            picker,
            lua_requests,
        })
    }

    /// The life of the proxy: start, serve, drain, end.
    pub(super) async fn live(mut self, started: &TellStarted, stops: &Stops) -> Summary {
        self.tasks.spawn_watchdog();
        let config = Arc::clone(&self.config);
        let desired = Desired::of(&config);
        let plan = match self.prepare(desired).await {
            Ok(plan) => plan,
            Err(error) => {
                self.end().await;
                // The error is sent after the end, because the caller may start a proxy again at once.
                drop(started.send(Err(error)));
                return Summary::default();
            }
        };
        self.apply(plan).await;
        self.drain.advance(Phase::Serving);
        drop(started.send(Ok(self.started())));

        self.serve_until(stops.told(Stop::Drain)).await;

        self.drain.advance(Phase::Leaving);
        self.serve_until(phases::leave(config.shutdown.delay, stops)).await;
        // Connections wait at the sockets of a worker that has just died.
        self.workers.replace_dead(&self.listeners).await;

        let timeout = config.shutdown.timeout;
        self.drain.advance(Phase::Draining);
        info!(?timeout, "draining: not accepting, sessions may finish");
        self.remove_all_but(desired.without_listeners()).await;
        self.workers.dismiss();
        let summary = phases::finish_sessions(timeout, stops, &self.drain, &mut self.workers).await;

        self.end().await;
        summary
    }

    /// Replaces each worker that dies, until `end`.
    async fn serve_until(&mut self, end: impl Future<Output = ()>) {
        let mut end = pin!(end);
        loop {
            tokio::select! {
                biased;
                () = &mut end => return,
                dead = self.workers.next_to_replace() => self.workers.replace(dead, &self.listeners).await,
            }
        }
    }

    /// Removes what runs and is not desired.
    async fn remove_all_but(&mut self, desired: Desired<'_>) {
        let gone = difference(&self.names(), desired).gone;
        self.apply(Plan::removing(gone)).await;
    }

    /// Ends all that runs, and waits for it.
    async fn end(mut self) {
        self.drain.advance(Phase::Closing);
        // First the tasks that publish tables end, so that the newest tables can be saved.
        self.tasks.end().await;
        if let Some(state_dir) = &self.state_dir {
            state_dir.finish().await;
        }
        self.remove_all_but(Desired::nothing()).await;
        self.workers.join();
    }

    fn started(&self) -> Started {
        let addresses = self.listeners.iter().map(|l| (Arc::clone(l.name()), l.addresses.clone()));
        Started { addresses: addresses.collect(), admin: self.admin }
    }
}

/// The shortest silence that any session is allowed: how exact the workers' clocks must be.
fn shortest_limit(config: &Config) -> Duration {
    let has_listener = |name: &str| config.listeners.iter().any(|listener| &*listener.pool == name);
    let pools = config.pools.iter().filter(|pool| has_listener(&pool.name));
    let limits = pools.map(|pool| Settings::from(pool).limits);
    let shortest = limits
        .map(|limits| limits.half_closed.min(limits.peer_timeout).min(limits.idle.unwrap_or(Duration::MAX)));
    shortest.min().unwrap_or(Duration::MAX)
}
