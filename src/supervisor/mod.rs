//! The supervisor: owns what runs, by name, and leads the proxy from its start to its end.
//!
//! It compares what runs with what is to run (`reconcile.rs`), prepares the change and applies it (`plan.rs`). A start and a
//! shutdown are such changes. The only place that knows all parts; what they share is listed in ARCHITECTURE.md.
//!
//! - `pool_handle.rs`, `listener_handle.rs`: what runs. `workers.rs`: the threads of the data plane.
//! - `tasks.rs`: spawns the control plane's tasks. `services.rs`: those that belong to no pool.
//! - `first_look.rs`: what a new pool waits for. `phases.rs`: the waits between serving and the end.

mod first_look;
mod listener_handle;
mod phases;
mod plan;
mod pool_handle;
mod reconcile;
mod services;
mod tasks;
mod workers;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tracing::{error, info};

use self::listener_handle::ListenerHandle;
use self::phases::{Stop, Stops};
use self::plan::Plan;
use self::pool_handle::PoolHandle;
use self::reconcile::{Desired, difference};
use self::tasks::{Defect, Defects, Tasks};
use self::workers::Workers;
use crate::admin::AdminBindError;
use crate::balance::lua_pick::{self, LuaPicker, LuaRequests};
use crate::config::Config;
use crate::control::runtime;
use crate::data_plane::worker::Shared;
use crate::drain::{self, DrainControl, Phase};
use crate::health::thread::CheckThread;
use crate::listen::socket::BindError;
use crate::metrics::Observed;
use crate::observe::counters::PerWorker;
use crate::observe::log_sink::LogSink;
use crate::session::Settings;
use crate::state::keeper::StateDir;

/// The proxy cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener's address is taken, forbidden or not ours.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The kernel does not have what `tcp_congestion` asks for.
    #[error("{path}.tcp_congestion: {reason}")]
    Congestion {
        /// The listener or pool: `listeners.web`.
        path: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The admin server's address is.
    #[error(transparent)]
    AdminBind(#[from] AdminBindError),
    /// No thread, no descriptor.
    #[error("the system gives no thread or descriptor: {0}")]
    System(#[from] io::Error),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Sessions that were cut because `shutdown.timeout` passed or a second signal came.
    pub cut: u64,
    /// A part of the proxy died: a defect, told in the log.
    pub failed: bool,
}

impl Summary {
    /// A worker ended, after it cut so many sessions; `None`: it died.
    fn worker_ended(&mut self, cut: Option<u64>) {
        self.failed |= cut.is_none();
        self.cut += cut.unwrap_or(0);
    }
}

/// A proxy that runs. Dropped, it is stopped at once.
#[derive(Debug)]
pub struct Running {
    /// Each listener's name and the addresses that it really has (a port 0 is replaced).
    pub addresses: Vec<(Arc<str>, Vec<SocketAddr>)>,
    /// The admin server's address.
    pub admin: Option<SocketAddr>,
    /// What is counted.
    pub observed: Observed,
    stop: watch::Sender<Stop>,
    control: Option<JoinHandle<Summary>>,
}

/// Starts a proxy: returns when it accepts, at most a little over a second from now, whether Redis answers or not. A
/// `state_dir` that hangs may take two more.
///
/// Session lines go to `log` if `config.log.access` is on; other log lines go to whatever `tracing` subscriber the
/// process has.
///
/// # Errors
/// What was begun has ended, and its addresses can be bound again. Only a thread that waits for a disk or for the system's
/// resolver may be left, for as long as that takes.
pub fn start(config: &Config, log: Option<LogSink>) -> Result<Running, StartError> {
    let sessions = Arc::new(PerWorker::new(config.workers.get()));
    let observed = Observed::new(sessions, config.redis.as_ref().map(|_| Arc::default()), log);
    let (stop, stops) = phases::stops();
    let (tell, has_started) = sync_channel(1);
    let (settings, counted) = (Arc::new(config.clone()), observed.clone());
    let thread = thread::Builder::new()
        .name("statera-control".into())
        .spawn(move || run(settings, counted, &tell, &stops))?;
    let mut running = Running { addresses: Vec::new(), admin: None, observed, stop, control: Some(thread) };
    // Dropped in the case of an error, `running` waits for the thread.
    let started =
        has_started.recv().unwrap_or_else(|_| Err(io::Error::other("the control thread died").into()))?;
    (running.addresses, running.admin) = (started.addresses, started.admin);
    Ok(running)
}

/// What the control thread tells when the proxy accepts.
struct Started {
    addresses: Vec<(Arc<str>, Vec<SocketAddr>)>,
    admin: Option<SocketAddr>,
}

type TellStarted = SyncSender<Result<Started, StartError>>;

/// All of the control thread.
fn run(config: Arc<Config>, observed: Observed, started: &TellStarted, stops: &Stops) -> Summary {
    let runtime = match runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            drop(started.send(Err(error.into())));
            return Summary::default();
        }
    };
    let life = async {
        match Supervisor::new(config, observed) {
            Ok((supervisor, defects)) => supervisor.live(defects, started, stops).await,
            Err(error) => {
                drop(started.send(Err(error.into())));
                Summary::default()
            }
        }
    };
    let summary = runtime.block_on(life);
    // A resolver that hangs in the system's library must not hold back the end.
    runtime.shutdown_background();
    summary
}

