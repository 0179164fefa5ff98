//! What is measured: each cell of the benchmark, and how one sample of it is taken from one peer.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::backend::Backend;
use super::flood::beside_a_flood;
use super::load::{Connections, Direction, SMALL_BYTES, sessions};
use super::machine::Disturbance;
use super::meter::{Meter, Window};
use super::peers::{Kind, Peer, Program, on_path};

const LARGE_BYTES: usize = 16 * 1024;
/// An answer that fills buffers, and is no bulk yet.
const BURST_BYTES: usize = 64 * 1024;
/// More than the sockets on the path hold: a proxy has to wait for both sides of every session at once.
const BULK_BYTES: usize = 1024 * 1024;
/// Allocators and kernels settle after a burst.
const SETTLE: Duration = Duration::from_millis(300);
const IDLE_LIMIT: Duration = Duration::from_secs(3);
/// A tenth of what a proxy can do without a flood beside them.
const SESSIONS_BESIDE_FLOOD: u32 = 1_000;
const TRACED_SESSIONS: u64 = 640;
const TRACED_REQUESTS: u64 = 500;
/// Many sessions share a wake-up, as they do under load; the requests follow each other, or a tracer that
/// slows the proxy down would make them share more of them.
const TRACED_AT_ONCE: usize = 64;
/// A tracer makes each of them slow.
const TRACED_ONE_BY_ONE: u64 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    Sessions { at_once: usize },
    PingPong { bytes: usize, connections: usize },
    Bulk { direction: Direction, connections: usize },
    Latency { rate: u32, connections: usize },
    Flood { rate: u32 },
    Memory { sessions: usize },
    SystemCalls,
}

impl Measure {
    /// All of them, or those of the quick run.
    pub fn all(quick: bool, rate: u32, idle_sessions: usize) -> Vec<Self> {
        let mut all = Vec::new();
        let counts = |few: &[usize], many: &[usize]| if quick { few.to_vec() } else { many.to_vec() };
        all.extend(counts(&[1, 64], &[1, 64, 512]).into_iter().map(|at_once| Self::Sessions { at_once }));
        for (bytes, few) in [(SMALL_BYTES, &[1, 64][..]), (LARGE_BYTES, &[64])] {
            let connections = counts(few, &[1, 64, 512]).into_iter();
            all.extend(connections.map(|connections| Self::PingPong { bytes, connections }));
        }
        all.push(Self::PingPong { bytes: BURST_BYTES, connections: 64 });
        for (direction, few) in
            [(Direction::ToClient, &[1, 8][..]), (Direction::ToBackend, &[8]), (Direction::Both, &[8])]
        {
            let connections = counts(few, &[1, 8, 64]).into_iter();
            all.extend(connections.map(|connections| Self::Bulk { direction, connections }));
        }
        all.push(Self::Latency { rate, connections: 64 });
        all.push(Self::Flood { rate: SESSIONS_BESIDE_FLOOD });
        let sessions = if quick { 2_000 } else { 5_000 };
        all.push(Self::Memory { sessions: sessions.min(idle_sessions) });
        all.push(Self::SystemCalls);
        all
    }

    /// For `--only`: the word that starts its name.
    pub fn group(self) -> &'static str {
        match self {
            Self::Sessions { .. } => "sessions",
            Self::PingPong { .. } => "ping-pong",
            Self::Bulk { .. } => "bulk",
            Self::Latency { .. } => "latency",
            Self::Flood { .. } => "flood",
            Self::Memory { .. } => "memory",
            Self::SystemCalls => "syscalls",
        }
    }

    /// Unique, and what the report calls it.
    pub fn name(self) -> String {
        match self {
            Self::Sessions { at_once } => format!("sessions, {at_once} at a time"),
            Self::PingPong { bytes, connections } => {
                let size = if bytes < 1024 { format!("{bytes} B") } else { format!("{} KiB", bytes / 1024) };
                format!("ping-pong of {size}, {}", counted(connections))
            }
            Self::Bulk { direction, connections } => {
                let direction = match direction {
                    Direction::ToClient => "down",
                    Direction::ToBackend => "up",
                    Direction::Both => "both directions",
                };
                format!("bulk {direction}, {}", counted(connections))
            }
            Self::Latency { rate, connections } => {
                format!("latency at {rate} requests/s, {}", counted(connections))
            }
            Self::Flood { rate } => format!("flood of resets beside {rate} sessions/s"),
            Self::Memory { sessions } => format!("memory, {sessions} sessions"),
            Self::SystemCalls => "syscalls".into(),
        }
    }

    /// How long a sample takes, for the announcement.
    pub fn expected(self, length: Duration) -> Duration {
        match self {
            Self::Memory { sessions } => {
                // 0.5 GB a second there and back, and what surrounds it.
                Duration::from_secs_f64((sessions * BULK_BYTES) as f64 / 0.5e9 + 2.5)
            }
            Self::SystemCalls => Duration::from_secs(4),
            _ => length + (length / 10).max(Duration::from_millis(100)) + Duration::from_millis(60),
        }
    }

    /// How many of `rounds` it takes part in. The quick run takes slow figures that hardly vary but once.
    pub fn rounds(self, rounds: u32, quick: bool) -> u32 {
        if quick && matches!(self, Self::Memory { .. } | Self::SystemCalls) { 1 } else { rounds }
    }

    /// Whether it says anything of this peer.
    pub fn applies_to(self, kind: Kind) -> bool {
        match kind {
            Kind::Direct => !matches!(self, Self::Flood { .. } | Self::Memory { .. } | Self::SystemCalls),
            // Short sessions and small requests are done before congestion control matters.
            Kind::StateraCubic | Kind::HaproxyPipes => matches!(self, Self::Bulk { .. }),
            _ => true,
        }
    }
}

