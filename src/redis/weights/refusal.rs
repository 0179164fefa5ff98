//! Messages for an operator whose command fails: what was refused, on which key, and what helps.

use redis::ServerErrorKind;

use super::limits::{LONGEST_NAME, MOST_TABLE_BYTES};
use crate::config::RedisAddress;
use crate::redis::schema::MAX_MEMBERS;
use crate::redis::schema::companion::Companions;
use crate::redis::wire::error::{RedisError, tells_of_missing_right};

/// Why weights could not be read or changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightsError {
    /// Redis does not answer, or not usefully yet: a later attempt may succeed.
    #[error("{0}")]
    Unreachable(String),
    /// An operator has to do something about it. Nothing was changed.
    #[error("{0}")]
    Refused(String),
}

/// What the command wanted from Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Table,
    Change,
    Reports,
    /// Which backends are in drain or maint.
    States,
}

impl Asked {
    /// Returns the companion key that is read.
    fn key(self, companions: &Companions) -> &str {
        match self {
            Self::Table | Self::Change => &companions.history,
            Self::Reports => &companions.applied,
            Self::States => &companions.states,
        }
    }
}

/// Returns the error for a key whose server was not found. `written` is the address in the config.
pub(super) fn not_found(written: &RedisAddress, error: &RedisError) -> WeightsError {
    match written {
        // The error may be of any of the nodes, so all are named.
        RedisAddress::Cluster(cluster) if !error.is_cluster_setup() => {
            let nodes: Vec<String> = cluster.nodes.iter().map(ToString::to_string).collect();
            let text = format!("no node of the cluster ({}) can be asked, one says", nodes.join(", "));
            not_opened(&text, error, written)
        }
        _ => not_connected(written, written, error),
    }
}

/// Returns the error for a server that cannot be connected to. `found` is the server that has the key,
/// `written` the address in the config.
pub(super) fn not_connected(
    found: &RedisAddress,
    written: &RedisAddress,
    error: &RedisError,
) -> WeightsError {
    not_opened(&format!("redis at {found} cannot be asked"), error, written)
}

fn not_opened(text: &str, error: &RedisError, written: &RedisAddress) -> WeightsError {
    let cure = error.cure();
    let needs_operator = error.is_authentication() || error.is_refusal() || error.is_cluster_setup();
    if needs_operator {
        WeightsError::Refused(format!("{text}: {error}: {cure}"))
    } else if matches!(error, RedisError::NotRedis) {
        WeightsError::Unreachable(format!("{text}: {error}: {cure}"))
    } else {
        let key = written.written_at();
        WeightsError::Unreachable(format!("{text}: {error}: is it up, and is {key} right?"))
    }
}

/// Returns the error for a command that failed on an open connection.
pub(super) fn of_redis(
    address: &str,
    key: &str,
    companions: &Companions,
    error: &RedisError,
    asked: Asked,
) -> WeightsError {
    if error.is_not_ready() {
        return WeightsError::Unreachable(format!(
            "redis at {address} is not ready: {error}: try again soon"
        ));
    }
    if matches!(error, RedisError::Redirected(_)) {
        return WeightsError::Unreachable(format!(
            "redis at {address}: {error}: the slot moves, try again soon"
        ));
    }
    if error.is_too_large() && asked != Asked::Change {
        return WeightsError::Refused(holds_too_much(asked.key(companions)));
    }
    if !error.is_refusal() {
        let unknown = match asked {
            Asked::Table | Asked::Reports | Asked::States => "",
            Asked::Change => {
                ": it is not known whether the change was made: look with `statera weights history`"
            }
        };
        return WeightsError::Unreachable(format!("redis at {address} did not answer: {error}{unknown}"));
    }
    if matches!(error.server_kind(), Some(ServerErrorKind::Moved | ServerErrorKind::Ask)) {
        return WeightsError::Refused(format!("redis at {address} refuses: {error}: {}", error.cure()));
    }
    if matches!(asked, Asked::Reports | Asked::States) {
        let key = asked.key(companions);
        if error.code() == Some("TOOLARGE") {
            return WeightsError::Refused(holds_too_much(key));
        }
        if error.to_string().contains("WRONGTYPE") {
            return WeightsError::Refused(holds_another_kind(key, "a hash"));
        }
    }
    let pattern = companions.pattern();
    let cure = match error.server_kind() {
        // Where a script lacks a right, the code of the error does not say so.
        _ if asked == Asked::Reports && error.is_missing_right() => {
            format!("grant the ACL user +eval_ro +time +hlen +hscan %R~{}", companions.applied)
        }
        Some(ServerErrorKind::NoPerm) => match asked {
            Asked::Table => format!("grant the ACL user +eval_ro +xrevrange %R~{key} %R{pattern}"),
            Asked::States => format!("grant the ACL user +hlen +hgetall %R~{}", companions.states),
            Asked::Change | Asked::Reports => format!("grant the ACL user +eval ~{key} {pattern}"),
        },
        Some(ServerErrorKind::CrossSlot) => {
            format!("no key beside {key} can share its slot: use a weights_key without stray braces")
        }
        Some(ServerErrorKind::ReadOnly) => "write to the primary, not to a replica".to_owned(),
        _ => return WeightsError::Refused(format!("redis at {address} refuses: {error}")),
    };
    WeightsError::Refused(format!("redis at {address} refuses: {error}: {cure}"))
}

