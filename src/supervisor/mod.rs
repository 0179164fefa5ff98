//! The supervisor: owns what runs, by name, and leads the proxy from its start to its end.
//!
//! It compares what runs with what is to run (`reconcile.rs`), prepares the change and applies it
//! (`plan.rs`). A start and a shutdown are such changes. This folder may use all others except `cli`.
//!
//! - `life.rs`: start, serve, drain, end, on one screen. `phases.rs`: the waits between them.
//! - `pool_handle.rs`, `listener_handle.rs`: what runs. `workers.rs`: the threads of the data plane.
//! - `tasks.rs`: spawns the control plane's tasks and restarts a task that ends. `services.rs`: the tasks
//!   that belong to no pool.
//! - `first_look.rs`: what a new pool waits for before sessions begin.

mod first_look;
mod life;
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

use tokio::sync::watch;
use tracing::error;

use self::life::Supervisor;
use self::phases::{Stop, Stops};
use crate::admin::AdminBindError;
use crate::config::Config;
use crate::control::runtime;
use crate::listen::socket::BindError;
use crate::metrics::Observed;
use crate::observe::counters::PerWorker;
use crate::observe::log_sink::LogSink;

/// Why the proxy cannot start.
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
    /// The admin server's address is taken, forbidden or not ours.
    #[error(transparent)]
    AdminBind(#[from] AdminBindError),
    /// The system gives no thread or no descriptor.
    #[error("the system gives no thread or descriptor: {0}")]
    System(#[from] io::Error),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Sessions that were cut because `shutdown.timeout` passed or a second signal came.
    pub cut: u64,
    /// A part of the proxy died, which is a defect. The log says which.
    pub failed: bool,
}

impl Summary {
    /// Counts the end of a worker that cut `cut` sessions. `None` if the worker died.
    fn worker_ended(&mut self, cut: Option<u64>) {
        self.failed |= cut.is_none();
        self.cut += cut.unwrap_or(0);
    }
}

/// A proxy that runs. Dropping it stops the proxy at once and waits for its end.
#[derive(Debug)]
pub struct Running {
    /// Each listener's name and bound addresses. A port 0 is replaced by the port that the kernel chose.
    pub addresses: Vec<(Arc<str>, Vec<SocketAddr>)>,
    /// The admin server's address.
    pub admin: Option<SocketAddr>,
    /// All counters and statuses.
    pub observed: Observed,
    stop: watch::Sender<Stop>,
    control: Option<JoinHandle<Summary>>,
}

/// Starts a proxy: returns when it accepts, at most a little over a second from now, whether Redis answers
/// or not. A `state_dir` that hangs may take two more.
///
/// Session lines go to `log` if `config.log.access` is on; other log lines go to whatever `tracing`
/// subscriber the process has.
///
/// # Errors
/// What was begun has ended, and its addresses can be bound again. Only a thread that waits for a disk or
/// for the system's resolver may be left, for as long as that takes.
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
    // After an error `running` is dropped, which waits for the thread.
    let started =
        has_started.recv().unwrap_or_else(|_| Err(io::Error::other("the control thread died").into()))?;
    (running.addresses, running.admin) = (started.addresses, started.admin);
    Ok(running)
}

/// What the control thread reports once the proxy accepts.
struct Started {
    addresses: Vec<(Arc<str>, Vec<SocketAddr>)>,
    admin: Option<SocketAddr>,
}

type TellStarted = SyncSender<Result<Started, StartError>>;

/// What the control thread does, from its first line to its last.
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
            Ok(supervisor) => supervisor.live(started, stops).await,
            Err(error) => {
                drop(started.send(Err(error.into())));
                Summary::default()
            }
        }
    };
    let summary = runtime.block_on(life);
    // Returns at once. Work that blocks runs on threads that are not the runtime's (`control/blocking.rs`).
    runtime.shutdown_background();
    summary
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

    /// True once the control thread has ended, which is the last thing that runs.
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
