//! Reads the admin states beside a table: `{servers}:states`, a hash of backends that are not ready.
//!
//! They are read right after the weights, in the same turn, so that they are never older than these.
//! Whatever is wrong with them is no reason to leave the weights: the last states hold, and what is wrong is
//! said once.

use std::time::Duration;

use redis::Value;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::balance::cell::Cell;
use crate::balance::{AdminState, BackendId};
use crate::control::log_limiter::LogLimiter;
use crate::redis::schema::companion::Companions;
use crate::redis::schema::decode::printable;
use crate::redis::schema::followed::Followed;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// As many as a table may have members.
const MAX_STATES: i64 = 100_000;
/// After an answer that was too large to be taken in, which ends the connection.
const REST_AFTER_TOO_LARGE: Duration = Duration::from_secs(30);
/// Fields named in one report.
const MOST_NAMED: usize = 10;
/// Reports of fields left out in one window.
const MOST_REPORTS: u32 = 1;
/// Lines in one window that say how the key can be read.
const MOST_STATES: u32 = 4;

/// What is known of one pool's states.
#[derive(Clone, Debug)]
pub(in crate::redis) struct States {
    /// Backends that are not ready. `None`: they were not read yet.
    written: Option<Vec<(BackendId, AdminState)>>,
    /// What was last said to be wrong with the key, and with fields of it.
    said: Option<String>,
    states: LogLimiter,
    left_out: Option<String>,
    reports: LogLimiter,
    /// What was wrong when it was last read, whether or not it was said.
    last_wrong: Option<String>,
    rests_until: Option<Instant>,
    /// Connections in a row that ended when it was read.
    cut_offs: u32,
}

/// A reading. The inner error is one that leaves the weights alone.
pub(in crate::redis) type Read = Result<Result<Written, Wrong>, RedisError>;

/// What is written.
#[derive(Debug, Default, PartialEq)]
pub(in crate::redis) struct Written {
    states: Vec<(BackendId, AdminState)>,
    /// Fields that are no backend, and values that are no state: how many, and some of them.
    left_out: Option<String>,
}

/// Why the last states hold.
#[derive(Debug)]
pub(in crate::redis) enum Wrong {
    /// For a person.
    Told(String),
    /// The node is not the one that has them just now.
    Elsewhere,
}

impl States {
    pub(in crate::redis) fn new() -> Self {
        Self {
            written: None,
            said: None,
            states: LogLimiter::new(MOST_STATES),
            left_out: None,
            reports: LogLimiter::new(MOST_REPORTS),
            last_wrong: None,
            rests_until: None,
            cut_offs: 0,
        }
    }

    /// What the table of `cell` goes by: what was read last, or else what it began with.
    pub(in crate::redis) fn known(&self, cell: &Cell) -> Vec<(BackendId, AdminState)> {
        self.written.clone().unwrap_or_else(|| cell.states())
    }

    /// True while the key is left alone.
    pub(in crate::redis) fn rest(&self) -> bool {
        self.rests_until.is_some_and(|until| until > Instant::now())
    }

    /// Takes a reading in. `is_alone`: nothing but this pool was asked for at the same time. Returns whether
    /// the key holds something else than when it was last read.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(in crate::redis) fn take(
        &mut self,
        followed: &Followed,
        read: Read,
        is_alone: bool,
    ) -> Result<bool, RedisError> {
        let is_news = self.is_news(&read);
        let wrong = match read {
            Ok(Ok(written)) => {
                self.cut_offs = 0;
                self.written = Some(written.states);
                self.report(followed, written.left_out);
                None
            }
            Ok(Err(Wrong::Elsewhere)) => return Ok(false),
            Ok(Err(Wrong::Told(text))) => Some(text),
            // Another pool's answer may have ended the connection.
            Err(error) if !is_alone => return Err(error),
            Err(error) => {
                // The table had come. Once, Redis may have ended; twice, it is what it would have sent.
                self.cut_offs += 1;
                if error.is_too_large() || self.cut_offs > 1 {
                    self.rests_until = Some(Instant::now() + REST_AFTER_TOO_LARGE);
                    self.say(
                        followed,
                        Some(format!(
                            "the connection ends when it is asked for ({error}): delete what is too large"
                        )),
                    );
                }
                return Err(error);
            }
        };
        self.say(followed, wrong);
        Ok(is_news)
    }

    fn is_news(&mut self, read: &Read) -> bool {
        let (is_same, wrong) = match read {
            Ok(Ok(written)) => (self.written.as_ref() == Some(&written.states), &written.left_out),
            Ok(Err(Wrong::Told(text))) => (true, &Some(text.clone())),
            Ok(Err(Wrong::Elsewhere)) | Err(_) => return false,
        };
        let is_same = is_same && self.last_wrong == *wrong;
        self.last_wrong.clone_from(wrong);
        !is_same
    }

    fn report(&mut self, followed: &Followed, left_out: Option<String>) {
        if self.left_out == left_out {
            return;
        }
        if let Some(fields) = &left_out {
            let Some(held_back) = self.reports.permit(Instant::now()) else { return };
            let (pool, key) = (&followed.pool, Companions::of(&followed.key).states);
            warn!(pool = %pool, key, fields, held_back, "what names no backend, or neither drain nor maint, is left out");
        }
        self.left_out = left_out;
    }

    fn say(&mut self, followed: &Followed, wrong: Option<String>) {
        if self.said == wrong {
            return;
        }
        let Some(held_back) = self.states.permit(Instant::now()) else { return };
        let (pool, key) = (&followed.pool, Companions::of(&followed.key).states);
        match &wrong {
            Some(reason) => {
                warn!(pool = %pool, key, reason, held_back, "cannot read who is in drain or maint, going on with what was known")
            }
            None => info!(pool = %pool, key, held_back, "who is in drain or maint can be read again"),
        }
        self.said = wrong;
    }
}

