//! Reads what `weights.lua` answers, and the entries of the history. Any client of Redis may have written
//! these: their texts are not trusted, and not fit for a terminal.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis::{FromRedisValue as _, Value};

use super::limits::{MOST_CHANGES, MOST_CHANGES_BYTES};
use super::refusal::{WeightsError, of_script};
use crate::balance::Table;
use crate::redis::fleet::content::ContentHash;
use crate::redis::schema::decode;

/// The change of one member. Weights are texts, since they need not be valid (`inf`). A weight of `None`:
/// the member was not, or is not, in the table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The member's name. Bytes that are not UTF-8 are replaced.
    pub member: String,
    /// The length of the name, where it is too long for a backend: then `member` is the beginning of the
    /// name.
    pub bytes: Option<u64>,
    /// The weight before.
    pub old: Option<String>,
    /// The weight after.
    pub new: Option<String>,
}

/// All changes that were made at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The number of members that changed.
    pub count: u64,
    /// The changes in the order of the names. Empty where there are more than are kept.
    pub kept: Vec<Change>,
}

/// A member that is not a valid backend. Its texts are fit for a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name, shortened.
    pub member: String,
    /// Why it is left out.
    pub reason: String,
}

/// The current table.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The table's version. 0 before the first command.
    pub version: u64,
    /// The members that proxies use.
    pub table: Table,
    /// The members that proxies leave out.
    pub left_out: Vec<LeftOut>,
    /// Changes by other programs since the newest entry.
    pub outside: Changes,
    /// The newest entry of the history.
    pub newest: Option<Entry>,
}

/// The result of a command.
#[derive(Clone, Debug)]
pub struct Done {
    /// The version before.
    pub before: u64,
    /// The version now, which is the same if there was nothing to change.
    pub version: u64,
    /// The table now.
    pub table: Table,
    /// The changes of this command.
    pub changes: Changes,
    /// Members that other programs had changed before. Their changes are in the history now.
    pub outside: u64,
    /// The version that a rollback has brought back.
    pub back_to: Option<u64>,
    /// Members that still differ from the version `back_to`, since their names are too long for a backend.
    pub passed_over: u64,
}

/// One entry of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The version that the change led to. For an outside change, the version at which it was noticed.
    pub version: u64,
    /// `set`, `remove`, `rollback` or `outside`.
    pub what: String,
    /// The version that a rollback has brought back.
    pub back_to: Option<u64>,
    /// The time by the server's clock. `None` where the entry has no valid one.
    pub when: Option<SystemTime>,
    /// The author. Empty for an outside change.
    pub who: String,
    /// The reason that was given. May be empty.
    pub why: String,
    /// The changes of this entry.
    pub changes: Changes,
    /// The hash of the table after the change.
    pub hash: String,
}

/// The history of a table.
#[derive(Clone, Debug)]
pub struct History {
    /// The entries, newest first.
    pub entries: Vec<Entry>,
    /// The number of entries that were read and that statera did not write. They are not among `entries`.
    pub left_out: usize,
    /// Changes by other programs that could not be entered: this user lacks a right, or Redis refused it.
    pub unsaved: Option<Changes>,
}

impl Seen {
    /// The hash that a proxy reports once it has applied this table.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        hash(&self.table)
    }
}

impl Done {
    /// The hash that a proxy reports once it has applied this table.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        hash(&self.table)
    }
}

fn hash(table: &Table) -> ContentHash {
    ContentHash::of(table.members().iter().map(|(id, weight)| (id.as_str(), *weight)))
}

pub(super) fn seen(answer: Vec<Value>, key: &str) -> Result<Seen, WeightsError> {
    let mut answer = Answer(answer.into_iter());
    match answer.text().as_str() {
        "seen" => {}
        other => return Err(failure(other, &mut answer, key, None)),
    }
    let version = answer.number();
    let decoded = decode::table(answer.value()).map_err(|error| malformed(&error))?;
    let left_out = decoded.rejected.into_iter();
    Ok(Seen {
        version,
        table: decoded.table,
        left_out: left_out.map(|r| LeftOut { member: r.member, reason: r.reason.to_string() }).collect(),
        outside: changes(&answer.text(), answer.number()),
        newest: entry(answer.value()),
    })
}

pub(super) fn done(answer: Vec<Value>, key: &str, expected: Option<u64>) -> Result<Done, WeightsError> {
    let mut answer = Answer(answer.into_iter());
    match answer.text().as_str() {
        "done" => {}
        other => return Err(failure(other, &mut answer, key, expected)),
    }
    let (before, version) = (answer.number(), answer.number());
    let decoded = decode::table(answer.value()).map_err(|error| malformed(&error))?;
    Ok(Done {
        before,
        version,
        table: decoded.table,
        changes: changes(&answer.text(), answer.number()),
        outside: answer.number(),
        back_to: u64::from_redis_value(answer.value()).ok(),
        passed_over: answer.number(),
    })
}

