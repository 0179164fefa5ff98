//! `statera weights drain`, `maint` and `ready`: set the admin state of backends. Weights and health stay
//! as they are.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::arguments::Target;
use super::members::check_count;
use super::settings::{Settings, settings};
use super::{Failure, escape, show, wait};
use crate::balance::{AdminState, BackendId};
use crate::cli::print;
use crate::redis::weights::{ContentHash, LANDING, Ledger, Report, Reports};

/// The shortest time between two reads of the reports. A proxy reports a change within 750 ms, and again
/// 2 s after the last change.
const LOOK: Duration = Duration::from_millis(100);
/// The time between two lines that name the proxies that are waited for.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How many proxies a message names.
const MOST_NAMED: usize = 20;

#[derive(Args, Debug)]
pub(in crate::cli) struct StateArguments {
    #[command(flatten)]
    target: Target,
    /// Backends as the table names them: 10.0.0.1:80
    #[arg(required = true, value_name = "MEMBER")]
    members: Vec<String>,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct DrainArguments {
    #[command(flatten)]
    which: StateArguments,
    /// Wait until no proxy has a session there. Exit with 3 if that takes longer than TIME [default: 10m].
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "10m")]
    #[arg(value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
}

pub(super) async fn drain(arguments: &DrainArguments) -> Result<(), Failure> {
    let DrainArguments { which, wait } = arguments;
    let (mut ledger, members) = put(which, AdminState::Drain).await?;
    let Some(limit) = *wait else { return Ok(()) };
    let proxies = wait_for(&mut ledger, &members, limit).await?;
    if !which.target.json {
        print(&format!("no session is left on {}\n", show::proxies(proxies)))?;
    }
    Ok(())
}

/// Sets the admin state of the members to `state`, and prints the state that each of them had before.
pub(super) async fn put(
    arguments: &StateArguments,
    state: AdminState,
) -> Result<(Ledger, Vec<BackendId>), Failure> {
    let StateArguments { target, members } = arguments;
    check_count(members.len())?;
    let parse = |text: &String| {
        text.parse::<BackendId>().map_err(|error| Failure::Invalid(format!("{text}: {error}")))
    };
    let members = members.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let Settings { redis, pool } = settings(target)?;
    let mut ledger = Ledger::open(&redis, &pool.weights_key).await?;
    let before = ledger.put(&members, state).await?;
    let text = if target.json {
        let change =
            |(member, before): (&BackendId, &String)| json!({"member": member.as_str(), "before": before});
        let changes: Vec<_> = members.iter().zip(&before).map(change).collect();
        json!({"pool": &*pool.name, "state": state.name(), "members": changes}).to_string() + "\n"
    } else {
        let mut text = String::new();
        for (member, before) in members.iter().zip(&before) {
            let _ = writeln!(text, "{}: {before} -> {state}", escape::printable(member.as_str()));
        }
        text
    };
    print(&text)?;
    Ok((ledger, members))
}

/// Waits until no proxy has a session on `members`, and returns the number of proxies.
async fn wait_for(ledger: &mut Ledger, members: &[BackendId], limit: Duration) -> Result<usize, Failure> {
    let (begun, mut printed) = (Instant::now(), Instant::now());
    loop {
        let (written, asked) = (begun.elapsed(), Instant::now());
        let Reports { live, are_all_in } = ledger.applied().await?;
        // A proxy does not report a backend that has left the table and has no sessions.
        let are_named = |report: &Report| members.iter().all(|member| sessions(report, member).is_some());
        let left = if live.iter().all(are_named) { Left::default() } else { left(ledger, members).await? };
        let busy: Vec<String> =
            live.iter().filter_map(|report| busy(report, members, &left, written)).collect();
        if busy.is_empty() && !live.is_empty() && are_all_in.is_zero() {
            return Ok(live.len());
        }
        let waits = waits_for(&busy, &live);
        if begun.elapsed() >= limit {
            let limit = humantime::format_duration(limit);
            return Err(Failure::NotConverged(format!("in drain, but after {limit}: {waits}")));
        }
        if printed.elapsed() >= PROGRESS_INTERVAL {
            printed = Instant::now();
            crate::cli::print_error(&escape::printable(&waits));
        }
        sleep(wait::rest_after(asked.elapsed(), LOOK).min(limit.saturating_sub(begun.elapsed()))).await;
    }
}

/// The drained backends that are not in the table any more.
#[derive(Debug, Default)]
struct Left {
    members: HashSet<BackendId>,
    /// The hash of the table without them. A proxy reports this hash once it has read the table.
    hash: ContentHash,
}

