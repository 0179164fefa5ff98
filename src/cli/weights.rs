//! `statera weights`: shows and changes the weights of a pool, and their history.
//!
//! Arguments are checked by the rules of the proxy, before Redis is asked. `redis/weights/` reads and
//! writes the keys in Redis. `arguments.rs` has the commands; `change.rs`, `states.rs` and `simulate.rs`
//! run them; `show.rs` and `json.rs` write the answers; `wait.rs` waits until the proxies use a change.

mod arguments;
mod change;
mod escape;
mod json;
mod members;
mod settings;
mod show;
mod simulate;
mod states;
mod unusable;
mod wait;

use std::os::unix::ffi::OsStringExt as _;
use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::Builder;

pub(super) use self::arguments::WeightsCommand;
use self::arguments::{HistoryArguments, RemoveArguments, RollbackArguments, SetArguments, Target};
use self::change::change;
use self::members::{check_count, parse_members};
use self::settings::{Settings, settings};
use super::{FAILED, INVALID, NOT_CONVERGED, UNREACHABLE, print};
use crate::balance::AdminState;
use crate::redis::weights::{LONGEST_HISTORY, Ledger, Order, Reports, WeightsError};

/// Why a command failed. Each kind has an exit code.
enum Failure {
    /// The arguments or the config are wrong.
    Invalid(String),
    Failed(String),
    NotConverged(String),
    Unreachable(String),
}

impl From<WeightsError> for Failure {
    fn from(error: WeightsError) -> Self {
        match error {
            WeightsError::Unreachable(text) => Self::Unreachable(text),
            WeightsError::Refused(text) => Self::Failed(text),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}

/// Runs the command, prints its answer or its message, and returns its exit code.
pub(super) fn weights(command: &WeightsCommand) -> ExitCode {
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return super::report(Err(error.into())),
    };
    let (code, text) = match runtime.block_on(execute(command)) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Failed(text)) => (FAILED, text),
        Err(Failure::Invalid(text)) => (INVALID, text),
        Err(Failure::NotConverged(text)) => (NOT_CONVERGED, text),
        Err(Failure::Unreachable(text)) => (UNREACHABLE, text),
    };
    super::print_error(&escape::printable(&text));
    ExitCode::from(code)
}

async fn execute(command: &WeightsCommand) -> Result<(), Failure> {
    match command {
        WeightsCommand::Get(arguments) => get(&arguments.target).await,
        WeightsCommand::Set(SetArguments { target, members, writing }) => {
            change(target, &Order::Set(parse_members(members)?), writing).await
        }
        WeightsCommand::Simulate(arguments) => simulate::simulate(arguments).await,
        WeightsCommand::Remove(RemoveArguments { target, members, writing }) => {
            check_count(members.len())?;
            let members = members.iter().map(|member| member.clone().into_vec()).collect();
            change(target, &Order::Remove(members), writing).await
        }
        WeightsCommand::Drain(arguments) => states::drain(arguments).await,
        WeightsCommand::Maint(arguments) => states::put(arguments, AdminState::Maint).await.map(drop),
        WeightsCommand::Ready(arguments) => states::put(arguments, AdminState::Ready).await.map(drop),
        WeightsCommand::History(HistoryArguments { target, limit }) => {
            let Settings { redis, pool } = settings(target)?;
            let mut ledger = Ledger::open(&redis, &pool.weights_key).await?;
            let history = ledger.history(usize::try_from(*limit).unwrap_or(LONGEST_HISTORY)).await?;
            let text =
                if target.json { json::history(&target.pool, &history) } else { show::history(&history) };
            Ok(print(&text)?)
        }
        WeightsCommand::Rollback(RollbackArguments { target, version, writing }) => {
            change(target, &Order::Rollback(*version), writing).await
        }
    }
}

async fn get(target: &Target) -> Result<(), Failure> {
    let Settings { redis, pool } = settings(target)?;
    let mut ledger = Ledger::open(&redis, &pool.weights_key).await?;
    let seen = ledger.look().await?;
    // The Redis user may have the right to read only the table.
    let unknown = || Reports { live: Vec::new(), are_all_in: Duration::MAX };
    let reports = ledger.applied().await.unwrap_or_else(|_| unknown());
    let states = ledger.states().await;
    if target.json {
        return Ok(print(&json::table(&pool, &seen, states.as_deref().ok(), &reports))?);
    }
    let mut text = show::table(&pool, &seen, states.as_deref().ok(), &reports);
    if let Err(error) = states {
        text +=
            &format!("unknown which members are in drain or maint: {}\n", escape::word(&error.to_string()));
    }
    Ok(print(&text)?)
}
