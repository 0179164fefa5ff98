//! The commands of `statera`. Each command except `version` has a file. Its result becomes the exit code of
//! the process.

mod check;
mod config_argument;
mod demo;
mod help;
mod log_format;
mod run;
mod signals;
mod weights;

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use self::config_argument::ConfigArgument;
use self::help::{CHECK_HELP, DEMO_HELP, HELP, RUN_HELP, WEIGHTS_HELP};
use crate::config::Config;

/// Exit codes, which scripts depend on.
const FAILED: u8 = 1;
const INVALID: u8 = 2;
const NOT_CONVERGED: u8 = 3;
const UNREACHABLE: u8 = 4;

/// A layer-4 TCP load balancer whose weights are kept live in Redis.
#[derive(Debug, Parser)]
#[command(name = "statera", version, after_help = HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy. TERM, INT or QUIT drains and ends it; a second signal ends it at once.
    #[command(after_help = RUN_HELP)]
    Run(ConfigArgument),
    /// Check a config: print every problem with its line and its cure.
    #[command(after_help = CHECK_HELP)]
    Check(ConfigArgument),
    /// Show a proxy at work: three small backends, a private Redis, and each backend's share.
    #[command(after_help = DEMO_HELP)]
    Demo(demo::DemoArguments),
    /// Show and change a pool's weights in Redis, with their history.
    #[command(subcommand, after_help = WEIGHTS_HELP)]
    Weights(weights::WeightsCommand),
    /// Print the version.
    Version,
}

/// Runs the program with the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // clap reports help and version like errors, and knows which of them they are. That the text
            // cannot be written is not an error here.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { INVALID } else { 0 });
        }
    };
    match arguments.command {
        Command::Run(argument) => match run::prepare() {
            Ok(prepared) => with_config(&argument, |_, config| run::run(config, prepared)),
            Err(error) => report(Err(error)),
        },
        Command::Check(argument) => with_config(&argument, check::check),
        Command::Demo(arguments) => report(demo::demo(&arguments)),
        Command::Weights(command) => weights::weights(&command),
        Command::Version => report(print(concat!("statera ", env!("CARGO_PKG_VERSION"), "\n"))),
    }
}

fn with_config(
    argument: &ConfigArgument,
    command: impl FnOnce(&Path, &Config) -> anyhow::Result<()>,
) -> ExitCode {
    match argument.load() {
        Ok((path, config)) => report(command(&path, &config)),
        Err(error) => {
            print_error_line(&error);
            ExitCode::from(INVALID)
        }
    }
}

/// Prints an answer. Unlike `println!`, it does not panic where the reader has closed the pipe (`statera
/// … | head -1`).
fn print(text: &str) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).context("cannot write the answer")
}

fn report(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_error(&format!("{error:#}"));
            ExitCode::from(FAILED)
        }
    }
}

/// Prints a message to standard error. Unlike `eprintln!`, it does not panic where that cannot be written.
fn print_error(text: &str) {
    print_error_line(&format!("statera: {text}"));
}

fn print_error_line(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}