/// Reads the states beside the table under `weights_key`: one question where there are none, two where there
/// are.
pub(in crate::redis) async fn read(mut connection: RoutedConnection, followed: &Followed) -> Read {
    let key = Companions::of(&followed.key).states;
    // A slot that moves may have taken the table along, and not yet this key.
    if connection.is_importing() {
        return Ok(Err(Wrong::Elsewhere));
    }
    let answered = async {
        let count: Value = connection.query(redis::cmd("HLEN").arg(&key)).await?;
        match count {
            Value::Int(0) => Ok(Ok(Written::default())),
            Value::Int(1..=MAX_STATES) => {
                let fields: Value = connection.query(redis::cmd("HGETALL").arg(&key)).await?;
                Ok(Ok(decode(fields)))
            }
            Value::Int(_) => Ok(Err(Wrong::Told(format!(
                "it has more than {MAX_STATES} fields: delete those that are no backends"
            )))),
            _ => Ok(Err(Wrong::Told("redis did not answer HLEN by a number".to_owned()))),
        }
    };
    let answer: Read = answered.await;
    match answer {
        Err(RedisError::Redirected(_)) => Ok(Err(Wrong::Elsewhere)),
        Err(error) if error.is_missing_right() => {
            Ok(Err(Wrong::Told(format!("{error}: grant the ACL user +hlen +hgetall %R~{key}"))))
        }
        Err(error) if error.code() == Some("WRONGTYPE") => {
            Ok(Err(Wrong::Told(format!("{error}: it holds something else than a hash: delete it"))))
        }
        Err(error) if error.is_refusal() => Ok(Err(Wrong::Told(error.to_string()))),
        answer => answer,
    }
}

/// A field that is no backend, or a value that is no state, is left out: the backend is ready.
fn decode(fields: Value) -> Written {
    let pairs: Vec<(Value, Value)> = match fields {
        Value::Map(pairs) => pairs,
        Value::Array(flat) => {
            let mut flat = flat.into_iter();
            std::iter::from_fn(|| Some((flat.next()?, flat.next()?))).collect()
        }
        _ => Vec::new(),
    };
    let mut wrong = Vec::new();
    let mut states = Vec::with_capacity(pairs.len());
    for (backend, state) in pairs {
        let (Value::BulkString(backend), Value::BulkString(state)) = (backend, state) else { continue };
        let id = std::str::from_utf8(&backend).ok().and_then(|text| text.parse().ok());
        let named = std::str::from_utf8(&state).ok().and_then(AdminState::named);
        match (id, named) {
            (Some(_), Some(AdminState::Ready)) => {}
            (Some(id), Some(state)) => states.push((id, state)),
            _ => wrong.push(format!("{} {}", printable(&backend), printable(&state))),
        }
    }
    wrong.sort_unstable();
    let named = || wrong[..wrong.len().min(MOST_NAMED)].join(", ");
    let left_out = (!wrong.is_empty()).then(|| format!("{}: {}", wrong.len(), named()));
    Written { states, left_out }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &[u8]) -> Value {
        Value::BulkString(text.to_vec())
    }

    #[test]
    fn hostile_fields_are_left_out_and_the_others_stay() {
        let fields = [
            (b"10.0.0.1:80".as_slice(), b"drain".as_slice()),
            (b"10.0.0.2:80", b"maint"),
            (b"10.0.0.3:80", b"ready"),
            (b"10.0.0.4:80", b"DRAIN"),
            (b"nobody", b"drain"),
            (b"\xff\x1b[2J:80", b"drain"),
        ];
        let map = Value::Map(fields.iter().map(|(a, b)| (bulk(a), bulk(b))).collect());
        let flat = Value::Array(fields.iter().flat_map(|(a, b)| [bulk(a), bulk(b)]).collect());
        let written = decode(map);
        assert_eq!(written, decode(flat));
        let names: Vec<_> = written.states.iter().map(|(id, state)| format!("{id} {state}")).collect();
        assert_eq!(names, ["10.0.0.1:80 drain", "10.0.0.2:80 maint"]);
        let left_out = written.left_out.expect("some are left out");
        assert!(left_out.starts_with("3: ") && !left_out.chars().any(char::is_control), "{left_out}");
        assert_eq!(decode(Value::Nil), Written::default());
    }
}
