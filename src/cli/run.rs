//! `statera run`: the proxy, until a signal ends it.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::config::{Config, Log, LogFormat, LogOutput, Problem, Warnings};
use crate::proxy::{self, Running};
use crate::telemetry::log_sink::LogSink;

/// Between two looks at whether the proxy has ended, once it was told to, and before.
const FAST_LOOK: Duration = Duration::from_millis(20);
const SLOW_LOOK: Duration = Duration::from_secs(1);
/// How long the last log lines may take.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// Runs until TERM or INT. A second one cuts what is left.
pub(super) fn run(config: &Config) -> anyhow::Result<()> {
    let output: Box<dyn Write + Send> = match config.log.output {
        LogOutput::Stdout => Box::new(io::stdout()),
        LogOutput::Stderr => Box::new(io::stderr()),
    };
    let sink = LogSink::start(output).context("cannot start the log's thread")?;
    log_events(&config.log, sink.clone());
    let result = serve(config, sink.clone());
    sink.flush(FLUSH_TIME);
    result
}

fn serve(config: &Config, sink: LogSink) -> anyhow::Result<()> {
    tell_warnings(&config.warnings);
    raise_descriptor_limit();
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot watch for signals")?;
    // Before anything runs: a signal that comes while the proxy starts must not be lost.
    let signals = runtime.block_on(async { Signals::new() }).context("cannot watch for signals")?;
    let running = proxy::start(config, Some(sink))?;
    for (listener, addresses) in &running.addresses {
        info!(listener = %listener, ?addresses, "accepting");
    }
    if let Some(address) = running.admin {
        info!(%address, "admin server");
    }
    runtime.block_on(signals.obey(&running));
    let summary = running.join();
    info!(cut = summary.cut, "stopped");
    anyhow::ensure!(!summary.failed, "a part of the proxy died: the log tells which");
    Ok(())
}

fn tell_warnings(warnings: &Warnings) {
    for Problem { path, line, message } in &warnings.first {
        warn!(%path, line, "config: {message}");
    }
    if warnings.more > 0 {
        warn!("config: {} more warnings: `statera check` lists the first 50", warnings.more);
    }
}

/// A session takes two descriptors, and the usual soft limit of 1,024 is made for programs that use `select`. The hard
/// limit is what the administrator allows.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        warn!(%error, limit = ?limit.current, "cannot raise the limit of descriptors");
    }
}

/// Sends the process's log to `sink`.
fn log_events(log: &Log, sink: LogSink) {
    let builder = tracing_subscriber::fmt().with_max_level(log.level).with_target(false).with_writer(sink);
    // A second subscriber cannot be installed; `run` is called once a process.
    let installed = match log.format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text => builder.try_init(),
    };
    if let Err(error) = installed {
        eprintln!("statera: cannot install the log: {error}");
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    user2: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Returns when the proxy has ended.
    async fn obey(mut self, running: &Running) {
        let mut told = false;
        while !running.has_ended() {
            tokio::select! {
                _ = self.terminate.recv() => stop(running, &mut told),
                _ = self.interrupt.recv() => stop(running, &mut told),
                // Without a handler these two would kill the process.
                _ = self.hang_up.recv() => warn!("reload is not supported yet: restart to read the config again"),
                _ = self.user2.recv() => warn!("handing over to a new binary is not supported yet"),
                // A thread's end wakes nobody.
                () = sleep(if told { FAST_LOOK } else { SLOW_LOOK }) => {}
            }
        }
    }
}

fn stop(running: &Running, told: &mut bool) {
    if std::mem::replace(told, true) {
        warn!("second signal: cutting what is left");
        running.stop_now();
    } else {
        info!("signal: draining");
        running.drain();
    }
}
