//! How many instructions the hot paths take: a pick, a short session, a request on an open connection.
//!
//! Time says little on a shared machine; what valgrind counts hardly depends on other programs.
//! Each case runs twice under callgrind, once with few units and once with many, and the difference divided
//! by the difference in units is its figure: start and end cancel out. The figures are compared with
//! `expected.yaml`, and the run fails where one is off by more than its tolerance.
//!
//! - [`valgrind`] runs a program and reads what was counted; [`picks`] is the program for the picks.
//! - [`proxy`] is Statera under valgrind; its client and its backend run outside of valgrind.
//! - [`expected`] compares, and accepts.
//!
//! It counts what happens in user space. What the kernel does for a session is far more, and `peers` measures
//! that.

mod expected;
mod picks;
mod proxy;
#[path = "../shipped.rs"]
mod shipped;
mod valgrind;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use tokio::time::Instant;

use expected::{Expected, Figure};
use proxy::Proxy;
use valgrind::{Counts, Valgrind};

/// Counts instructions under valgrind, and compares them with benches/instructions/expected.yaml.
#[derive(Debug, Parser)]
#[command(name = "instructions")]
struct Arguments {
    /// Only the cases whose names begin like this; repeatable
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// Each case so often; the figure is the median, and the table shows the least and the most
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Another build of statera [default: this crate's, built now as it ships]
    #[arg(long, value_name = "FILE")]
    statera: Option<PathBuf>,
    /// What runs under valgrind for the picks: the algorithm, the number of backends, the number of picks
    #[arg(long, hide = true, num_args = 3)]
    picks: Option<Vec<String>>,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one unit is.
#[derive(Debug, Clone, Copy)]
enum Case {
    /// A pick from a fresh snapshot.
    Pick(&'static str, usize),
    /// A short session, one at a time.
    Session { logged: bool },
    /// A request on an open connection.
    Request,
}

impl Case {
    const ALL: [Self; 12] = [
        Self::Pick("weighted_random", 10),
        Self::Pick("weighted_random", 10_000),
        Self::Pick("weighted_round_robin", 10),
        Self::Pick("weighted_round_robin", 10_000),
        Self::Pick("least_conn", 10),
        Self::Pick("least_conn", 64),
        Self::Pick("least_conn", 10_000),
        Self::Pick("source_hash", 10),
        Self::Pick("source_hash", 10_000),
        Self::Session { logged: false },
        Self::Session { logged: true },
        Self::Request,
    ];

    /// As in `expected.yaml`.
    fn name(self) -> String {
        match self {
            Self::Pick(algorithm, backends) => format!("pick {algorithm} {backends}"),
            Self::Session { logged: false } => "session".into(),
            Self::Session { logged: true } => "session logged".into(),
            Self::Request => "request".into(),
        }
    }

    /// How many units the two runs have. So many that what differs between two starts of the same program
    /// (the seeds of hash tables, for one) is less than a thousandth of the difference.
    fn units(self) -> (u64, u64) {
        match self {
            Self::Pick(..) => (1_000, 501_000),
            Self::Session { .. } => (100, 1_100),
            Self::Request => (100, 4_100),
        }
    }

    /// What a whole run with so many units takes.
    fn count(self, valgrind: &Valgrind, statera: &Path, units: u64) -> Result<Counts> {
        match self {
            Self::Pick(algorithm, backends) => picks::count(valgrind, algorithm, backends, units),
            Self::Session { logged } => {
                let mut proxy = Proxy::start(valgrind, statera, &self.name(), logged)?;
                for _ in 0..units {
                    proxy.session()?;
                }
                proxy.stop()
            }
            Self::Request => {
                let mut proxy = Proxy::start(valgrind, statera, &self.name(), false)?;
                proxy.requests(units)?;
                proxy.stop()
            }
        }
    }

    /// For one unit: instructions, and allocations of memory.
    fn figures(self, valgrind: &Valgrind, statera: &Path) -> Result<[f64; 2]> {
        let (few, many) = self.units();
        let (least, most) = (self.count(valgrind, statera, few)?, self.count(valgrind, statera, many)?);
        ensure!(
            most.instructions > least.instructions,
            "{}: {many} units took no more instructions than {few}",
            self.name()
        );
        let for_one = |least: u64, most: u64| most.saturating_sub(least) as f64 / (many - few) as f64;
        Ok([for_one(least.instructions, most.instructions), for_one(least.allocations, most.allocations)])
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.picks {
        Some(picks) => picks::run(picks).map(|()| true),
        None => run(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns false if a figure is off.
fn run(arguments: &Arguments) -> Result<bool> {
    let wanted = |case: &Case| {
        arguments.only.is_empty() || arguments.only.iter().any(|only| case.name().starts_with(only.as_str()))
    };
    let cases: Vec<Case> = Case::ALL.into_iter().filter(wanted).collect();
    ensure!(!cases.is_empty(), "--only: nothing is called {}", arguments.only.join(" or "));

    let valgrind = Valgrind::find()?;
    let statera = arguments.statera.clone().map_or_else(shipped::build, Ok)?;
    let begun = Instant::now();
    let mut figures = Vec::new();
    println!("{:44} {:>12} {:>12} {:>12}", "", "median", "least", "most");
    for case in cases {
        let rounds: Vec<[f64; 2]> =
            (0..arguments.rounds).map(|_| case.figures(&valgrind, &statera)).collect::<Result<_>>()?;
        for (kind, of) in ["instructions", "allocations"].into_iter().enumerate() {
            let mut rounds: Vec<f64> = rounds.iter().map(|figures| figures[kind]).collect();
            rounds.sort_by(f64::total_cmp);
            let figure = Figure { name: format!("{}: {of}", case.name()), count: rounds[rounds.len() / 2] };
            let (least, most) = (rounds[0], rounds[rounds.len() - 1]);
            println!("{:44} {:12.2} {least:12.2} {most:12.2}", figure.name, figure.count);
            figures.push(figure);
        }
    }
    println!("counted in {:.0} s with {}", begun.elapsed().as_secs_f64(), valgrind.versions);
    Expected::read()?.judge(&figures, &valgrind)
}
