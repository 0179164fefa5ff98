//! The answers of `statera weights` as lines for a person. `json.rs` has them for a program.

use std::fmt::Write as _;

use super::escape::word;
use super::unusable::Unusable;
use crate::config::{OnEmpty, Pool};
use crate::redis::weights::{Change, Changes, ContentHash, Done, Entry, History, Report, Reports, Seen};

/// How many changes of an entry or answer are shown. JSON has all of them.
const MOST_CHANGES_SHOWN: usize = 20;
/// The answer to `get`.
///
/// `states` are the backends that are not ready; `None`: they could not be read.
pub(super) fn table(
    pool: &Pool,
    seen: &Seen,
    states: Option<&[(String, String)]>,
    reports: &Reports,
) -> String {
    let mut text = format!("pool {}, key {}, version {}\n", pool.name, word(&pool.weights_key), seen.version);
    match &seen.newest {
        Some(entry) => text += &format!("last change: {}\n", headline(entry)),
        None if seen.version == 0 => text += "no command has changed it yet\n",
        None => {}
    }
    if seen.newest.is_some() && seen.outside.count > 0 {
        text += &format!("{} changed by another program since then:\n", members(seen.outside.count));
        text += &lines(&seen.outside);
    }
    if !reports.live.is_empty() {
        let (have, have_not) = divide(&reports.live, &seen.hash());
        text += &if have_not.is_empty() {
            format!("applied by {}", proxies(have.len()))
        } else {
            let names: Vec<String> =
                have_not.iter().take(MOST_CHANGES_SHOWN).map(|name| word(name)).collect();
            let more = if have_not.len() > names.len() { ", …" } else { "" };
            format!(
                "applied by {} of {}, not by {}{more}",
                have.len(),
                proxies(reports.live.len()),
                names.join(", ")
            )
        };
        if !reports.are_all_in.is_zero() {
            text +=
                "; more may be running: Redis was away or has lost reports, or a proxy has just come back";
        }
        text.push('\n');
    }
    let unusable = Unusable::of(&reports.live);
    text += &unusable.head();
    text.push('\n');
    if seen.table.is_empty() && seen.left_out.is_empty() {
        return text + "the table is empty\n";
    }
    let width =
        seen.table.members().iter().map(|(id, _)| id.as_str().chars().count()).max().unwrap_or(0).max(6);
    let _ = writeln!(text, "{:width$}  {:>12}  {:>7}", "MEMBER", "WEIGHT", "SHARE");
    for ((id, weight), share) in seen.table.members().iter().zip(shares(seen, states)) {
        let (id, state) = (id.as_str(), state_of(states, id.as_str()));
        let gets_none = unusable.text(id, weight.is_zero(), state);
        let (weight, state) =
            (weight.to_string(), state.map(|state| format!("  {state}")).unwrap_or_default());
        let _ = writeln!(text, "{id:width$}  {weight:>12}  {share:>5.1} %{state}{gets_none}");
    }
    let is_member = |name: &str| seen.table.members().iter().any(|(id, _)| id.as_str() == name);
    for (name, state) in states.unwrap_or_default().iter().filter(|(name, _)| !is_member(name)) {
        let _ = writeln!(text, "not in the table: {name}  {state}");
    }
    for left_out in &seen.left_out {
        let _ = writeln!(text, "ignored by proxies: {}: {}", left_out.member, left_out.reason);
    }
    text
}

/// Returns the admin state of a member; `None` if the member is ready or its state is unknown.
pub(super) fn state_of<'a>(states: Option<&'a [(String, String)]>, member: &str) -> Option<&'a str> {
    let states = states?;
    let position = states.binary_search_by(|(name, _)| name.as_str().cmp(member)).ok()?;
    Some(states[position].1.as_str()).filter(|state| *state != "ready")
}

/// Returns the share of each member in percent, which is 0 for members in drain or maint. Weights are
/// divided by the largest one, so that the sum of huge weights stays finite.
pub(super) fn shares(seen: &Seen, states: Option<&[(String, String)]>) -> impl Iterator<Item = f64> {
    let weights = || {
        seen.table.members().iter().map(move |(id, weight)| {
            let is_out = matches!(state_of(states, id.as_str()), Some("drain" | "maint"));
            if is_out { 0.0 } else { weight.get() }
        })
    };
    let largest = weights().fold(0.0, f64::max);
    let part = move |weight: f64| if largest > 0.0 { weight / largest } else { 0.0 };
    let total: f64 = weights().map(part).sum();
    weights().map(move |weight| if total > 0.0 { part(weight) / total * 100.0 } else { 0.0 })
}

