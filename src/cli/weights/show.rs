//! How the answers of `statera weights` read: as lines for a person, as JSON for a program. Both are safe for a terminal,
//! whatever stands in Redis.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::unusable::Unusable;
use super::wait::Fleet;
use crate::config::{OnEmpty, Pool};
use crate::redis::weights::{Change, Changes, ContentHash, Done, Entry, History, Report, Reports, Seen};

/// Of one entry or answer; JSON has them all.
const MOST_CHANGES_SHOWN: usize = 20;
/// Characters: a host name has 253 at most, and what is longer is no backend.
const LONGEST_WORD: usize = 300;

/// What does not print as itself is written as its escape.
pub(super) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '"' | '\'' | '\\' | '\n') {
            safe.push(character);
        } else {
            safe.extend(character.escape_debug());
        }
    }
    safe
}

/// The same on one line.
pub(super) fn word(text: &str) -> String {
    let mut word = printable(text).replace('\n', "\\n");
    if let Some((end, _)) = word.char_indices().nth(LONGEST_WORD) {
        word.truncate(end);
        let _ = write!(word, "… ({} bytes)", text.len());
    }
    word
}

/// JSON, with \u escapes for what a terminal might act on (C1 controls, text that runs backwards): those characters stand
/// in texts only.
pub(super) fn json_text(value: &Value) -> String {
    let mut safe = String::new();
    for character in value.to_string().chars() {
        if character.is_ascii() && character != '\x7f' || character.escape_debug().count() == 1 {
            safe.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                safe += &format!("\\u{unit:04x}");
            }
        }
    }
    safe + "\n"
}

/// The answer to `get`.
///
/// `states` are the backends that are not ready; `None`: they could not be read.
pub(super) fn table(
    pool: &Pool,
    seen: &Seen,
    states: Option<&[(String, String)]>,
    reports: &Reports,
    as_json: bool,
) -> String {
    if as_json { table_json(pool, seen, states, reports) } else { table_text(pool, seen, states, reports) }
}

fn table_text(pool: &Pool, seen: &Seen, states: Option<&[(String, String)]>, reports: &Reports) -> String {
    let mut text = format!("pool {}, key {}, version {}\n", pool.name, word(&pool.weights_key), seen.version);
    match &seen.newest {
        Some(entry) => text += &format!("last change: {}\n", headline(entry)),
        None if seen.version == 0 => text += "no command has changed it yet\n",
        None => {}
    }
    if seen.newest.is_some() && seen.outside.count > 0 {
        text += &format!("{} changed since by another program:\n", members(seen.outside.count));
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
            text += "; redis was away, has lost reports or one has just come back: others may be alive";
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
        let _ = writeln!(text, "no member: {name}  {state}");
    }
    for left_out in &seen.left_out {
        let _ = writeln!(text, "left out: {}: {}", left_out.member, left_out.reason);
    }
    text
}

fn table_json(pool: &Pool, seen: &Seen, states: Option<&[(String, String)]>, reports: &Reports) -> String {
    let unusable = Unusable::of(&reports.live);
    let members: Vec<Value> = seen
        .table
        .members()
        .iter()
        .zip(shares(seen, states))
        .map(|((id, weight), share)| {
            let state = states.map(|_| state_of(states, id.as_str()).unwrap_or("ready"));
            let mut member =
                json!({"member": id.as_str(), "weight": weight.get(), "share_percent": share, "state": state});
            if let Some(gets_none) = unusable.json(id.as_str()) {
                member["unusable"] = gets_none;
            }
            member
        })
        .collect();
    let left_out: Vec<Value> = seen
        .left_out
        .iter()
        .map(|left_out| json!({"member": left_out.member, "reason": left_out.reason}))
        .collect();
    let (have, have_not) = divide(&reports.live, &seen.hash());
    json_text(&json!({
        "pool": &*pool.name,
        "key": pool.weights_key,
        "version": seen.version,
        "hash": seen.hash().to_string(),
        "last_change": seen.newest.as_ref().map(entry_json),
        "changed_outside": changes_json(&seen.outside),
        "members": members,
        "left_out": left_out,
        "applied": {"have": have, "have_not": have_not, "are_all": reports.are_all_in.is_zero()},
        "reported": unusable.head_json(),
    }))
}

/// Of whoever is not ready.
fn state_of<'a>(states: Option<&'a [(String, String)]>, member: &str) -> Option<&'a str> {
    let states = states?;
    let place = states.binary_search_by(|(name, _)| name.as_str().cmp(member)).ok()?;
    Some(states[place].1.as_str()).filter(|state| *state != "ready")
}

/// In percent, of those that are ready. Dividing by the largest keeps the sum of huge weights finite.
fn shares(seen: &Seen, states: Option<&[(String, String)]>) -> impl Iterator<Item = f64> {
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

fn divide<'a>(reports: &'a [Report], hash: &ContentHash) -> (Vec<&'a str>, Vec<&'a str>) {
    let (have, have_not): (Vec<&Report>, Vec<&Report>) = reports.iter().partition(|r| r.hash == *hash);
    let names = |reports: Vec<&'a Report>| reports.into_iter().map(|report| report.proxy.as_str()).collect();
    (names(have), names(have_not))
}