fn counted(connections: usize) -> String {
    format!("{connections} connection{}", if connections == 1 { "" } else { "s" })
}

/// One kind of figure within a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    pub name: &'static str,
    pub more_is_better: bool,
}

const fn more(name: &'static str) -> Metric {
    Metric { name, more_is_better: true }
}

const fn less(name: &'static str) -> Metric {
    Metric { name, more_is_better: false }
}

/// One cell of one round of one peer.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    pub figures: Vec<(Metric, f64)>,
    /// Where the figures are sums: of what. Only system calls have it.
    pub parts: Vec<(String, f64)>,
    pub disturbance: Disturbance,
}

/// Takes one sample.
pub fn take(
    measure: Measure,
    program: &Program,
    peer: &Peer,
    backend: &Backend,
    length: Duration,
) -> Result<Sample> {
    let mut meter = Meter::timed(&peer.processes, length);
    let open = |count: usize| Connections::open(peer.address, count, backend);
    let sample = match measure {
        Measure::Sessions { at_once } => {
            sessions(peer.address, at_once, &mut meter)?;
            let window = meter.window()?;
            shared(rated(peer, window, more("sessions/s"), 1.0, less("CPU µs/session"), 1e6), window)
        }
        Measure::PingPong { bytes, connections } => {
            let mut connections = open(connections)?;
            connections.ping_pong(bytes, &mut meter)?;
            connections.cut();
            rated(peer, meter.window()?, more("requests/s"), 1.0, less("CPU µs/request"), 1e6)
        }
        Measure::Bulk { direction, connections } => {
            let mut connections = open(connections)?;
            connections.bulk(direction, backend, &mut meter)?;
            connections.cut();
            let window = meter.window()?;
            shared(rated(peer, window, more("GB/s"), 1e-9, less("CPU s/GB"), 1e9), window)
        }
        Measure::Latency { rate, connections } => {
            let mut connections = open(connections)?;
            let latencies = connections.open_loop(rate, &mut meter)?;
            connections.cut();
            open_loop(peer, meter.window()?, latencies)?
        }
        Measure::Flood { rate } => flood(peer, backend, rate, &mut meter)?,
        Measure::Memory { sessions } => memory(program, backend, sessions)?,
        Measure::SystemCalls => system_calls(peer, backend)?,
    };
    backend.wait_until_idle(IDLE_LIMIT);
    Ok(sample)
}

fn rated(peer: &Peer, window: Window, rate: Metric, rate_scale: f64, cpu: Metric, cpu_scale: f64) -> Sample {
    let mut figures = vec![(rate, window.per_second() * rate_scale)];
    if peer.kind != Kind::Direct {
        figures.push((cpu, window.cpu_per_unit() * cpu_scale));
    }
    Sample { figures, disturbance: window.disturbance, ..Sample::default() }
}

/// The CPU figures, and how evenly the workers shared the work.
fn shared(mut sample: Sample, window: Window) -> Sample {
    // Without a CPU figure there is no proxy.
    if let (true, Some(busiest)) = (sample.figures.len() > 1, window.busiest_worker) {
        sample.figures.push((less("busiest worker"), busiest));
    }
    sample
}

fn open_loop(peer: &Peer, window: Window, mut latencies: Vec<Duration>) -> Result<Sample> {
    ensure!(!latencies.is_empty(), "no request was answered");
    latencies.sort_unstable();
    let at = |share| quantile(&latencies, share).as_secs_f64() * 1e6;
    let mut figures =
        vec![(less("p50 µs"), at(0.5)), (less("p99 µs"), at(0.99)), (less("p99.9 µs"), at(0.999))];
    if peer.kind != Kind::Direct {
        figures.push((less("CPU µs/request"), window.cpu_per_unit() * 1e6));
    }
    Ok(Sample { figures, disturbance: window.disturbance, ..Sample::default() })
}

/// The quantile of sorted values; they are not empty.
fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len()) - 1;
    sorted[index]
}