/// Returns the error for a script that was refused `command` on `key`, for the `reason` in Redis's own
/// words. `table` is the weights key.
pub(super) fn of_script(table: &str, command: &str, key: &str, reason: &str) -> WeightsError {
    let lower = command.to_lowercase();
    let has = |part: &str| reason.contains(part);
    let message = if reason == "TOOLARGE" && key != table {
        holds_too_much(key)
    } else if reason == "TOOLARGE" {
        let has = if command == "ZADD" { "would have" } else { "has" };
        format!("{key} {has} more than {} members: split the pool", MAX_MEMBERS)
    } else if let Some(longest) = reason.strip_prefix("OVERSIZED ") {
        if key == table { too_large(key, longest.parse().unwrap_or(0)) } else { holds_too_much(key) }
    } else if reason == "FOREIGN" {
        format!(
            "{key} was written by something else than statera: delete it (the weights stay) and try again"
        )
    } else if has("WRONGTYPE") {
        let kind = match command {
            "XREVRANGE" | "XADD" => "a stream",
            "GETRANGE" | "GET" | "SET" => "a number",
            command if command.starts_with('H') => "a hash",
            _ => "a sorted set",
        };
        holds_another_kind(key, kind)
    } else if tells_of_missing_right(reason) {
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

fn holds_another_kind(key: &str, kind: &str) -> String {
    format!("{key} holds something else than {kind}: rename or delete it")
}

/// Returns the message for a companion key that other programs have written too.
fn holds_too_much(key: &str) -> String {
    format!("{key} holds more than statera writes there: delete it (the weights stay) and try again")
}

/// Returns the message for a table that is too large, whose longest name has `longest` bytes. A name that
/// cannot be typed is removed by its length.
fn too_large(key: &str, longest: usize) -> String {
    if longest <= LONGEST_NAME {
        return format!(
            "the names in {key} make up more than {} MiB: split the pool",
            MOST_TABLE_BYTES >> 20
        );
    }
    format!(
        "{key} is too large to be read: a member has {longest} bytes, and no backend's name has more than \
         {LONGEST_NAME}: remove \
         it, by `redis-cli EVAL \"for _, m in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do if #m > {LONGEST_NAME} then \
         redis.call('ZREM', KEYS[1], m) end end\" 1 '{key}'`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_redirected_has_changed_nothing() {
        let error = RedisError::Redirected("redis://10.0.0.2:6379".to_owned());
        let companions = Companions::of("servers");
        for asked in [Asked::Table, Asked::Change, Asked::Reports] {
            let refused = of_redis("redis://10.0.0.1:6379", "servers", &companions, &error, asked);
            let WeightsError::Unreachable(text) = refused else { panic!("{refused:?}") };
            assert!(text.ends_with("the slot moves, try again soon"), "{text}");
        }
    }
}
