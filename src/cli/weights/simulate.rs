//! `statera weights simulate`: how many sessions each member would get by other weights. Nothing is
//! written.
//!
//! `balance/simulation.rs` picks by the pool's own balance. The weights are added to the present table,
//! as `set` would do it, or are the whole table (`--only`).

use std::collections::HashMap;
use std::fmt::Write as _;
use std::num::NonZeroU32;

use clap::Args;
use fastrand::Rng;
use serde_json::{Value, json};

use super::Failure;
use super::arguments::Target;
use super::escape::{json_text, word};
use super::members::parse_members;
use super::settings::find_pool;
use crate::balance::simulation::{Forecast, SimulatedLoad, Simulation};
use crate::balance::{AdminState, BackendId, Balance, Table, Weight};
use crate::cli::print;
use crate::config::{Pool, Redis};
use crate::redis::weights::{Ledger, LeftOut, Seen, WeightsError};

/// Fixed, so that the same arguments have the same answer.
const SEED: u64 = 1;
/// The default of `--active` for each backend that has weight.
const ACTIVE_EACH: u32 = 10;
const MOST: u32 = 1_000_000;

#[derive(Args, Debug)]
pub(in crate::cli) struct SimulateArguments {
    #[command(flatten)]
    target: Target,
    /// Backends and their weights, as for `set`: 10.0.0.1:80=50. Other members keep their weight.
    ///
    /// Weight 0 stands for a member that is removed, too. The weights of the others come from
    /// Redis, or from `backends` in the config where it has no redis section.
    #[arg(verbatim_doc_comment, required = true, value_name = "MEMBER=WEIGHT")]
    members: Vec<String>,
    /// Leave out all members that are not named. Redis is not asked then.
    #[arg(long)]
    only: bool,
    /// How many sessions to simulate. With few sessions the numbers differ more from run to run.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    sessions: u32,
    /// For `balance: least_conn`: how many sessions are open at once [default: 10 for each backend with
    /// weight].
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    active: Option<u32>,
}

/// The table that proxies use now.
struct Now {
    table: Table,
    /// `redis` or `config`, as JSON shows it.
    source: &'static str,
    /// The version in Redis; a config has none.
    version: Option<u64>,
    left_out: Vec<LeftOut>,
}

struct Row {
    /// `None` where the member is not in the table yet.
    now: Option<(Weight, Share)>,
    weight: Weight,
    then: Forecast,
}

/// A share, from 0 to 1.
type Share = f64;

struct Answer {
    now: Option<Now>,
    trial: SimulatedLoad,
    rows: Vec<Row>,
    moved_clients: Option<Share>,
}

/// Simulates, and prints the answer.
pub(super) async fn simulate(arguments: &SimulateArguments) -> Result<(), Failure> {
    let SimulateArguments { target, members, only, sessions, active } = arguments;
    let written = parse_members(members)?;
    let (_, pool, redis) = find_pool(target)?;
    if active.is_some() && pool.balance != Balance::LeastConn {
        return Err(Failure::Invalid(format!(
            "--active: the pool's balance is {}, which does not look at active sessions: leave it out",
            pool.balance.name()
        )));
    }
    let now = match redis {
        _ if *only => None,
        Some(redis) => {
            let seen = look(&redis, &pool.weights_key).await?;
            let (table, left_out) = (seen.table, seen.left_out);
            Some(Now { table, source: "redis", version: Some(seen.version), left_out })
        }
        None => {
            let (table, left_out) = (Table::new(pool.backends.clone()), Vec::new());
            Some(Now { table, source: "config", version: None, left_out })
        }
    };
    let answer = forecast(&pool, now, written, *sessions, *active);
    Ok(print(&if target.json { answer.json(&pool) } else { answer.text(&pool) })?)
}

async fn look(redis: &Redis, key: &str) -> Result<Seen, Failure> {
    let seen = async {
        let mut ledger = Ledger::open(redis, key).await?;
        let mut seen = ledger.look().await?;
        // The Redis user may have the right to read only the table.
        let states = ledger.states().await.unwrap_or_default();
        let states =
            states.iter().filter_map(|(id, state)| Some((id.parse().ok()?, AdminState::named(state)?)));
        seen.table = seen.table.with_states(states.collect());
        Ok(seen)
    };
    seen.await.map_err(|error: WeightsError| match error.into() {
        Failure::Unreachable(text) => Failure::Unreachable(format!("{text} (--only needs no redis)")),
        other => other,
    })
}