fn failure(outcome: &str, answer: &mut Answer, key: &str, expected: Option<u64>) -> WeightsError {
    let version = answer.number();
    WeightsError::Refused(match outcome {
        "refused" => return of_script(key, &answer.text(), &answer.text(), &answer.text()),
        "conflict" => format!(
            "{key} is at version {version}, not at {}: nothing was changed",
            expected.map(|version| version.to_string()).unwrap_or_default()
        ),
        "missing" => {
            let members: Vec<Value> = Vec::from_redis_value(answer.value()).unwrap_or_default();
            let names: Vec<String> = members.iter().take(10).map(printable).collect();
            let more = if members.len() > names.len() { ", …" } else { "" };
            format!("{key} has no member {}{more}: nothing was changed", names.join(", "))
        }
        "no_such_version" if version == 0 => {
            format!("no command has changed {key} yet: there is no version to go back to")
        }
        "no_such_version" => format!("{key} has no such version: the newest is {version}"),
        "forgotten" => {
            let oldest = answer.number().saturating_sub(1);
            let wanted = answer.number();
            format!(
                "version {wanted} of {key} is not in the history any more: the oldest to go back to is \
                 {oldest}"
            )
        }
        "too_far" => {
            let oldest = answer.number().saturating_sub(1);
            format!("{key} cannot go back that far at once: go back to version {oldest} first")
        }
        "too_large" => {
            let at = answer.number();
            format!(
                "{key} cannot go back behind a change at version {at} that is not kept: it was too large, \
                 or the key beside the table that \
                 tells what was before it was lost"
            )
        }
        _ => "redis answered the script with something unknown".to_owned(),
    })
}

fn malformed(error: &decode::Malformed) -> WeightsError {
    WeightsError::Refused(error.to_string())
}

fn printable(value: &Value) -> String {
    match value {
        Value::BulkString(bytes) => decode::printable(bytes),
        _ => String::new(),
    }
}

/// Returns the id of a stream's entry.
pub(super) fn id(entry: &Value) -> Option<String> {
    let Value::Array(parts) = entry else { return None };
    parts.first().cloned().map(text)
}

/// Reads a stream's entry. Returns `None` where statera did not write it.
pub(super) fn entry(value: Value) -> Option<Entry> {
    let Value::Array(parts) = value else { return None };
    let [id, fields] = <[Value; 2]>::try_from(parts).ok()?;
    let (id, Value::Array(fields)) = (text(id), fields) else { return None };
    let mut named = std::collections::HashMap::new();
    let mut fields = fields.into_iter();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        named.insert(text(name), text(value));
    }
    let mut take = |name: &str| named.remove(name).unwrap_or_default();
    Some(Entry {
        version: take("version").parse().ok()?,
        what: take("what"),
        back_to: take("back_to").parse().ok(),
        when: time_of(&id),
        who: take("who"),
        why: take("why"),
        changes: changes(&take("changes"), take("count").parse().unwrap_or_default()),
        hash: take("hash"),
    })
}

/// Returns the time in an entry's id, whose first part is the server's time in milliseconds.
fn time_of(id: &str) -> Option<SystemTime> {
    /// The end of the year 9999: a later time has no common format.
    const LAST: u64 = 253_402_300_799_999;
    let millis = id.split_once('-')?.0.parse().ok().filter(|millis| *millis <= LAST)?;
    UNIX_EPOCH.checked_add(Duration::from_millis(millis))
}

fn changes(json: &str, count: u64) -> Changes {
    /// The member and its weights. Where the name is shortened, also its length.
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Written {
        Whole(String, Option<String>, Option<String>),
        Shortened(String, Option<String>, Option<String>, u64),
    }
    let mut written: Vec<Written> = match json.len() {
        ..=MOST_CHANGES_BYTES => serde_json::from_str(json).unwrap_or_default(),
        _ => Vec::new(),
    };
    if written.len() > MOST_CHANGES {
        // Statera did not write it.
        written = Vec::new();
    }
    // Redis before 7.2 writes 0.1 as 0.10000000000000001.
    let weight = |text: String| text.parse::<f64>().map_or(text, |number| number.to_string());
    let change = |written| {
        let (member, bytes, old, new) = match written {
            Written::Whole(member, old, new) => (member, None, old, new),
            Written::Shortened(member, old, new, bytes) => (member, Some(bytes), old, new),
        };
        Change { member, bytes, old: old.map(weight), new: new.map(weight) }
    };
    let mut kept: Vec<Change> = written.into_iter().map(change).collect();
    kept.sort();
    Changes { count, kept }
}

fn text(value: Value) -> String {
    match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Value::SimpleString(text) => text,
        _ => String::new(),
    }
}

/// The values of the script's answer, in their order. A value that is missing, or of another kind, reads as
/// empty.
struct Answer(std::vec::IntoIter<Value>);

impl Answer {
    fn value(&mut self) -> Value {
        self.0.next().unwrap_or(Value::Nil)
    }

    fn text(&mut self) -> String {
        text(self.value())
    }

    fn number(&mut self) -> u64 {
        u64::from_redis_value(self.value()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn an_entry_with_any_content_is_read_or_left_out_and_never_panics() {
        let entry_of = |id: &str, fields: &[&str]| {
            entry(Value::Array(vec![bulk(id), Value::Array(fields.iter().map(|f| bulk(f)).collect())]))
        };
        let good = entry_of(
            "1000-0",
            &["version", "3", "what", "set", "count", "1", "changes", "[[\"a:1\",null,\"5\"]]"],
        );
        let good = good.expect("it is whole");
        assert_eq!(good.when, Some(UNIX_EPOCH + Duration::from_secs(1)));
        assert_eq!(
            good.changes.kept,
            [Change { member: "a:1".into(), bytes: None, old: None, new: Some("5".into()) }]
        );

        assert_eq!(entry_of("1-0", &["version", "-1"]), None);
        assert_eq!(entry_of("1-0", &["version"]), None);
        assert_eq!(entry(Value::Nil), None);
        let late = entry_of("18446744073709551615-0", &["version", "1", "changes", "{[", "count", "x"]);
        let late = late.expect("it has a version");
        assert_eq!((late.when, late.changes), (None, Changes::default()));
    }
}
