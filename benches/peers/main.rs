//! Statera beside HAProxy, nginx stream and Envoy: the same load through each of them, in turn, in one run.
//!
//! `make bench` and `make bench-quick` run it; `README.md` one folder up says what is measured and why it is
//! fair.
//!
//! - [`peers`] starts and stops the programs, with the configs beside this file.
//! - [`measure`] says what one sample is; [`load`] and [`flood`] are the clients, [`backend`] the server,
//!   both on [`poll`].
//! - [`meter`] and [`machine`] read clocks, CPU time and what disturbed the machine.
//! - [`report`] and [`chart`] show what came out; [`namespace`] keeps the run to itself.

mod backend;
mod chart;
mod flood;
mod load;
mod machine;
mod measure;
mod meter;
mod namespace;
mod peers;
mod poll;
mod report;
#[path = "../shipped.rs"]
mod shipped;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};
use tokio::time::Instant;

use backend::{Backend, free_port};
use machine::{Processes, raise_descriptors, sysctl};
use measure::{Measure, Sample};
use peers::{Kind, Peer, Program};
use report::{Cell, Row};

const DESCRIPTORS: u64 = 20_000;
const REPEATS_MAX: u32 = 3;
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);
/// The quick run stays below three minutes also on a disturbed machine; the full one may take twice as long
/// there.
const QUICK_REPEATS: Duration = Duration::from_secs(8);

/// Measures Statera and its peers side by side.
#[derive(Debug, Parser)]
#[command(name = "peers")]
struct Arguments {
    /// Fewer cells, shorter samples, fewer rounds: under three minutes
    #[arg(long)]
    quick: bool,
    /// Only this measure: sessions, ping-pong, bulk, latency, flood, memory, syscalls, or how a cell's name
    /// begins; repeatable
    #[arg(long, value_name = "MEASURE")]
    only: Vec<String>,
    /// Only these peers, and Statera
    #[arg(long, value_name = "PEER,…", value_delimiter = ',')]
    peers: Vec<Kind>,
    /// Another build of statera, to compare with as peer `baseline`
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// How often each peer is measured [default: 6, quick: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How long a sample is [default: 1.5, quick: 0.4]
    #[arg(long)]
    seconds: Option<f64>,
    /// Requests a second of the latency measure
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    rate: u32,
    /// Congestion control of all connections (cubic, bbr); else the system's
    #[arg(long, value_name = "NAME")]
    congestion: Option<String>,
    /// A sample during which others took more of the machine than this share is repeated
    #[arg(long, default_value_t = 0.05)]
    disturbed: f64,
    /// Where the figures go
    #[arg(long, value_name = "FILE", default_value = "target/bench/peers.json")]
    json: PathBuf,
    /// Where the chart goes
    #[arg(long, value_name = "FILE", default_value = "target/bench/peers.svg")]
    svg: PathBuf,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    namespace::enter(arguments.congestion.as_deref());
    let descriptors = raise_descriptors(DESCRIPTORS)?;
    // Two for each session here, and some.
    let idle_sessions = (descriptors.saturating_sub(500) / 2) as usize;

