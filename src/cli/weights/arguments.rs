//! What may be written behind `statera weights`: the commands, their options and their help.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::simulate::SimulateArguments;
use super::states::{DrainArguments, StateArguments};
use crate::cli::config_argument::ConfigArgument;
use crate::redis::weights::LONGEST_HISTORY;

/// What `statera weights` can do.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum WeightsCommand {
    /// Show the members of a pool with their weights and shares.
    ///
    /// Shows also the version, the last change, which proxies use it, and which members get no sessions
    /// and why.
    Get(GetArguments),
    /// Set the weights of members. All are set together, or none.
    ///
    /// A member that is not in the table yet is added. Weight 0 sends a member no new sessions.
    Set(SetArguments),
    /// Show how many sessions each member would get by other weights. Nothing is written.
    ///
    /// Sends sessions through the pool's own balance, as if all backends were up. Shows for each
    /// member the expected number, with the range that chance allows: 95 of 100 runs lie inside it.
    #[command(verbatim_doc_comment)]
    Simulate(SimulateArguments),
    /// Remove members from the table. All are removed together, or none.
    Remove(RemoveArguments),
    /// Put members into drain: they get no new sessions from any proxy.
    ///
    /// Their sessions go on, their health is still checked, and their weights are kept for `ready`.
    Drain(DrainArguments),
    /// Put members into maint: they get no new sessions and no health checks from any proxy.
    ///
    /// Use it for backends that are to be switched off. Sessions that they have go on, and their weights
    /// are kept for `ready`.
    #[command(verbatim_doc_comment)]
    Maint(StateArguments),
    /// End the drain or maintenance of members: they get sessions by their weight again.
    Ready(StateArguments),
    /// Show who changed what, the newest change first.
    ///
    /// What other programs changed (redis-cli, say) is one entry, with the time at which a command of
    /// statera noticed it. A change that was undone before that is not listed.
    #[command(verbatim_doc_comment)]
    History(HistoryArguments),
    /// Bring back the table of an earlier version. This makes a new version.
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
    /// Change nothing unless the table has this version now.
    #[arg(long, value_name = "N")]
    pub(super) if_version: Option<u64>,
    /// Why the change is made, for the history.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) reason: String,
    /// Wait until every proxy uses the change. Exit with 3 if that takes longer than TIME [default: 10s].
    ///
    /// Proxies report in Redis what they use. A proxy that was killed is waited for until its
    /// last report is 15s old. After a restart of Redis the reports are complete again within 6s,
    /// so choose a TIME above that.
    #[arg(verbatim_doc_comment)]
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
    /// Backends and their weights: 10.0.0.1:80=50, unix:/run/app.sock=0. A weight is a number of at least 0.
    #[arg(required = true, value_name = "MEMBER=WEIGHT")]
    pub(super) members: Vec<String>,
    #[command(flatten)]
    pub(super) writing: Writing,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct RemoveArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// Members as the table has them, also those that are no valid backends.
    #[arg(required = true, value_name = "MEMBER")]
    pub(super) members: Vec<OsString>,
    #[command(flatten)]
    pub(super) writing: Writing,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct HistoryArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// Show at most N changes.
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=LONGEST_HISTORY as u64))]
    pub(super) limit: u64,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct RollbackArguments {
    #[command(flatten)]
    pub(super) target: Target,
    /// The version to go back to [default: the one before the present version].
    ///
    /// The present version itself undoes what other programs have changed since it was made.
    #[arg(verbatim_doc_comment)]
    pub(super) version: Option<u64>,
    #[command(flatten)]
    pub(super) writing: Writing,
}
