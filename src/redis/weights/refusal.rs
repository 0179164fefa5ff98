//! Words for what goes wrong between a person and Redis: what was refused, on which key, and what helps.

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::config::RedisAddress;
use crate::redis::companion::Companions;
use crate::redis::connection;

/// Why weights could not be read or changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightsError {
    /// No answer, or none that can be used yet: another time may do.
    #[error("{0}")]
    Unreachable(String),
    /// A person must do something about it; nothing was changed.
    #[error("{0}")]
    Refused(String),
}

/// What a person wanted when the connection broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    ToRead,
    ToWrite,
    WhoHasIt,
}

pub(super) fn not_connected(address: &RedisAddress, error: &RedisError) -> WeightsError {
    let text = format!("redis at {address} cannot be asked: {error}");
    match error.kind() {
        ErrorKind::AuthenticationFailed => {
            WeightsError::Refused(format!("{text}: {}", connection::cure(error)))
        }
        _ if connection::is_refusal(error) => {
            WeightsError::Refused(format!("{text}: {}", connection::cure(error)))
        }
        _ if connection::is_of_cluster(error) => {
            WeightsError::Refused(format!("{text}: {}", connection::cure(error)))
        }
        _ => {
            let key = address.written_at();
            WeightsError::Unreachable(format!("{text}: is it up, and is {key} right?"))
        }
    }
}

/// For an error that the command itself ended in.
pub(super) fn of_redis(
    address: &str,
    key: &str,
    companions: &Companions,
    error: &RedisError,
    asked: Asked,
) -> WeightsError {
    if connection::is_not_ready(error) {
        return WeightsError::Unreachable(format!(
            "redis at {address} is not ready: {error}: try again soon"
        ));
    }
    if !connection::is_refusal(error) {
        let unknown = match asked {
            Asked::ToRead | Asked::WhoHasIt => "",
            Asked::ToWrite => {
                ": it is not known whether the change was made: look with `statera weights history`"
            }
        };
        return WeightsError::Unreachable(format!("redis at {address} did not answer: {error}{unknown}"));
    }
    if connection::is_elsewhere(error) {
        return WeightsError::Unreachable(format!(
            "redis at {address}: {error}: the slot moves, try again soon"
        ));
    }
    if matches!(error.kind(), ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::Ask)) {
        return WeightsError::Refused(format!(
            "redis at {address} refuses: {error}: {}",
            connection::cure(error)
        ));
    }
    let pattern = companions.pattern();
    let cure = match error.kind() {
        ErrorKind::Server(ServerErrorKind::NoPerm) => match asked {
            Asked::ToRead => format!("grant the ACL user +eval_ro +xrevrange %R~{key} %R{pattern}"),
            Asked::ToWrite => format!("grant the ACL user +eval ~{key} {pattern}"),
            Asked::WhoHasIt => {
                format!("grant the ACL user +eval +time +hlen +hgetall ~{}", companions.applied)
            }
        },
        // What a script may not call is not told by the code.
        _ if asked == Asked::WhoHasIt && is_of_rights(&error.to_string()) => {
            format!("grant the ACL user +eval +time +hlen +hgetall ~{}", companions.applied)
        }
        ErrorKind::Server(ServerErrorKind::CrossSlot) => {
            format!("no key beside {key} can share its slot: use a weights_key without stray braces")
        }
        ErrorKind::Server(ServerErrorKind::ReadOnly) => "write to the primary, not to a replica".to_owned(),
        _ => return WeightsError::Refused(format!("redis at {address} refuses: {error}")),
    };
    WeightsError::Refused(format!("redis at {address} refuses: {error}: {cure}"))
}

/// For a command that the script was refused: it tells which, on which key, and Redis's own words.
pub(super) fn of_script(command: &str, key: &str, reason: &str) -> WeightsError {
    let lower = command.to_lowercase();
    let has = |part: &str| reason.contains(part);
    let message = if reason == "TOOLARGE" {
        format!("{key} has more than {} members: split the pool", super::MAX_MEMBERS)
    } else if reason == "FOREIGN" {
        format!(
            "{key} was written by something else than statera: delete it (the weights stay) and try again"
        )
    } else if has("WRONGTYPE") {
        let kind = match command {
            "XREVRANGE" | "XADD" => "a stream",
            "GET" | "SET" => "a number",
            _ => "a sorted set",
        };
        format!("{key} holds something else than {kind}: rename or delete it")
    } else if is_of_rights(reason) {
        format!("redis refuses {command} on {key}: grant the ACL user +{lower} ~{key}")
    } else if has("READONLY") || has("read-only") || has("read only") {
        format!("redis refuses {command} on {key}: it is a replica: write to the primary")
    } else if has("OOM") {
        format!("redis refuses {command} on {key}: it has no memory left: raise maxmemory")
    } else {
        format!("redis refuses {command} on {key}: {reason}")
    };
    WeightsError::Refused(message)
}

/// In the words of Redis 7 and 6.2, for what a script calls.
fn is_of_rights(reason: &str) -> bool {
    ["NOPERM", "ACL failure", "can't run this command"].iter().any(|part| reason.contains(part))
}
