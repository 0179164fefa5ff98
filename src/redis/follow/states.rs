//! Reads the admin states beside a table: `{servers}:states`, a hash of backends that are not ready.
//!
//! The states are read right after the weights, so that they are never older than the weights. A fault in
//! the states does not affect the weights: the last known states stay, and the fault is logged once.

use std::time::Duration;

use redis::Value;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::balance::pool::Cell;
use crate::balance::{AdminState, BackendId};
use crate::control::log_limiter::LogLimiter;
use crate::redis::schema::companion::Companions;
use crate::redis::schema::decode::printable;
use crate::redis::schema::followed::Followed;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// The most states that are read: as many as a table has members at most.
const MAX_STATES: i64 = 100_000;
/// The rest after an answer that was too large and ended the connection.
const REST_AFTER_TOO_LARGE: Duration = Duration::from_secs(30);
/// Fields named in one report.
const MOST_NAMED: usize = 10;
/// Reports of ignored fields in one window.
const MOST_REPORTS: u32 = 1;
/// Lines in one window about whether the key can be read.
const MOST_FAULT_LINES: u32 = 4;

/// The admin states of one pool.
#[derive(Clone, Debug)]
pub(super) struct States {
    /// Backends that are not ready. `None` before the first read that succeeded.
    written: Option<Vec<(BackendId, AdminState)>>,
    /// The fault of the key that was logged last.
    last_logged: Option<String>,
    fault_lines: LogLimiter,
    ignored: Option<String>,
    reports: LogLimiter,
    /// The key's fault or its ignored fields at the last read, whether or not they were logged.
    last_fault: Option<String>,
    rests_until: Option<Instant>,
    /// How many connections have ended during a read of the states, since the last read that succeeded.
    cut_offs: u32,
}

/// The result of a read. The inner error does not affect the weights, the outer one ends the connection.
pub(super) type Read = Result<Result<Written, Fault>, RedisError>;

/// What the key holds.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Written {
    states: Vec<(BackendId, AdminState)>,
    /// Fields that are no backend, or whose value is no state: how many, and the first of them.
    ignored: Option<String>,
}

/// Why the last known states stay.
#[derive(Debug)]
pub(super) enum Fault {
    /// A fault of the key, which an operator has to remove.
    OfKey(String),
    /// The cluster node does not have the key, for example because its hash slot migrates.
    Elsewhere,
}

impl States {
    pub(super) fn new() -> Self {
        Self {
            written: None,
            last_logged: None,
            fault_lines: LogLimiter::new(MOST_FAULT_LINES),
            ignored: None,
            reports: LogLimiter::new(MOST_REPORTS),
            last_fault: None,
            rests_until: None,
            cut_offs: 0,
        }
    }

    /// Returns the states to publish with the table of `cell`: the states read last, or the cell's own
    /// states if none were read.
    pub(super) fn known(&self, cell: &Cell) -> Vec<(BackendId, AdminState)> {
        self.written.clone().unwrap_or_else(|| cell.states())
    }

    /// Returns true while the key rests after an answer that was too large.
    pub(super) fn rest(&self) -> bool {
        self.rests_until.is_some_and(|until| until > Instant::now())
    }

    /// Takes in what a read gave. `is_alone`: no other pool was read at the same time. Returns whether
    /// the key holds something else than when it was last read.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(super) fn take(
        &mut self,
        followed: &Followed,
        read: Read,
        is_alone: bool,
    ) -> Result<bool, RedisError> {
        let is_news = self.is_news(&read);
        let fault = match read {
            Ok(Ok(written)) => {
                self.cut_offs = 0;
                self.written = Some(written.states);
                self.log_ignored(followed, written.ignored);
                None
            }
            Ok(Err(Fault::Elsewhere)) => return Ok(false),
            Ok(Err(Fault::OfKey(text))) => Some(text),
            // The answer of another pool may have ended the connection.
            Err(error) if !is_alone => return Err(error),
            Err(error) => {
                // The table had arrived. Redis may have ended at that moment; if it happens twice, the
                // states are taken to be too large.
                self.cut_offs += 1;
                if error.is_too_large() || self.cut_offs > 1 {
                    self.rests_until = Some(Instant::now() + REST_AFTER_TOO_LARGE);
                    self.log_fault(
                        followed,
                        Some(format!(
                            "the connection ends when it is asked for ({error}): delete what is too large"
                        )),
                    );
                }
                return Err(error);
            }
        };
        self.log_fault(followed, fault);
        Ok(is_news)
    }

    fn is_news(&mut self, read: &Read) -> bool {
        let (is_same, fault) = match read {
            Ok(Ok(written)) => (self.written.as_ref() == Some(&written.states), &written.ignored),
            Ok(Err(Fault::OfKey(text))) => (true, &Some(text.clone())),
            Ok(Err(Fault::Elsewhere)) | Err(_) => return false,
        };
        let is_same = is_same && self.last_fault == *fault;
        self.last_fault.clone_from(fault);
        !is_same
    }

    fn log_ignored(&mut self, followed: &Followed, ignored: Option<String>) {
        if self.ignored == ignored {
            return;
        }
        if let Some(fields) = &ignored {
            let Some(held_back) = self.reports.permit(Instant::now()) else { return };
            let (pool, key) = (&followed.pool, Companions::of(&followed.key).states);
            warn!(pool = %pool, key, fields, held_back, "ignored invalid entries in {key}");
        }
        self.ignored = ignored;
    }

    fn log_fault(&mut self, followed: &Followed, fault: Option<String>) {
        if self.last_logged == fault {
            return;
        }
        let Some(held_back) = self.fault_lines.permit(Instant::now()) else { return };
        let (pool, key) = (&followed.pool, Companions::of(&followed.key).states);
        match &fault {
            Some(reason) => {
                warn!(
                    pool = %pool, key, reason, held_back,
                    "cannot read which backends are in drain or maint, keeping the last known states"
                );
            }
            None => {
                info!(pool = %pool, key, held_back, "the states of drain and maint can be read again");
            }
        }
        self.last_logged = fault;
    }
}