fn forecast(
    pool: &Pool,
    now: Option<Now>,
    written: Vec<(BackendId, Weight)>,
    sessions: u32,
    active: Option<u32>,
) -> Answer {
    let before = now.as_ref().map_or(&[][..], |now| now.table.members());
    // Members in drain or maint keep their admin state.
    let states = now.as_ref().map_or(&[][..], |now| now.table.states());
    let then = Table::new(before.iter().cloned().chain(written).collect()).with_states(states.to_vec());
    let weighty = then.members().iter().filter(|(_, weight)| !weight.is_zero()).count();
    let usual = u32::try_from(weighty).unwrap_or(u32::MAX).saturating_mul(ACTIVE_EACH).min(MOST);
    let at_least_one = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    let trial =
        SimulatedLoad { sessions: at_least_one(sessions), active: at_least_one(active.unwrap_or(usual)) };
    let forecast_of = |simulation: &Simulation| simulation.forecast(trial, &mut Rng::with_seed(SEED));

    let (mut now_by_id, mut moved_clients) = (HashMap::new(), None);
    let after = Simulation::new(pool.policy(), then.clone());
    if let Some(now) = now.as_ref().filter(|now| !now.table.is_empty()) {
        let before = Simulation::new(pool.policy(), now.table.clone());
        for ((_, weight), forecast) in now.table.members().iter().zip(forecast_of(&before)) {
            now_by_id.insert(forecast.id, (*weight, forecast.share));
        }
        moved_clients = before.moved_clients(&after);
    }
    let rows = then.members().iter().zip(forecast_of(&after));
    let rows = rows.map(|((id, weight), then)| Row { now: now_by_id.remove(id), weight: *weight, then });
    Answer { rows: rows.collect(), now, trial, moved_clients }
}

impl Answer {
    fn refuses(&self) -> bool {
        self.rows.iter().all(|row| row.weight.is_zero())
    }

    fn expected(&self, forecast: &Forecast) -> f64 {
        (forecast.share * f64::from(self.trial.sessions.get())).round()
    }

    fn text(&self, pool: &Pool) -> String {
        let SimulatedLoad { sessions, active } = self.trial;
        let mut text = format!("pool {}, balance {}", pool.name, pool.balance.name());
        text += &match &self.now {
            Some(Now { version: Some(version), .. }) => {
                format!(", key {}, version {version}: ", word(&pool.weights_key))
            }
            Some(_) => ", with the other backends as in the config: ".to_owned(),
            None => ", with these members alone: ".to_owned(),
        };
        text += "nothing is written\n";
        let _ = writeln!(
            text,
            "of {sessions} sessions, each member gets a number within RANGE in 95 of 100 runs"
        );
        text += "assumed: all backends are up";
        if pool.balance == Balance::LeastConn {
            let _ = write!(text, " and equally fast, and {active} sessions are open at each moment");
        }
        text += "\n\n";
        self.columns(&mut text);
        for left_out in self.now.iter().flat_map(|now| &now.left_out) {
            let _ = writeln!(text, "ignored by proxies: {}: {}", left_out.member, left_out.reason);
        }
        if let Some(moved) = self.moved_clients {
            let _ = writeln!(text, "\n{:.1} % of clients would move to another backend", 100.0 * moved);
        }
        if self.refuses() {
            text += "\nall weights are 0: proxies would refuse sessions\n";
        }
        text
    }

    fn columns(&self, text: &mut String) {
        let width =
            self.rows.iter().map(|row| row.then.id.as_str().chars().count()).max().unwrap_or(0).max(6);
        let _ = writeln!(
            text,
            "{:width$}  {:>12}  {:>7}      {:>12}  {:>7}  {:>9}  RANGE",
            "MEMBER", "WEIGHT NOW", "SHARE", "WEIGHT THEN", "SHARE", "SESSIONS"
        );
        for Row { now, weight, then } in &self.rows {
            let (weight_now, share_now) = match now {
                Some((weight, share)) => (weight.to_string(), percent(*share)),
                None => ("-".to_owned(), "-".to_owned()),
            };
            let (id, weight, share) = (then.id.as_str(), weight.to_string(), percent(then.share));
            let (expected, Forecast { least, most, .. }) = (self.expected(then), then);
            let _ = writeln!(
                text,
                "{id:width$}  {weight_now:>12}  {share_now:>7}  ->  {weight:>12}  {share:>7}  {expected:>9}  \
                 {least} to {most}"
            );
        }
    }

    fn json(&self, pool: &Pool) -> String {
        let row = |Row { now, weight, then }: &Row| {
            json!({
                "member": then.id.as_str(),
                "now": now.map(|(weight, share)| weight_json(weight, share)),
                "then": weight_json(*weight, then.share),
                "sessions": {"expected": self.expected(then), "least": then.least, "most": then.most},
            })
        };
        let left_out = |left_out: &LeftOut| json!({"member": left_out.member, "reason": left_out.reason});
        let left_out: Vec<Value> = self.now.iter().flat_map(|now| &now.left_out).map(left_out).collect();
        json_text(&json!({
            "pool": &*pool.name,
            "key": pool.weights_key,
            "balance": pool.balance.name(),
            "now_from": self.now.as_ref().map(|now| now.source),
            "version": self.now.as_ref().and_then(|now| now.version),
            "sessions": self.trial.sessions,
            "active": (pool.balance == Balance::LeastConn).then_some(self.trial.active),
            "members": self.rows.iter().map(row).collect::<Vec<_>>(),
            "left_out": left_out,
            "moved_clients_percent": self.moved_clients.map(|moved| 100.0 * moved),
            "refuses": self.refuses(),
        }))
    }
}

fn weight_json(weight: Weight, share: Share) -> Value {
    json!({"weight": weight.get(), "share_percent": 100.0 * share})
}

fn percent(share: Share) -> String {
    format!("{:.1} %", 100.0 * share)
}
