//! Reads what proxies have told of the tables that they have applied: for a person who waits for all of
//! them.

use std::time::Duration;

use redis::{FromRedisValue as _, Value};

use super::applied::{LEASE, LEAVING, UNNAMED, command};
use crate::redis::fleet::content::ContentHash;
use crate::redis::fleet::unusable::{self, UnusableReport};
use crate::redis::schema::companion::Companions;

/// A proxy that is alive and reaches Redis has reported again within this time: a renewal, and the time of
/// its way.
const PATIENCE: Duration = Duration::from_secs(6);
/// More than any fleet: so many are read at once.
const MOST_PROXIES: usize = 10_000;

/// What one proxy has applied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Report {
    /// `host/pid/four hex digits`, since a host's name and a pid may both be the same in two containers.
    pub proxy: String,
    /// Of the table in its newest snapshot.
    pub hash: ContentHash,
    /// The backends that it knows to be in drain or maint, and others that have sessions and are to get
    /// none; each with its sessions.
    pub leaving: Vec<(String, u32)>,
    /// How many more there are, each with as few sessions as the last of `leaving`, or fewer.
    pub unnamed: usize,
    /// The backends that get no sessions from it. `None`: an older proxy, which does not say.
    pub unusable: Option<UnusableReport>,
    /// How long ago it was made, by the clock of Redis.
    pub age: Duration,
}

/// What all proxies together have applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reports {
    /// Of the proxies whose lease has not ended, in the order of their names.
    pub live: Vec<Report>,
    /// More than zero after Redis has lost reports, or was away: others may be alive, and will have reported
    /// by then.
    pub are_all_in: Duration,
}

/// Asks who has applied what, by EVAL or EVAL_RO. [`reports`] reads the answer.
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
