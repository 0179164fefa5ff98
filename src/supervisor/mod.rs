//! The composition root: makes the parts, hands each its end of what they share, starts the two planes and ends them.
//!
//! The only place that knows all parts; `control.rs` below it starts those of the control plane. What they share is
//! listed in ARCHITECTURE.md: the snapshot cells, the Lua-pick channel, the drain and the counters.

mod control;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{error, info};

use self::control::Begun;
use crate::admin::{self, AdminBindError};
use crate::balance::Table;
use crate::balance::lua_pick::{self as picking, LuaRequests, PoolId};
use crate::balance::pool::{Pool, Sync};
use crate::config::{Config, Shutdown};
use crate::control::runtime;
use crate::data_plane::worker::{BoundListener, Shared};
use crate::drain::{self, DrainControl, Phase};
use crate::listen::socket::{self, BindError, Options};
use crate::metrics::{Observed, ObservedPool};
use crate::net::descriptors;
use crate::observe::counters::PerWorker;
use crate::observe::log_sink::LogSink;
use crate::session::{Listener, Settings};

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

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    NotYet,
    Drain,
    Now,
}

/// A proxy that runs. Dropped, it is stopped at once.
#[derive(Debug)]
pub struct Running {
    /// Each listener's name and the addresses it really has (a port 0 is replaced).
    pub addresses: Vec<(Arc<str>, Vec<SocketAddr>)>,
    /// The admin server's.
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
    check_congestion(config)?;
    let (drain_control, drain) = drain::channel();
    let workers = config.workers.get();
    let (picker, lua_requests) = match (&config.redis, config.lua_pick.enabled) {
        (Some(_), true) => {
            let (picker, requests) =
                picking::channel(config.lua_pick.max_in_flight.get(), config.lua_pick.timeout);
            (Some(picker), Some(requests))
        }
        _ => (None, None),
    };
    let ids: Vec<PoolId> = config.pools.iter().map(|_| PoolId::unique()).collect();
    let make_pool = |(id, pool): (&PoolId, &crate::config::Pool)| {
        let lua = picker.as_ref().map(|picker| picker.for_pool(*id));
        let sync = config.redis.as_ref().map(|redis| Sync { max_stale: redis.max_stale, lua });
        let table = Table::new(pool.backends.clone());
        Arc::new(Pool::new(Arc::clone(&pool.name), pool.policy(), table, sync, workers))
    };
    let pools: Vec<Arc<Pool>> = ids.iter().zip(&config.pools).map(make_pool).collect();

    let mut doors: Vec<Vec<BoundListener>> = (0..workers).map(|_| Vec::new()).collect();
    let mut addresses = Vec::new();
    let mut listeners = Vec::new();
    for listener in &config.listeners {
        let (pool, settings) = config
            .pools
            .iter()
            .zip(&pools)
            .find(|(settings, _)| settings.name == listener.pool)
            .map(|(settings, pool)| (Arc::clone(pool), settings))
            .expect("the config was checked: every listener's pool exists");
        let shared =
            Arc::new(Listener { name: Arc::clone(&listener.name), counters: PerWorker::new(workers) });
        let options = Options { keepalive: settings.keepalive, congestion: listener.tcp_congestion.clone() };
        let mut bound = Vec::new();
        for address in &listener.bind {
            let sockets = socket::bind(&listener.name, *address, &options, workers)?;
            bound.extend(sockets.first().map(TcpListener::local_addr).transpose()?);
            for (doors, socket) in doors.iter_mut().zip(sockets) {
                let (listener, pool) = (Arc::clone(&shared), Arc::clone(&pool));
                doors.push(BoundListener { socket, listener, pool, settings: Settings::from(settings) });
            }
        }
        addresses.push((Arc::clone(&listener.name), bound));
        listeners.push(shared);
    }
    let admin_socket = config.admin.as_ref().map(admin::bind).transpose()?;
    let admin_address = admin_socket.as_ref().map(TcpListener::local_addr).transpose()?;

    let sessions = Arc::new(PerWorker::new(workers));
    let redis = config.redis.as_ref().map(|_| Arc::default());
    let saves = || config.redis.as_ref().and(config.state_dir.as_ref()).map(|_| Arc::default());
    let observed = Observed::new(Arc::clone(&sessions), redis, log.clone());
    observed.show(
        listeners,
        pools.into_iter().map(|pool| ObservedPool { pool, table: Arc::default(), saves: saves() }),
    );
    descriptors::keep_reserve(doors.iter().map(Vec::len).sum());
    let access_log = log.filter(|_| config.log.access).map(|sink| (config.log.format, sink));
    let control = Control {
        config: config.clone(),
        ids,
        observed: observed.clone(),
        admin_socket,
        lua_requests,
        doors,
        shared: Shared { access_log, sessions, starvation: Arc::default(), drain },
        drain: drain_control,
    };
    let (stop, stops) = watch::channel(Stop::NotYet);
    let (started, has_started) = sync_channel(1);
    let thread =
        thread::Builder::new().name("statera-control".into()).spawn(move || control.run(started, stops))?;
    let running = Running { addresses, admin: admin_address, observed, stop, control: Some(thread) };
    has_started.recv().unwrap_or_else(|_| Err(io::Error::other("the control thread died")))?;
    Ok(running)
}

