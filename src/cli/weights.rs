//! `statera weights`: a pool's weights as a person or a script changes them, with their history.
//!
//! What is asked for is checked here as the proxy checks it, before Redis is asked; `redis/weights.rs` does it. `show.rs`
//! writes the answers, `wait.rs` waits until the proxies have a change, `states.rs` drains, `simulate.rs` tells what a change would
//! do.

mod show;
mod simulate;
mod states;
mod unusable;
mod wait;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::runtime::Builder;

use self::states::{DrainArguments, StateArguments};
use super::{ConfigArgument, FAILED, INVALID, NOT_CONVERGED, UNREACHABLE, say};
use crate::balance::{AdminState, BackendId, Weight};
use crate::config::{Config, Pool, Redis};
use crate::redis::weights::{Author, LONGEST_HISTORY, Ledger, MOST_CHANGES, Order, Reports, WeightsError};

/// Of a reason, which stands in the history a thousand times.
const REASON_MAX_BYTES: usize = 500;

/// What `statera weights` can do.
#[derive(Debug, Subcommand)]
pub(super) enum WeightsCommand {
    /// Show members, weights, shares, the version, who changed it last, and which members get no sessions from how many proxies
    /// and why.
    Get(GetArguments),
    /// Give members their weights, all at once or not at all.
    Set(SetArguments),
    /// Show which sessions members would get by these weights, and by how much chance may have it otherwise. Writes nothing.
    Simulate(simulate::SimulateArguments),
    /// Take members out of the table, all at once or not at all.
    Remove(RemoveArguments),
    /// Send members no new sessions, on every proxy, and keep their weights; sessions that they have finish.
    Drain(DrainArguments),
    /// The same, and do not check their health: they may be switched off.
    Maint(StateArguments),
    /// Take members out of drain or maint.
    Ready(StateArguments),
    /// Show who changed what, newest first. What other programs changed stands there as one change, as of when a command noticed
    /// it: a change that was taken back before is not there.
    History(HistoryArguments),
    /// Bring back the table as it was at a version, as a new version. Members whose names are too long for a backend stay as
    /// they are.
    Rollback(RollbackArguments),
}

#[derive(Args, Debug)]
struct Target {
    /// The pool, by its name in the config.
    pool: String,
    #[command(flatten)]
    config: ConfigArgument,
    /// Answer in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Writing {
    /// Change nothing unless this is the version now.
    #[arg(long, value_name = "N")]
    if_version: Option<u64>,
    /// For the history.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// Wait until all proxies have applied it, at most so long [default: 10s]; exit 3 if some have not. One that was killed, and
    /// did not drain, counts for 15s after its last report. Where redis was away, or has lost what they reported, it takes 6s
    /// until all that are alive must have reported again; exit 3 if the time ends before.
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "10s")]
    #[arg(value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
}

#[derive(Args, Debug)]
pub(super) struct GetArguments {
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Debug)]
pub(super) struct SetArguments {
    #[command(flatten)]
    target: Target,
    /// Backends and their weights: 10.0.0.1:80=50, unix:/run/app.sock=0. A weight is a finite number of at least 0.
    #[arg(required = true, value_name = "MEMBER=WEIGHT")]
    members: Vec<String>,
    #[command(flatten)]
    writing: Writing,
}

#[derive(Args, Debug)]
pub(super) struct RemoveArguments {
    #[command(flatten)]
    target: Target,
    /// As they stand in the table.
    #[arg(required = true, value_name = "MEMBER")]
    members: Vec<OsString>,
    #[command(flatten)]
    writing: Writing,
}

#[derive(Args, Debug)]
pub(super) struct HistoryArguments {
    #[command(flatten)]
    target: Target,
    /// Entries at most.
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=LONGEST_HISTORY as u64))]
    limit: u64,
}

#[derive(Args, Debug)]
pub(super) struct RollbackArguments {
    #[command(flatten)]
    target: Target,
    /// Of the present version: take back what other programs have changed since [default: the version before].
    version: Option<u64>,
    #[command(flatten)]
    writing: Writing,
}

/// Why it was not done; each has an exit code.
enum Failure {
    /// What was typed, or the config.
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

/// Does what was typed.
pub(super) fn weights(command: &WeightsCommand) -> ExitCode {
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return super::report(Err(error.into())),
    };
    let (code, text) = match runtime.block_on(obey(command)) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Failed(text)) => (FAILED, text),
        Err(Failure::Invalid(text)) => (INVALID, text),
        Err(Failure::NotConverged(text)) => (NOT_CONVERGED, text),
        Err(Failure::Unreachable(text)) => (UNREACHABLE, text),
    };
    super::complain(&show::printable(&text));
    ExitCode::from(code)
}

async fn obey(command: &WeightsCommand) -> Result<(), Failure> {
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
            Ok(say(&show::history(&target.pool, &history, target.json))?)
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
    // A user may be allowed to read the table alone.
    let unknown = || Reports { live: Vec::new(), are_all_in: Duration::MAX };
    let reports = ledger.applied().await.unwrap_or_else(|_| unknown());
    let states = ledger.states().await;
    let mut text = show::table(&pool, &seen, states.as_deref().ok(), &reports, target.json);
    if let Err(error) = states
        && !target.json
    {
        text += &format!("who is in drain or maint is not known: {}\n", show::word(&error.to_string()));
    }
    Ok(say(&text)?)
}