/// What runs, and what is needed to change it. The control thread owns it.
struct Supervisor {
    config: Arc<Config>,
    observed: Observed,
    drain: DrainControl,
    /// What all workers share.
    shared: Shared,
    workers: Workers,
    pools: Vec<PoolHandle>,
    listeners: Vec<ListenerHandle>,
    /// Listeners that accept nothing more, and whose sessions may go on.
    closing: Vec<ListenerHandle>,
    /// The tasks that belong to no pool.
    tasks: Tasks,
    defects: Defects,
    /// The address of the admin server, which runs.
    admin: Option<SocketAddr>,
    /// Where a pool has health checks.
    checks: Option<CheckThread>,
    /// Where tables are saved.
    state_dir: Option<Arc<StateDir>>,
    /// Where Redis may be asked to pick.
    picker: Option<LuaPicker>,
    /// The far end of `picker`, until Redis is followed.
    lua_requests: Option<LuaRequests>,
}

impl Supervisor {
    /// With workers, and without pools and listeners.
    fn new(config: Arc<Config>, observed: Observed) -> io::Result<(Self, mpsc::UnboundedReceiver<Defect>)> {
        let (drain, heard) = drain::channel();
        let (defects, reported) = mpsc::unbounded_channel();
        let log = observed.log.clone().filter(|_| config.log.access);
        let shared = Shared {
            access_log: log.map(|sink| (config.log.format, sink)),
            sessions: Arc::clone(&observed.sessions),
            starvation: Arc::default(),
            shortest_limit: shortest_limit(&config),
            drain: heard,
        };
        let lua = (config.redis.is_some() && config.lua_pick.enabled)
            .then(|| lua_pick::channel(config.lua_pick.max_in_flight.get(), config.lua_pick.timeout));
        let (picker, lua_requests) = lua.unzip();
        let saved_in = config.state_dir.as_ref().filter(|_| config.redis.is_some());
        let supervisor = Self {
            workers: Workers::start(config.workers.get(), &shared)?,
            state_dir: saved_in.map(|folder| Arc::new(StateDir::new(folder))),
            pools: Vec::new(),
            listeners: Vec::new(),
            closing: Vec::new(),
            tasks: Tasks::new(None, defects.clone()),
            admin: None,
            checks: None,
            config,
            observed,
            drain,
            shared,
            defects,
            picker,
            lua_requests,
        };
        Ok((supervisor, reported))
    }

    /// The life of the proxy: start, serve, drain, end.
    async fn live(
        mut self,
        mut defects: mpsc::UnboundedReceiver<Defect>,
        started: &TellStarted,
        stops: &Stops,
    ) -> Summary {
        let config = Arc::clone(&self.config);
        let desired = Desired::of(&config);
        let plan = match self.prepare(desired).await {
            Ok(plan) => plan,
            Err(error) => {
                self.end().await;
                // Only now: the caller may try again at once.
                drop(started.send(Err(error)));
                return Summary::default();
            }
        };
        self.apply(plan).await;
        self.drain.advance(Phase::Serving);
        drop(started.send(Ok(self.started())));

        let mut summary = phases::serve(stops, &mut self.workers, &mut defects).await;

        self.drain.advance(Phase::Leaving);
        phases::leave(config.shutdown.delay, stops).await;

        let timeout = config.shutdown.timeout;
        self.drain.advance(Phase::Draining);
        info!(?timeout, "draining: not accepting, sessions may finish");
        self.remove_all_but(desired.without_listeners()).await;
        self.workers.dismiss();
        phases::finish_sessions(timeout, stops, &self.drain, &mut self.workers, &mut summary).await;

        self.end().await;
        summary
    }

    /// Removes what runs and is not desired.
    async fn remove_all_but(&mut self, desired: Desired<'_>) {
        let gone = difference(&self.names(), desired).gone;
        self.apply(Plan::removing(gone)).await;
    }

    /// Ends all that runs, and waits for it.
    async fn end(mut self) {
        self.drain.advance(Phase::Closing);
        // First what publishes tables, so that the newest ones can be saved.
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

impl Running {
    /// Begins the drain: not ready, then not accepting, then sessions have `shutdown.timeout` to finish.
    pub fn drain(&self) {
        self.request(Stop::Drain);
    }

    /// Cuts all sessions and ends.
    pub fn stop_now(&self) {
        self.request(Stop::Now);
    }

    fn request(&self, stop: Stop) {
        self.stop.send_if_modified(|current| {
            let more = stop > *current;
            *current = stop.max(*current);
            more
        });
    }

    /// Blocks until the proxy has ended.
    pub fn join(mut self) -> Summary {
        self.join_control()
    }

    /// True once nothing runs any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.control.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn join_control(&mut self) -> Summary {
        match self.control.take().map(JoinHandle::join) {
            Some(Ok(summary)) => summary,
            Some(Err(_)) => {
                error!("the control thread died");
                Summary { failed: true, ..Summary::default() }
            }
            None => Summary::default(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop_now();
        self.join_control();
    }
}