/// Before anything listens: a session could do nothing about it.
fn check_congestion(config: &Config) -> Result<(), StartError> {
    let listeners = config.listeners.iter().map(|l| ("listeners", &l.name, &l.tcp_congestion));
    let pools = config.pools.iter().map(|p| ("pools", &p.name, &p.tcp_congestion));
    for (section, name, congestion) in listeners.chain(pools) {
        if let Some(congestion) = congestion {
            socket::check_congestion(congestion)
                .map_err(|reason| StartError::Congestion { path: format!("{section}.{name}"), reason })?;
        }
    }
    Ok(())
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

/// All that the control thread owns.
struct Control {
    config: Config,
    ids: Vec<PoolId>,
    observed: Observed,
    admin_socket: Option<TcpListener>,
    lua_requests: Option<LuaRequests>,
    doors: Vec<Vec<BoundListener>>,
    shared: Shared,
    drain: DrainControl,
}

impl Control {
    fn run(self, started: SyncSender<io::Result<()>>, stops: watch::Receiver<Stop>) -> Summary {
        let runtime = match runtime::new() {
            Ok(runtime) => runtime,
            Err(error) => {
                drop(started.send(Err(error)));
                return Summary::default();
            }
        };
        let summary = runtime.block_on(self.serve(started, stops));
        // A resolver that hangs in the system's library must not hold back the end.
        runtime.shutdown_background();
        summary
    }

    async fn serve(
        mut self,
        started: SyncSender<io::Result<()>>,
        mut stops: watch::Receiver<Stop>,
    ) -> Summary {
        let mut begun = Begun::default();
        let (tell, ends) = mpsc::unbounded_channel();
        if let Err(error) = self.begin(&mut begun, tell).await {
            self.give_up(begun).await;
            // Only now: the caller may try again at once.
            drop(started.send(Err(error)));
            return Summary::default();
        }
        let Begun { tasks, mut keepers, state_dir, workers } = begun;
        self.drain.advance(Phase::Serving);
        drop(started.send(Ok(())));
        let summary = end(&self.drain, self.config.shutdown, tasks, &mut keepers, ends, &mut stops).await;
        if let Some(state_dir) = state_dir {
            state_dir.finish().await;
        }
        for worker in workers {
            // It has said that it ends, and how.
            let _ = worker.join();
        }
        summary
    }
}

/// Waits until the proxy is told to stop, or until a part of it dies, and leads it through the phases.
async fn end(
    drain: &DrainControl,
    shutdown: Shutdown,
    mut tasks: JoinSet<()>,
    keepers: &mut JoinSet<()>,
    mut ends: mpsc::UnboundedReceiver<Option<u64>>,
    stops: &mut watch::Receiver<Stop>,
) -> Summary {
    let mut summary = Summary::default();
    let now = stops.clone();
    // A future for each wait: one that has ended must not be asked again.
    let told_now = || {
        let mut now = now.clone();
        async move {
            // The sender's end is the end of everything.
            let _ = now.wait_for(|stop| *stop == Stop::Now).await;
        }
    };

    tokio::select! {
        _ = stops.wait_for(|stop| *stop >= Stop::Drain) => {}
        // Neither ends by itself. What is left serves its sessions to the end, but nobody may take it for whole.
        cut = ends.recv() => {
            error!("a worker died: draining");
            summary = Summary { cut: cut.flatten().unwrap_or(0), failed: true };
        }
        Some(ended) = tasks.join_next() => {
            error!(?ended, "a task of the control plane died: draining");
            summary.failed = true;
        }
        Some(ended) = keepers.join_next() => {
            error!(?ended, "saving tables has died");
            summary.failed = true;
        }
    }
    drain.advance(Phase::Leaving);
    if !shutdown.delay.is_zero() {
        info!(delay = ?shutdown.delay, "leaving: not ready, still accepting");
        tokio::select! {
            () = sleep(shutdown.delay) => {}
            () = told_now() => {}
        }
    }
    drain.advance(Phase::Draining);
    info!(timeout = ?shutdown.timeout, "draining: not accepting, sessions may finish");
    let mut finished = std::pin::pin!(async {
        // Ends when the last worker has dropped its end of the channel.
        while let Some(cut) = ends.recv().await {
            summary.failed |= cut.is_none();
            summary.cut += cut.unwrap_or(0);
        }
        summary
    });
    tokio::select! {
        biased;
        summary = &mut finished => return summary,
        () = sleep(shutdown.timeout) => {}
        () = told_now() => {}
    }
    drain.advance(Phase::Closing);
    finished.await
}