    let length =
        Duration::try_from_secs_f64(arguments.seconds.unwrap_or(if arguments.quick { 0.4 } else { 1.5 }))?;
    ensure!(
        length >= Duration::from_millis(50) && length <= Duration::from_secs(20),
        "--seconds: 0.05 to 20"
    );
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 3 } else { 6 });
    let wanted = |measure: &Measure| {
        arguments.only.is_empty()
            || arguments
                .only
                .iter()
                .any(|only| measure.group() == only || measure.name().starts_with(only.as_str()))
    };
    let measures: Vec<Measure> =
        Measure::all(arguments.quick, arguments.rate, idle_sessions).into_iter().filter(wanted).collect();
    ensure!(!measures.is_empty(), "--only: nothing is called {}", arguments.only.join(" or "));
    let programs = find_programs(&arguments)?;

    let samples =
        |measure: &Measure| programs.iter().filter(|program| measure.applies_to(program.kind)).count() as u32;
    let in_all = |measure: &Measure| samples(measure) * measure.rounds(rounds, arguments.quick);
    let expected: Duration = measures.iter().map(|m| m.expected(length) * in_all(m)).sum();
    let for_repeats = if arguments.quick { QUICK_REPEATS } else { expected };
    println!("{} cells, {} peers, {rounds} rounds", measures.len(), programs.len());
    let at_most = expected + for_repeats;
    println!("takes about {} s, at most about {} s where disturbed", expected.as_secs(), at_most.as_secs());
    for program in &programs {
        println!("  {:16} {}", program.kind.name(), program.version);
    }

    let backend = Backend::start(free_port()?)?;
    let peers: Vec<Peer> =
        programs.iter().map(|program| program.start(backend.address())).collect::<Result<_>>()?;
    let mut run = Run {
        length,
        disturbed: arguments.disturbed,
        quick: arguments.quick,
        for_repeats,
        repeated: 0,
        still_disturbed: 0,
        backend,
        programs,
        peers,
    };
    let begun = Instant::now();
    end_on_interrupt()?;
    let cells = run.all(&measures, rounds);

    println!("\nratio: Statera's figure divided by the peer's of the same round, the median of all rounds");
    for cell in &cells {
        print!("{}", report::table(cell));
    }
    let about = about(&arguments, &run, rounds, begun.elapsed());
    let subtitle = format!(
        "medians of {rounds} interleaved rounds of {} s, {} cores, kernel {}, {}; after the dot: Statera ÷ peer",
        length.as_secs_f64(),
        about["cores"],
        about["kernel"].as_str().unwrap_or_default(),
        about["congestion_control"].as_str().unwrap_or_default(),
    );
    write(&arguments.json, &serde_json::to_string_pretty(&report::json(&cells, &about))?)?;
    write(&arguments.svg, &chart::svg(&cells, &subtitle))?;
    println!(
        "\n{} samples repeated, {} still disturbed; took {} s; figures in {}, chart in {}",
        run.repeated,
        run.still_disturbed,
        begun.elapsed().as_secs(),
        arguments.json.display(),
        arguments.svg.display()
    );
    ensure!(INTERRUPTS.load(Relaxed) == 0, "interrupted: not all rounds were done");
    if cells.iter().any(|cell| cell.rows.iter().any(|row| row.failure.is_some())) {
        bail!("some cells have no result");
    }
    Ok(())
}

/// The first interrupt lets the sample end, reports what there is and cleans up; the second ends at once.
fn end_on_interrupt() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    std::thread::Builder::new().name("interrupts".into()).spawn(move || {
        while runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            if INTERRUPTS.fetch_add(1, Relaxed) > 0 {
                std::process::exit(130);
            }
        }
    })?;
    Ok(())
}

/// The peers that were asked for; fails with everything that is missing, at once.
fn find_programs(arguments: &Arguments) -> Result<Vec<Program>> {
    let asked = |kind: &Kind| match kind {
        Kind::Baseline => arguments.baseline.is_some(),
        // All ratios are relative to it.
        Kind::Statera => true,
        _ => arguments.peers.is_empty() || arguments.peers.contains(kind),
    };
    let found =
        Kind::ALL.into_iter().filter(asked).map(|kind| Program::find(kind, arguments.baseline.as_deref()));
    let (found, missing): (Vec<_>, Vec<_>) = found.partition(Result::is_ok);
    let missing: Vec<String> =
        missing.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    ensure!(missing.is_empty(), "{}", missing.join("\n"));
    found.into_iter().collect()
}

