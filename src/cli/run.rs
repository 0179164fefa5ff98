//! `statera run`: runs the proxy until a signal ends it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::Duration;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::time::sleep;
use tracing::{info, warn};

use super::log_format::JsonWithTime;
use super::signals::{LoggedSignals, StopSignals};
use crate::config::{Config, Log, LogFormat, LogOutput, Problem, Warnings};
use crate::control::runtime;
use crate::net::descriptors;
use crate::observe::log_sink::LogSink;
use crate::supervisor::{self, Running};

/// The pauses between two checks whether the proxy has ended: after the first signal, and before it.
const DRAINING_INTERVAL: Duration = Duration::from_millis(20);
const RUNNING_INTERVAL: Duration = Duration::from_secs(1);
/// How long waiting log lines may take to be written at the end, and how long the last lines may take
/// after them.
const FLUSH_TIME: Duration = Duration::from_secs(2);
const LAST_LINES: Duration = Duration::from_secs(1);

/// With fewer descriptors at the start, the limit was set by mistake.
const FEW_DESCRIPTORS: u64 = 64;

/// What is set up before the config is read.
pub(super) struct Prepared {
    runtime: Runtime,
    logged_signals: LoggedSignals,
}

/// Installs the handlers of the [`LoggedSignals`]. Must be called first.
pub(super) fn prepare() -> anyhow::Result<Prepared> {
    let runtime = runtime::new().context("cannot watch for signals")?;
    let logged_signals =
        runtime.block_on(async { LoggedSignals::new() }).context("cannot watch for signals")?;
    Ok(Prepared { runtime, logged_signals })
}

/// Runs until TERM, INT or QUIT has ended the proxy. A second signal closes by force the sessions that are
/// left.
pub(super) fn run(config: &Config, prepared: Prepared) -> anyhow::Result<()> {
    let output = open_output(config.log.output).context("cannot open the log's output")?;
    let sink = LogSink::start(Box::new(output)).context("cannot start the log's thread")?;
    log_events(&config.log, sink.clone());
    let result = serve(config, sink.clone(), prepared);
    let before = sink.dropped();
    let lost = sink.end(LAST_LINES) - before;
    if lost > 0 && takes_bytes(&io::stderr()) {
        super::print_error(&format!("{lost} log lines could not be written before the end"));
    }
    result
}

/// Opens the output of the log without the standard library's buffer. The buffer would keep the rest of a
/// failed write, and report it as written.
fn open_output(output: LogOutput) -> io::Result<File> {
    let descriptor = match output {
        LogOutput::Stdout => io::stdout().as_fd().try_clone_to_owned(),
        LogOutput::Stderr => io::stderr().as_fd().try_clone_to_owned(),
    };
    descriptor.map(File::from)
}

/// True if a short text can be written without waiting.
fn takes_bytes(output: &impl AsFd) -> bool {
    poll(&mut [PollFd::new(output, PollFlags::OUT)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn serve(config: &Config, sink: LogSink, prepared: Prepared) -> anyhow::Result<()> {
    let Prepared { runtime, logged_signals } = prepared;
    log_warnings(&config.warnings);
    raise_descriptor_limit();
    // Handled before the proxy starts: a signal that comes meanwhile must not be lost.
    let stop_signals = runtime.block_on(async { StopSignals::new() }).context("cannot watch for signals")?;
    let running = supervisor::start(config, Some(sink.clone()))?;
    for (listener, addresses) in &running.addresses {
        info!(listener = %listener, ?addresses, "listener accepting connections");
    }
    if let Some(address) = running.admin {
        info!(%address, "admin server listening");
    }
    let left = descriptors::left_for_sessions();
    if left < FEW_DESCRIPTORS {
        warn!(
            left,
            "few descriptors are left for sessions, which take two each: raise `ulimit -n` (LimitNOFILE)"
        );
    }
    runtime.block_on(handle_signals(stop_signals, logged_signals, &running));
    let summary = running.join();
    // The queue must have room for the last line.
    sink.flush(FLUSH_TIME);
    match summary.cut {
        0 => info!(cut = 0, "stopped"),
        1 => info!(cut = 1, "stopped; 1 session was closed by force"),
        cut => info!(cut, "stopped; {cut} sessions were closed by force"),
    }
    anyhow::ensure!(!summary.failed, "a part of the proxy failed: the log names it");
    Ok(())
}

fn log_warnings(warnings: &Warnings) {
    for Problem { path, line, message } in &warnings.first {
        warn!(%path, line, "config: {message}");
    }
    if warnings.more > 0 {
        warn!("config: {} more warnings: `statera check` lists the first 50", warnings.more);
    }
}

/// Raises the limit of descriptors to the hard limit, which the administrator sets. A session takes two
/// descriptors, and the usual soft limit of 1,024 is made for programs that use `select`.
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
    // Only one subscriber can be installed. `run` is called once a process.
    let installed = match log.format {
        LogFormat::Json => builder.json().event_format(JsonWithTime::new()).try_init(),
        LogFormat::Text => builder.try_init(),
    };
    if let Err(error) = installed {
        super::print_error(&format!("cannot install the log: {error}"));
    }
}

/// Handles signals until the proxy has ended.
async fn handle_signals(mut stop_signals: StopSignals, mut logged_signals: LoggedSignals, running: &Running) {
    let mut is_draining = false;
    let mut answering = pin!(logged_signals.answer());
    while !running.has_ended() {
        tokio::select! {
            () = stop_signals.next() => stop(running, &mut is_draining),
            () = &mut answering => {}
            // No task is woken when the proxy's thread ends.
            () = sleep(if is_draining { DRAINING_INTERVAL } else { RUNNING_INTERVAL }) => {}
        }
    }
}

fn stop(running: &Running, is_draining: &mut bool) {
    if std::mem::replace(is_draining, true) {
        warn!("second signal: closing the sessions that are left by force");
        running.stop_now();
    } else {
        info!("signal: draining");
        running.drain();
    }
}