/// The answer to what changes a table.
pub(super) fn done(pool: &Pool, done: &Done, on_empty: OnEmpty) -> String {
    let mut text = String::new();
    if done.outside > 0 {
        text +=
            &format!("{} had been changed by another program: the history tells\n", members(done.outside));
    }
    if done.passed_over > 0 {
        text += &format!(
            "{} left alone: a name too long for a backend is not kept, so there is no way back for it\n",
            members(done.passed_over)
        );
    }
    if done.version == done.before {
        return text + &format!("{}: nothing to change, version {} stays\n", pool.name, done.version);
    }
    let back = done.back_to.map(|version| format!(", version {version} again")).unwrap_or_default();
    text += &format!("{}: version {}{back}\n{}", pool.name, done.version, lines(&done.changes));
    if done.table.is_empty() {
        text += match on_empty {
            OnEmpty::KeepLast => {
                "the table is empty: proxies go on with the last one (redis.on_empty: keep_last)\n"
            }
            OnEmpty::Refuse => "the table is empty: proxies refuse sessions (redis.on_empty: refuse)\n",
        };
    }
    text
}

/// The same in JSON, with who has applied it where that was waited for.
pub(super) fn done_json(pool: &Pool, done: &Done, fleet: Option<&Fleet>) -> String {
    json_text(&json!({
        "pool": &*pool.name,
        "key": pool.weights_key,
        "version": done.version,
        "version_before": done.before,
        "back_to": done.back_to,
        "hash": done.hash().to_string(),
        "changes": changes_json(&done.changes),
        "changed_outside": done.outside,
        "left_alone": done.passed_over,
        "applied": fleet.map(|fleet| {
            json!({"have": fleet.have, "have_not": fleet.have_not, "are_all": fleet.are_all_in.is_zero()})
        }),
    }))
}

/// The answer to `history`.
pub(super) fn history(pool: &str, history: &History, as_json: bool) -> String {
    if as_json {
        let entries: Vec<Value> = history.entries.iter().map(entry_json).collect();
        let unsaved = history.unsaved.as_ref().map(changes_json);
        return json_text(&json!({
            "pool": pool,
            "entries": entries,
            "not_entered": unsaved,
            "left_out": history.left_out,
        }));
    }
    let mut text = String::new();
    if let Some(changes) = &history.unsaved {
        text += &format!(
            "now, by another program, not entered since this user may not write\n{}",
            lines(changes)
        );
    }
    for entry in &history.entries {
        text += &format!("{}\n{}", headline(entry), lines(&entry.changes));
    }
    match history.left_out {
        0 if text.is_empty() => text = "nothing has changed yet\n".to_owned(),
        0 => {}
        1 => text += "left out: 1 entry that statera did not write\n",
        count => text += &format!("left out: {count} entries that statera did not write\n"),
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

fn entry_json(entry: &Entry) -> Value {
    json!({
        "version": entry.version,
        "what": entry.what,
        "back_to": entry.back_to,
        "time": entry.when.map(|when| humantime::format_rfc3339_millis(when).to_string()),
        "who": entry.who,
        "why": entry.why,
        "changes": changes_json(&entry.changes),
        "hash": entry.hash,
    })
}

/// A list, or its length where it was too long to be kept.
fn changes_json(changes: &Changes) -> Value {
    if changes.kept.is_empty() && changes.count > 0 {
        return json!({"count": changes.count});
    }
    let change_json = |change: &Change| {
        let mut json = json!({"member": change.member, "old": change.old, "new": change.new});
        if let Some(bytes) = change.bytes {
            json["member_bytes"] = json!(bytes);
        }
        json
    };
    changes.kept.iter().map(change_json).collect()
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

    #[test]
    fn nothing_that_stands_in_redis_reaches_a_terminal_raw() {
        let hostile = "a\x1b[2J\u{9b}31m\u{202e}\x7f\n\t";
        for text in [word(hostile), json_text(&json!({ hostile: hostile }))] {
            let raw = text.trim_end().chars().find(|c| c.is_control() || *c == '\u{202e}');
            assert_eq!(raw, None, "{text:?}");
        }
        let back: Value = serde_json::from_str(&json_text(&json!([hostile, "ü\u{1f600}"]))).expect("JSON");
        assert_eq!(back, json!([hostile, "ü\u{1f600}"]), "it still says the same");
    }

    /// A column wider than 65,535 characters cannot be formatted.
    #[test]
    fn a_member_of_any_length_is_shown_and_shortened() {
        let member = "z".repeat(70_000);
        let change = Change { member, bytes: None, old: None, new: Some("7".to_owned()) };
        let text = lines(&Changes { count: 1, kept: vec![change] });
        assert!(text.contains("z… (70000 bytes)") && text.len() < 400, "{} bytes", text.len());
    }
}