struct Run {
    length: Duration,
    disturbed: f64,
    quick: bool,
    /// How much time is left for repeating samples.
    for_repeats: Duration,
    repeated: u32,
    still_disturbed: u32,
    backend: Backend,
    programs: Vec<Program>,
    /// One of each program, in the same order.
    peers: Vec<Peer>,
}

impl Run {
    /// Round for round, cell for cell, each peer right after the other; the first peer changes, so that no
    /// peer always follows the same one.
    fn all(&mut self, measures: &[Measure], rounds: u32) -> Vec<Cell> {
        let row = |kind| Row { peer: kind, samples: Vec::new(), failure: None };
        let rows = |m: &Measure| {
            self.programs.iter().map(|p| p.kind).filter(|kind| m.applies_to(*kind)).map(row).collect()
        };
        let mut cells: Vec<Cell> =
            measures.iter().map(|measure| Cell { measure: *measure, rows: rows(measure) }).collect();
        for round in 0..rounds as usize {
            println!("round {} of {rounds}", round + 1);
            for (index, cell) in cells.iter_mut().enumerate() {
                if round >= cell.measure.rounds(rounds, self.quick) as usize {
                    continue;
                }
                let count = cell.rows.len();
                for turn in 0..count {
                    if INTERRUPTS.load(Relaxed) > 0 {
                        return cells;
                    }
                    let row = &mut cell.rows[(turn + round + index) % count];
                    if row.failure.is_some() {
                        continue;
                    }
                    match self.sample(cell.measure, row.peer) {
                        Ok(sample) => row.samples.push(sample),
                        Err(error) => {
                            let log = self.peers.iter().find(|peer| peer.kind == row.peer).map(Peer::log);
                            println!("{}, {}: {error:#}", cell.measure.name(), row.peer.name());
                            println!("{}", log.unwrap_or_default());
                            row.failure = Some(format!("{error:#}"));
                        }
                    }
                }
            }
        }
        cells
    }

    /// A sample; repeated while it is disturbed, and then the least disturbed one.
    fn sample(&mut self, measure: Measure, kind: Kind) -> Result<Sample> {
        let index = self.peers.iter().position(|peer| peer.kind == kind).context("it was started")?;
        let (program, peer) = (&self.programs[index], &self.peers[index]);
        let disturbance = |sample: &Sample| sample.disturbance.stolen + sample.disturbance.others;
        let take = || measure::take(measure, program, peer, &self.backend, self.length);
        let mut best = take()?;
        for _ in 0..REPEATS_MAX {
            if disturbance(&best) <= self.disturbed || self.for_repeats.is_zero() {
                break;
            }
            self.repeated += 1;
            let begun = Instant::now();
            let again = take()?;
            self.for_repeats = self.for_repeats.saturating_sub(begun.elapsed());
            if disturbance(&again) < disturbance(&best) {
                best = again;
            }
        }
        self.still_disturbed += u32::from(disturbance(&best) > self.disturbed);
        Ok(best)
    }
}

fn about(arguments: &Arguments, run: &Run, rounds: u32, took: Duration) -> Value {
    let versions: serde_json::Map<String, Value> =
        run.programs.iter().map(|program| (program.kind.name().into(), json!(program.version))).collect();
    json!({
        "versions": versions,
        "kernel": sysctl("kernel.osrelease"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "congestion_control": sysctl("net.ipv4.tcp_congestion_control"),
        "tcp_rmem": sysctl("net.ipv4.tcp_rmem"),
        "tcp_wmem": sysctl("net.ipv4.tcp_wmem"),
        "own_network": namespace::is_own(),
        "quick": arguments.quick,
        "rounds": rounds,
        "seconds": run.length.as_secs_f64(),
        "took_seconds": took.as_secs(),
        "disturbed_above": run.disturbed,
        "samples_repeated": run.repeated,
        "samples_still_disturbed": run.still_disturbed,
        "cpu_of_load_and_backend_seconds": Processes(vec![std::process::id()]).cpu().as_secs_f64(),
    })
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
