//! The answers of `statera weights` in JSON, for a program.

use serde_json::{Value, json};

use super::escape::json_text;
use super::show::{divide, shares, state_of};
use super::unusable::Unusable;
use super::wait::Fleet;
use crate::config::Pool;
use crate::redis::weights::{Change, Changes, Done, Entry, History, Reports, Seen};

/// The answer to `get`.
///
/// `states` are the backends that are not ready; `None`: they could not be read.
pub(super) fn table(
    pool: &Pool,
    seen: &Seen,
    states: Option<&[(String, String)]>,
    reports: &Reports,
) -> String {
    let unusable = Unusable::of(&reports.live);
    let members: Vec<Value> = seen
        .table
        .members()
        .iter()
        .zip(shares(seen, states))
        .map(|((id, weight), share)| {
            let state = states.map(|_| state_of(states, id.as_str()).unwrap_or("ready"));
            let mut member = json!({"member": id.as_str(), "weight": weight.get(), "share_percent": share});
            member["state"] = json!(state);
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

/// The answer to a command that changes a table, with the proxies that use it where `--wait` was given.
pub(super) fn done(pool: &Pool, done: &Done, fleet: Option<&Fleet>) -> String {
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
pub(super) fn history(pool: &str, history: &History) -> String {
    let entries: Vec<Value> = history.entries.iter().map(entry_json).collect();
    let unsaved = history.unsaved.as_ref().map(changes_json);
    json_text(&json!({
        "pool": pool,
        "entries": entries,
        "not_entered": unsaved,
        "left_out": history.left_out,
    }))
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

/// The changes as a list, or their number where the list was too long for the history.
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