/// Connections that the backend got beyond those of the sessions are the flood's.
fn flood(peer: &Peer, backend: &Backend, rate: u32, meter: &mut Meter) -> Result<Sample> {
    let before = backend.accepted();
    let mut flooded = beside_a_flood(peer.address, rate, meter)?;
    backend.wait_until_idle(IDLE_LIMIT);
    let reached = (backend.accepted() - before).saturating_sub(flooded.all_sessions);
    ensure!(!flooded.latencies.is_empty(), "no session was served");
    flooded.latencies.sort_unstable();
    let at = |share| quantile(&flooded.latencies, share).as_secs_f64() * 1e3;
    let window = meter.window()?;
    let mut figures = vec![
        (less("p50 ms"), at(0.5)),
        (less("p99 ms"), at(0.99)),
        (less("lost, %"), 100.0 * flooded.lost as f64 / flooded.all_sessions.max(1) as f64),
        (more("sessions/s"), flooded.sessions as f64 / window.wall.as_secs_f64()),
        (more("resets/s"), flooded.clients as f64 / window.wall.as_secs_f64()),
        (less("reached the backend, %"), 100.0 * reached as f64 / flooded.all_clients.max(1) as f64),
    ];
    if peer.kind != Kind::Direct {
        figures.push((less("CPU µs/connection"), window.cpu_per_unit() * 1e6));
    }
    Ok(Sample { figures, disturbance: window.disturbance, ..Sample::default() })
}

/// A fresh process, since one that has worked keeps what it once needed.
fn memory(program: &Program, backend: &Backend, sessions: usize) -> Result<Sample> {
    let peer = program.start(backend.address())?;
    let resident = || {
        std::thread::sleep(SETTLE);
        peer.processes.resident_bytes() as f64
    };
    let empty = resident();
    let per_session = || (resident() - empty).max(0.0) / sessions as f64 / 1000.0;
    let mut connections = Connections::open(peer.address, sessions, backend)?;
    let fresh = per_session();
    connections.echo_once(BURST_BYTES)?;
    let after_burst = per_session();
    connections.echo_once(BULK_BYTES)?;
    let after_bulk = per_session();
    connections.cut();
    let figures = vec![
        (less("kB/session, fresh"), fresh),
        (less("kB/session, after 64 KiB"), after_burst),
        (less("kB/session, after 1 MiB"), after_bulk),
        (less("MB without sessions"), empty / 1e6),
    ];
    Ok(Sample { figures, ..Sample::default() })
}

fn system_calls(peer: &Peer, backend: &Backend) -> Result<Sample> {
    let (calls, parts) = traced(peer, || {
        sessions(peer.address, TRACED_AT_ONCE, &mut Meter::counted(&peer.processes, TRACED_SESSIONS))
    })?;
    let of_sessions = calls / TRACED_SESSIONS as f64;
    backend.wait_until_idle(IDLE_LIMIT);
    let (calls, _) =
        traced(peer, || sessions(peer.address, 1, &mut Meter::counted(&peer.processes, TRACED_ONE_BY_ONE)))?;
    let one_by_one = calls / TRACED_ONE_BY_ONE as f64;
    backend.wait_until_idle(IDLE_LIMIT);
    let mut connections = Connections::open(peer.address, 1, backend)?;
    let mut requests = 0.0;
    let (calls, _) = traced(peer, || {
        let mut meter = Meter::counted(&peer.processes, TRACED_REQUESTS);
        connections.ping_pong(SMALL_BYTES, &mut meter)?;
        requests = meter.window()?.units;
        Ok(())
    })?;
    connections.cut();
    let figures = vec![
        (less("calls/session, 1 at a time"), one_by_one),
        (less("calls/session, 64 at a time"), of_sessions),
        (less("calls/request"), calls / requests),
    ];
    let parts = parts.into_iter().map(|(name, calls)| (name, calls / TRACED_SESSIONS as f64)).collect();
    Ok(Sample { figures, parts, ..Sample::default() })
}

/// All system calls of a peer while `load` runs: the sum, and each by its name.
fn traced(peer: &Peer, load: impl FnOnce() -> Result<()>) -> Result<(f64, Vec<(String, f64)>)> {
    let strace = on_path("strace", "apt-get install strace")?;
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("calls");
    let mut command = Command::new(strace);
    command.args(["-f", "-c", "-o"]).arg(&output).process_group(0);
    for pid in &peer.processes.0 {
        command.args(["-p", &pid.to_string()]);
    }
    let complaints = folder.path().join("stderr");
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&complaints)?).spawn()?;
    let begun = Instant::now();
    while !peer.processes.all_traced() {
        if child.try_wait()?.is_some() || begun.elapsed() > Duration::from_secs(5) {
            let _ = child.kill();
            let _ = child.wait();
            bail!("strace cannot attach: {}", fs::read_to_string(complaints).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let loaded = load();
    // What follows the last answer: the ends of the last sessions.
    std::thread::sleep(Duration::from_millis(200));
    if let Some(pid) = Pid::from_raw(child.id() as i32) {
        kill_process(pid, Signal::INT)?;
    }
    child.wait()?;
    loaded?;
    let text = fs::read_to_string(output)?;
    let mut calls = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, _, count, .., name] = fields[..]
            && let Ok(count) = count.parse::<f64>()
        {
            calls.push((name.to_owned(), count));
        }
    }
    let total = calls.pop().filter(|(name, _)| name == "total").context("strace printed no summary")?;
    Ok((total.1, calls))
}
