//! What may be written behind `statera weights`: the commands, their options and their help.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::simulate::SimulateArguments;
use super::states::{DrainArguments, StateArguments};
use crate::cli::ConfigArgument;
use crate::redis::weights::LONGEST_HISTORY;

/// What `statera weights` can do.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum WeightsCommand {
    /// Show members, weights, shares, the version, who changed it last, and which members get no sessions from how many proxies
    /// and why.
    Get(GetArguments),
    /// Give members their weights, all at once or not at all.
    Set(SetArguments),
    /// Show which sessions members would get by these weights, and by how much chance may have it otherwise. Writes nothing.
    Simulate(SimulateArguments),
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
pub(super) struct Target {
    /// The pool, by its name in the config.
    pub(super) pool: String,
    #[command(flatten)]
    pub(super) config: ConfigArgument,
    /// Answer in JSON.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Writing {
    /// Change nothing unless this is the version now.
    #[arg(long, value_name = "N")]
    pub(super) if_version: Option<u64>,
    /// For the history.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) reason: String,
    /// Wait until all proxies have applied it, at most so long [default: 10s]; exit 3 if some have not. One that was killed, and
    /// did not drain, counts for 15s after its last report. Where redis was away, or has lost what they reported, it takes 6s
    /// until all that are alive must have reported again; exit 3 if the time ends before.
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "10s")]
    #[arg(value_parser = humantime::parse_duration)]
    pub(super) wait: Option<Duration>,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct GetArguments {
    #[command(flatten)]
    pub(super) target: Target,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct SetArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// Backends and their weights: 10.0.0.1:80=50, unix:/run/app.sock=0. A weight is a finite number of at least 0.
    #[arg(required = true, value_name = "MEMBER=WEIGHT")]
    pub(super) members: Vec<String>,
    #[command(flatten)]
    pub(super) writing: Writing,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct RemoveArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// As they stand in the table.
    #[arg(required = true, value_name = "MEMBER")]
    pub(super) members: Vec<OsString>,
    #[command(flatten)]
    pub(super) writing: Writing,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct HistoryArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// Entries at most.
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=LONGEST_HISTORY as u64))]
    pub(super) limit: u64,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct RollbackArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// Of the present version: take back what other programs have changed since [default: the version before].
    pub(super) version: Option<u64>,
    #[command(flatten)]
    pub(super) writing: Writing,
}