pub(super) fn divide<'a>(reports: &'a [Report], hash: &ContentHash) -> (Vec<&'a str>, Vec<&'a str>) {
    let (have, have_not): (Vec<&Report>, Vec<&Report>) = reports.iter().partition(|r| r.hash == *hash);
    let names = |reports: Vec<&'a Report>| reports.into_iter().map(|report| report.proxy.as_str()).collect();
    (names(have), names(have_not))
}

/// The answer to a command that changes a table.
pub(super) fn done(pool: &Pool, done: &Done, on_empty: OnEmpty) -> String {
    let mut text = String::new();
    if done.outside > 0 {
        text += &format!("another program had changed {} before: see the history\n", members(done.outside));
    }
    if done.passed_over > 0 {
        text += &format!(
            "{} not changed: the name is too long for a backend, and the history does not keep such names\n",
            members(done.passed_over)
        );
    }
    if done.version == done.before {
        return text + &format!("{}: nothing to change, this is still version {}\n", pool.name, done.version);
    }
    let back =
        done.back_to.map(|version| format!(", the same table as version {version}")).unwrap_or_default();
    text += &format!("{}: version {}{back}\n{}", pool.name, done.version, lines(&done.changes));
    if done.table.is_empty() {
        text += match on_empty {
            OnEmpty::KeepLast => {
                "the table is empty: proxies keep using the last one (redis.on_empty: keep_last)\n"
            }
            OnEmpty::Refuse => "the table is empty: proxies refuse sessions (redis.on_empty: refuse)\n",
        };
    }
    text
}

/// The answer to `history`.
pub(super) fn history(history: &History) -> String {
    let mut text = String::new();
    if let Some(changes) = &history.unsaved {
        text += &format!(
            "not in the history yet, since this Redis user may not write: changed by another program\n{}",
            lines(changes)
        );
    }
    for entry in &history.entries {
        text += &format!("{}\n{}", headline(entry), lines(&entry.changes));
    }
    match history.left_out {
        0 if text.is_empty() => text = "nothing has changed yet\n".to_owned(),
        0 => {}
        1 => text += "not shown: 1 entry that statera did not write\n",
        count => text += &format!("not shown: {count} entries that statera did not write\n"),
    }
    text
}

/// `version 7  2026-01-02T03:04:05Z  jo@edge-1  set: why`
fn headline(entry: &Entry) -> String {
    let when = entry.when.map_or_else(
        || "at an unknown time".to_owned(),
        |when| humantime::format_rfc3339_seconds(when).to_string(),
    );
    if entry.what == "outside" {
        return format!("version {}  noticed {when}  changed by another program", entry.version);
    }
    let back = entry.back_to.map(|version| format!(" to version {version}")).unwrap_or_default();
    let why = if entry.why.is_empty() { String::new() } else { format!(": {}", word(&entry.why)) };
    format!("version {}  {when}  {}  {}{back}{why}", entry.version, word(&entry.who), word(&entry.what))
}

fn lines(changes: &Changes) -> String {
    let mut text = String::new();
    let shown = changes.kept.iter().take(MOST_CHANGES_SHOWN);
    let width = shown.clone().map(|change| name(change).chars().count()).max().unwrap_or(0);
    for change in shown.clone() {
        let member = name(change);
        let _ = match (change.old.as_deref().map(word), change.new.as_deref().map(word)) {
            (Some(old), Some(new)) => writeln!(text, "    {member:width$}  {old} -> {new}"),
            (None, Some(new)) => writeln!(text, "    {member:width$}  new, {new}"),
            (Some(old), None) => writeln!(text, "    {member:width$}  {old}, removed"),
            (None, None) => Ok(()),
        };
    }
    let more = changes.count.saturating_sub(shown.count() as u64);
    if more > 0 {
        let _ = writeln!(text, "    and {} more", members(more));
    }
    text
}

fn name(Change { member, bytes, .. }: &Change) -> String {
    match bytes {
        Some(bytes) => format!("{}… ({bytes} bytes)", word(member)),
        None => word(member),
    }
}

fn members(count: u64) -> String {
    format!("{count} {}", if count == 1 { "member" } else { "members" })
}

/// `3 proxies have`.
pub(super) fn proxies_have(count: usize) -> String {
    format!("{} {}", proxies(count), if count == 1 { "has" } else { "have" })
}

/// `3 proxies`.
pub(super) fn proxies(count: usize) -> String {
    format!("{count} {}", if count == 1 { "proxy" } else { "proxies" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A column wider than 65,535 characters cannot be formatted.
    #[test]
    fn a_member_of_any_length_is_shown_and_shortened() {
        let member = "z".repeat(70_000);
        let change = Change { member, bytes: None, old: None, new: Some("7".to_owned()) };
        let text = lines(&Changes { count: 1, kept: vec![change] });
        assert!(text.contains("z… (70000 bytes)") && text.len() < 400, "{} bytes", text.len());
    }
}