async fn change(target: &Target, order: &Order, writing: &Writing) -> Result<(), Failure> {
    if writing.reason.len() > REASON_MAX_BYTES {
        return Err(Failure::Invalid(format!("--reason: at most {REASON_MAX_BYTES} bytes are kept")));
    }
    let Settings { redis, pool } = settings(target)?;
    let mut ledger = Ledger::open(&redis, &pool.weights_key).await?;
    let author = Author { who: who(), why: writing.reason.clone() };
    let done = ledger.change(order, writing.if_version, &author).await?;
    if !target.json {
        say(&show::done(&pool, &done, redis.on_empty))?;
    }
    let waited = match writing.wait {
        Some(limit) => wait::for_fleet(&mut ledger, &done, limit).await.map(Some),
        None => Ok(None),
    };
    if target.json {
        // Whatever became of the waiting, the change is made.
        say(&show::done_json(&pool, &done, waited.as_ref().ok().and_then(Option::as_ref)))?;
    }
    let Some(fleet) = waited? else { return Ok(()) };
    if !fleet.has_converged() {
        return Err(Failure::NotConverged(fleet.not_converged(done.version)));
    }
    if !target.json {
        say(&format!("applied by {}\n", show::proxies(fleet.have.len())))?;
    }
    Ok(())
}

struct Settings {
    redis: Redis,
    pool: Pool,
}

fn settings(target: &Target) -> Result<Settings, Failure> {
    let (pool, redis) = find_pool(target)?;
    let Some(redis) = redis else {
        return Err(Failure::Invalid(format!(
            "{} has no redis section: its pools run on their backends alone, so change those there",
            target.config.config.display()
        )));
    };
    Ok(Settings { redis, pool })
}

/// Without a Redis, a pool runs on its backends alone.
fn find_pool(target: &Target) -> Result<(Pool, Option<Redis>), Failure> {
    let path = &target.config.config;
    let config = Config::load(path).map_err(|error| Failure::Invalid(error.to_string()))?;
    let Some(pool) = config.pools.iter().find(|pool| *pool.name == *target.pool) else {
        let names: Vec<&str> = config.pools.iter().map(|pool| &*pool.name).collect();
        return Err(Failure::Invalid(format!(
            "there is no pool {:?} in {}: it has {}",
            target.pool,
            path.display(),
            names.join(", ")
        )));
    };
    Ok((pool.clone(), config.redis))
}

/// The last `=` parts them: a unix path may hold others.
fn parse_members(texts: &[String]) -> Result<Vec<(BackendId, Weight)>, Failure> {
    check_count(texts.len())?;
    let mut members: Vec<(BackendId, Weight)> = Vec::with_capacity(texts.len());
    let mut names = std::collections::HashSet::new();
    for text in texts {
        let invalid = |why: &dyn std::fmt::Display| Failure::Invalid(format!("{text}: {why}"));
        let (member, weight) =
            text.rsplit_once('=').ok_or_else(|| invalid(&"write member=weight, like 10.0.0.1:80=50"))?;
        let member: BackendId = member.parse().map_err(|error| invalid(&error))?;
        let number: f64 = weight.parse().map_err(|_| invalid(&"its weight is not a number"))?;
        let weight = Weight::new(number).map_err(|error| invalid(&error))?;
        if !names.insert(member.clone()) {
            return Err(invalid(&"this member is named twice: keep one"));
        }
        members.push((member, weight));
    }
    Ok(members)
}

fn check_count(members: usize) -> Result<(), Failure> {
    if members > MOST_CHANGES {
        return Err(Failure::Invalid(format!("at most {MOST_CHANGES} members can be changed at once")));
    }
    Ok(())
}

/// `user@host`, as the environment tells it: for people to find each other, not for proof.
fn who() -> String {
    let named = ["USER", "LOGNAME"].iter().filter_map(|name| std::env::var(name).ok());
    let user = named
        .filter(|user| !user.is_empty())
        .map(|user| user.chars().take(64).collect())
        .next()
        .unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_checked_as_the_proxy_checks_them() {
        let parse = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            parse_members(&texts).map_err(|failure| match failure {
                Failure::Invalid(text) => text,
                _ => panic!("of another kind"),
            })
        };
        let members = parse(&["10.0.0.1:80=0", "[::1]:80=0.5", "unix:/a=b=1e3"]).expect("members");
        let shown: Vec<String> = members.iter().map(|(id, weight)| format!("{id} {weight}")).collect();
        assert_eq!(shown, ["10.0.0.1:80 0", "[::1]:80 0.5", "unix:/a=b 1000"]);
        for (bad, why) in [
            ("10.0.0.1:80", "member=weight"),
            ("10.0.0.1=5", "no port"),
            ("10.0.0.1:80=", "not a number"),
            ("10.0.0.1:80=five", "not a number"),
            ("10.0.0.1:80=-1", "at least 0"),
            ("10.0.0.1:80=inf", "finite"),
            ("10.0.0.1:80=nan", "finite"),
        ] {
            let error = parse(&[bad]).expect_err(bad);
            assert!(error.starts_with(bad) && error.contains(why), "{error}");
        }
        let twice = parse(&["a:1=1", "a:1=1"]).expect_err("named twice");
        assert!(twice.contains("twice"), "{twice}");
    }
}