async fn left(ledger: &mut Ledger, members: &[BackendId]) -> Result<Left, Failure> {
    let seen = ledger.look().await?;
    let table = seen.table.members();
    let has_left = |member: &&BackendId| table.binary_search_by(|(id, _)| id.cmp(member)).is_err();
    Ok(Left { members: members.iter().filter(has_left).cloned().collect(), hash: seen.hash() })
}

fn sessions(report: &Report, member: &BackendId) -> Option<u32> {
    let of_it = report.leaving.iter().find(|(backend, _)| backend == member.as_str());
    of_it.map(|(_, sessions)| *sessions)
}

/// Returns why to wait for the proxy of `report`: it has sessions on `members`, or the number is unknown.
/// `None`: it has no such sessions. `written` is the time since the admin state was written.
fn busy(report: &Report, members: &[BackendId], left: &Left, written: Duration) -> Option<String> {
    let (proxy, mut count) = (&report.proxy, 0);
    for member in members {
        match sessions(report, member) {
            Some(sessions) => count += u64::from(sessions),
            None if report.unnamed > 0 => {
                let named = report.leaving.len();
                return Some(format!(
                    "{proxy} (reports {named} of its {} draining backends)",
                    named + report.unnamed
                ));
            }
            None if left.members.contains(member) && left.hash == report.hash => {}
            None => return Some(format!("{proxy} (has not read it yet)")),
        }
    }
    if count > 0 {
        return Some(format!("{proxy} ({count} {})", if count == 1 { "session" } else { "sessions" }));
    }
    // The report may be older than this drain.
    (report.age + LANDING > written).then(|| format!("{proxy} (its report is too old)"))
}

fn waits_for(busy: &[String], live: &[Report]) -> String {
    if live.is_empty() {
        let cure = "check that one is running, and see its log for whether it may write to Redis";
        return format!("no proxy reports: {cure}");
    }
    if busy.is_empty() {
        let why = "Redis was away or has lost reports, or a proxy has just come back";
        return format!("more proxies may be running: {why}");
    }
    let named = busy.iter().take(MOST_NAMED).cloned().collect::<Vec<_>>().join(", ");
    let more = if busy.len() > MOST_NAMED { ", …" } else { "" };
    format!("waiting for {} of {}: {named}{more}", busy.len(), show::proxies(live.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::weights::ContentHash;

    fn members() -> [BackendId; 2] {
        ["10.0.0.1:80", "10.0.0.2:80"].map(|text| text.parse().expect("an address"))
    }

    fn report(leaving: &[(&str, u32)]) -> Report {
        Report {
            proxy: "a/1/0000".to_owned(),
            hash: ContentHash::default(),
            leaving: leaving.iter().map(|(backend, sessions)| ((*backend).to_owned(), *sessions)).collect(),
            unnamed: 0,
            unusable: None,
            age: Duration::from_secs(1),
        }
    }

    fn waits(report: &Report, left: &Left, written: f64) -> Option<String> {
        let waits = busy(report, &members(), left, Duration::from_secs_f64(written))?;
        Some(waits.strip_prefix("a/1/0000 ").expect("the proxy first").to_owned())
    }

    #[test]
    fn a_proxy_is_done_when_a_later_report_has_no_session_at_any_of_them() {
        let none = report(&[("10.0.0.1:80", 0), ("10.0.0.2:80", 0)]);
        assert_eq!(waits(&none, &Left::default(), 2.0), None);
        let old = waits(&none, &Left::default(), 1.9);
        assert_eq!(old.as_deref(), Some("(its report is too old)"));
        let some = waits(&report(&[("10.0.0.2:80", 3), ("10.0.0.1:80", 4)]), &Left::default(), 9.0);
        assert_eq!(some.as_deref(), Some("(7 sessions)"));
    }

    #[test]
    fn a_backend_that_is_not_reported_is_waited_for_unless_it_has_left_the_table() {
        let one = report(&[("10.0.0.1:80", 0)]);
        let unknown = waits(&one, &Left::default(), 9.0);
        assert_eq!(unknown.as_deref(), Some("(has not read it yet)"));
        let cut = waits(&Report { unnamed: 7, ..one.clone() }, &Left::default(), 9.0);
        assert_eq!(cut.as_deref(), Some("(reports 1 of its 8 draining backends)"));

        let left = Left { members: members()[1..].iter().cloned().collect(), hash: ContentHash::default() };
        assert_eq!(waits(&one, &left, 9.0), None);
        let still = waits(&report(&[("10.0.0.1:80", 0), ("10.0.0.2:80", 1)]), &left, 9.0);
        assert_eq!(still.as_deref(), Some("(1 session)"));
        let other = Left { hash: ContentHash::reported("0".to_owned()), ..left };
        assert_eq!(
            waits(&one, &other, 9.0).as_deref(),
            Some("(has not read it yet)"),
            "the proxy has another table"
        );
    }
}