/// Reads the states beside the table of `followed`: one command where there are none, two where there are
/// some.
pub(super) async fn read(mut connection: RoutedConnection, followed: &Followed) -> Read {
    let key = Companions::of(&followed.key).states;
    // While a hash slot migrates, the table may have moved already and this key not yet.
    if connection.is_importing() {
        return Ok(Err(Fault::Elsewhere));
    }
    let answered = async {
        let count: Value = connection.query(redis::cmd("HLEN").arg(&key)).await?;
        match count {
            Value::Int(0) => Ok(Ok(Written::default())),
            Value::Int(1..=MAX_STATES) => {
                let fields: Value = connection.query(redis::cmd("HGETALL").arg(&key)).await?;
                Ok(Ok(decode(fields)))
            }
            Value::Int(_) => Ok(Err(Fault::OfKey(format!(
                "it has more than {MAX_STATES} fields: delete those that are no backends"
            )))),
            _ => Ok(Err(Fault::OfKey("redis did not answer HLEN by a number".to_owned()))),
        }
    };
    let answer: Read = answered.await;
    match answer {
        Err(RedisError::Redirected(_)) => Ok(Err(Fault::Elsewhere)),
        Err(error) if error.is_missing_right() => {
            Ok(Err(Fault::OfKey(format!("{error}: grant the ACL user +hlen +hgetall %R~{key}"))))
        }
        Err(error) if error.code() == Some("WRONGTYPE") => {
            Ok(Err(Fault::OfKey(format!("{error}: it holds something else than a hash: delete it"))))
        }
        Err(error) if error.is_refusal() => Ok(Err(Fault::OfKey(error.to_string()))),
        answer => answer,
    }
}

/// Decodes the fields. A field that is no backend, or whose value is no state, is ignored, so its backend
/// stays ready.
fn decode(fields: Value) -> Written {
    let pairs: Vec<(Value, Value)> = match fields {
        Value::Map(pairs) => pairs,
        Value::Array(flat) => {
            let mut flat = flat.into_iter();
            std::iter::from_fn(|| Some((flat.next()?, flat.next()?))).collect()
        }
        _ => Vec::new(),
    };
    let mut fault = Vec::new();
    let mut states = Vec::with_capacity(pairs.len());
    for (backend, state) in pairs {
        let (Value::BulkString(backend), Value::BulkString(state)) = (backend, state) else { continue };
        let id = std::str::from_utf8(&backend).ok().and_then(|text| text.parse().ok());
        let named = std::str::from_utf8(&state).ok().and_then(AdminState::named);
        match (id, named) {
            (Some(_), Some(AdminState::Ready)) => {}
            (Some(id), Some(state)) => states.push((id, state)),
            _ => fault.push(format!("{} {}", printable(&backend), printable(&state))),
        }
    }
    fault.sort_unstable();
    let named = || fault[..fault.len().min(MOST_NAMED)].join(", ");
    let ignored = (!fault.is_empty()).then(|| format!("{}: {}", fault.len(), named()));
    Written { states, ignored }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &[u8]) -> Value {
        Value::BulkString(text.to_vec())
    }

    #[test]
    fn hostile_fields_are_ignored_and_the_others_stay() {
        let fields = [
            (b"10.0.0.1:80".as_slice(), b"drain".as_slice()),
            (b"10.0.0.2:80", b"maint"),
            (b"10.0.0.3:80", b"ready"),
            (b"10.0.0.4:80", b"DRAIN"),
            (b"unknown", b"drain"),
            (b"\xff\x1b[2J:80", b"drain"),
        ];
        let map = Value::Map(fields.iter().map(|(a, b)| (bulk(a), bulk(b))).collect());
        let flat = Value::Array(fields.iter().flat_map(|(a, b)| [bulk(a), bulk(b)]).collect());
        let written = decode(map);
        assert_eq!(written, decode(flat));
        let names: Vec<_> = written.states.iter().map(|(id, state)| format!("{id} {state}")).collect();
        assert_eq!(names, ["10.0.0.1:80 drain", "10.0.0.2:80 maint"]);
        let ignored = written.ignored.expect("some are left out");
        assert!(ignored.starts_with("3: ") && !ignored.chars().any(char::is_control), "{ignored}");
        assert_eq!(decode(Value::Nil), Written::default());
    }
}
