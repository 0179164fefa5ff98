//! Reads which tables all proxies have applied, for a command that waits for them.

use std::time::Duration;

use redis::{FromRedisValue as _, Value};

use super::applied::{LEASE, LEAVING, UNNAMED, command};
use crate::redis::fleet::content::ContentHash;
use crate::redis::fleet::unusable::{self, UnusableReport};
use crate::redis::schema::companion::Companions;

/// The time within which a live proxy that reaches Redis reports again: the pause between two renewals, and
/// the round trip.
const PATIENCE: Duration = Duration::from_secs(6);
/// The most proxies that are read at once, which is more than a fleet has.
const MOST_PROXIES: usize = 10_000;

/// What one proxy has applied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Report {
    /// The proxy: `host/pid/four hex digits`, since two containers may share a host name and a pid.
    pub proxy: String,
    /// The hash of the table in its newest snapshot.
    pub hash: ContentHash,
    /// The backends that are in drain or maint, and others that get no new sessions but still have some;
    /// each with its number of sessions.
    pub leaving: Vec<(String, u32)>,
    /// The number of draining backends that are not in `leaving`. Each of them has at most as many sessions
    /// as the last entry of `leaving`.
    pub unnamed: usize,
    /// The backends that get no sessions from this proxy. `None` if an older version of Statera reported.
    pub unusable: Option<UnusableReport>,
    /// How long ago the report was made, by the clock of Redis.
    pub age: Duration,
}

/// What all proxies together have applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reports {
    /// The proxies whose lease has not ended, in the order of their names.
    pub live: Vec<Report>,
    /// The time until all live proxies have reported. It is more than zero if Redis has lost reports or was
    /// away: proxies that are not in `live` may then be alive.
    pub are_all_in: Duration,
}

/// Returns the command that asks which table each proxy has applied; `eval` is EVAL or EVAL_RO. [`reports`]
/// reads the answer.
pub(in crate::redis) fn question(eval: &str, companions: &Companions) -> redis::Cmd {
    let mut question = command(eval, &companions.applied);
    question.arg("live").arg(MOST_PROXIES).arg(LEASE.as_millis() as u64).arg(PATIENCE.as_millis() as u64);
    question
}

pub(in crate::redis) fn reports(answer: Vec<Value>) -> Reports {
    let mut answer = answer.into_iter();
    let wait = answer.next().and_then(|wait| u64::from_redis_value(wait).ok());
    let mut texts = answer.map(|value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    });
    let mut live = Vec::new();
    while let (Some(proxy), Some(content), Some(age)) = (texts.next(), texts.next(), texts.next()) {
        let mut parts = content.split(LEAVING);
        let hash = ContentHash::reported(parts.next().unwrap_or_default().to_owned());
        let (mut leaving, mut unnamed, mut unusable) = (Vec::new(), 0, None);
        for part in parts {
            if unusable::take(&mut unusable, part) {
                continue;
            }
            if let Some(count) = part.strip_prefix(UNNAMED).and_then(|count| count.parse().ok()) {
                unnamed = count;
            } else if let Some((backend, sessions)) = part.rsplit_once('=')
                && let Ok(sessions) = sessions.parse()
            {
                leaving.push((backend.to_owned(), sessions));
            }
        }
        let age = age.parse().map_or(Duration::ZERO, Duration::from_millis);
        live.push(Report { proxy, hash, leaving, unnamed, unusable, age });
    }
    live.sort();
    Reports { live, are_all_in: wait.map_or(PATIENCE, Duration::from_millis) }
}
