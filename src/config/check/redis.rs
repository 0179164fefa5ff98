//! `redis` and `lua_pick`: the server that has the weights, and when it is asked to pick.

mod cluster;
mod nodes;
mod sentinel;
mod tls;
mod url;

use std::sync::Arc;
use std::time::Duration;

use self::url::RedisUrl;
use super::{non_zero_usize, secret_file};
use crate::config::decode::{Keys, Kind, Section, path_of_key};
use crate::config::{LuaPick, OnEmpty, Pool, Redis, RedisAddress, Secret, Watch};

pub(super) const REDIS: Keys = Keys {
    now: &[
        "url",
        "sentinel",
        "cluster",
        "tls",
        "username",
        "password",
        "password_file",
        "watch",
        "manage_notifications",
        "heartbeat_interval",
        "resync_interval",
        "poll_interval",
        "connect_timeout",
        "response_timeout",
        "max_stale",
        "on_empty",
    ],
    later: &[],
    example: "{url: \"redis://127.0.0.1:6379/0\"}",
    meant: &[(Kind::Text, "url")],
};
pub(super) const LUA_PICK: Keys = Keys {
    now: &["enabled", "timeout", "max_in_flight"],
    later: &[],
    example: "{enabled: false}",
    meant: &[(Kind::Flag, "enabled"), (Kind::Duration, "timeout")],
};

const SECOND: Duration = Duration::from_secs(1);
/// TCP_USER_TIMEOUT is set to the sum of two of these durations. The kernel keeps it as milliseconds in a
/// C int, which ends at 24 days.
const WAIT_MAX: Duration = Duration::from_secs(60 * 60);
/// The default of `lua_pick.timeout`.
pub(super) const LUA_TIMEOUT: Duration = Duration::from_millis(50);
/// Each waiting session has an entry in the queue of one connection.
const IN_FLIGHT_MAX: u64 = 65_536;

pub(super) fn redis(section: &Section<'_>) -> Redis {
    let RedisUrl { address, database, username, password } = location(section);
    let watches = [
        ("auto", Watch::Auto),
        ("notifications", Watch::Notifications),
        ("tracking", Watch::Tracking),
        ("poll", Watch::Poll),
    ];
    let meanings = [("keep_last", OnEmpty::KeepLast), ("refuse", OnEmpty::Refuse)];
    let redis = Redis {
        tls: tls::tls(section, &address),
        address,
        database,
        username: username_beside(section, username),
        password: password_beside(section, password),
        watch: section.choice("watch", &watches, &[], Watch::Auto),
        manage_notifications: section.flag("manage_notifications", false),
        heartbeat_interval: section.interval_up_to(WAIT_MAX, "heartbeat_interval", SECOND),
        resync_interval: section.interval("resync_interval", Duration::from_secs(15)),
        poll_interval: section.interval_up_to(WAIT_MAX, "poll_interval", SECOND),
        connect_timeout: section.interval_up_to(WAIT_MAX, "connect_timeout", SECOND),
        response_timeout: section.interval_up_to(WAIT_MAX, "response_timeout", SECOND),
        max_stale: section.interval("max_stale", Duration::from_secs(5)),
        on_empty: section.choice("on_empty", &meanings, &[], OnEmpty::KeepLast),
    };
    check_max_stale(section, &redis);
    redis
}

fn location(section: &Section<'_>) -> RedisUrl {
    let at = |address, database| RedisUrl { address, database, username: None, password: None };
    let cluster = cluster::cluster(section);
    match (sentinel::sentinel(section), cluster) {
        (Some((sentinel, database)), _) => at(RedisAddress::Sentinel(Arc::new(sentinel)), database),
        (None, Some(cluster)) => at(RedisAddress::Cluster(Arc::new(cluster)), 0),
        (None, None) => server(section),
    }
}

fn server(section: &Section<'_>) -> RedisUrl {
    let default = || RedisUrl {
        address: RedisAddress::Tcp { host: "127.0.0.1".to_owned(), port: 6379 },
        database: 0,
        username: None,
        password: None,
    };
    let Some(field) = section.field("url") else { return default() };
    let Some(text) = field.secret() else { return default() };
    url::parse(text).unwrap_or_else(|cure| {
        field.refuse_unshown(url::refusal(text, cure));
        default()
    })
}

/// Returns the user of the key `username` or of the URL. An empty text, as `${REDIS_USER:-}` may give, means
/// that there is no user.
fn username_beside(section: &Section<'_>, from_url: Option<String>) -> Option<String> {
    let Some(field) = section.field("username") else { return from_url };
    let username = field.text().filter(|text| !text.is_empty()).map(str::to_owned);
    if username.is_some() && from_url.is_some() {
        field.refuse("url names a user, too: keep one of them");
    }
    username.or(from_url)
}

pub(super) fn password_beside(section: &Section<'_>, from_url: Option<Secret>) -> Option<Secret> {
    let field = section.field("password");
    let written = field.as_ref().and_then(|field| field.secret()).filter(|text| !text.is_empty());
    let file = section.field("password_file");
    let at = field.filter(|_| written.is_some()).or_else(|| file.clone());
    if usize::from(written.is_some()) + usize::from(file.is_some()) + usize::from(from_url.is_some()) > 1
        && let Some(at) = at
    {
        at.refuse_unshown("there is more than one of password, password_file and the one in url: keep one");
        return None;
    }
    match (written, file) {
        (Some(text), _) => Some(Secret::new(text.to_owned())),
        (None, Some(file)) => secret_file::read(&file),
        (None, None) => from_url,
    }
}

/// Refuses a `max_stale` that is not longer than the interval of confirmations: a healthy snapshot would
/// be stale between two of them. Snapshots are confirmed by each heartbeat or poll; `auto` and `tracking`
/// may do either, by the server's settings.
fn check_max_stale(section: &Section<'_>, redis: &Redis) {
    let poll = ("poll_interval", redis.poll_interval);
    let heartbeat = ("heartbeat_interval", redis.heartbeat_interval);
    let (key, interval) = match redis.watch {
        Watch::Poll => poll,
        Watch::Notifications => heartbeat,
        Watch::Auto | Watch::Tracking if redis.poll_interval > redis.heartbeat_interval => poll,
        Watch::Auto | Watch::Tracking => heartbeat,
    };
    if redis.max_stale > interval {
        return;
    }
    let message = format!("{} is not longer than {key}: write at least twice that", shown(redis.max_stale));
    match section.field("max_stale").or_else(|| section.field(key)) {
        Some(field) if field.path().ends_with("max_stale") => {
            field.refuse_unshown(format!("{message}, {}", shown(interval * 2)))
        }
        Some(field) => field
            .refuse(format_args!("redis.max_stale ({}) must be longer: raise it", shown(redis.max_stale))),
        None => {}
    }
}

fn shown(duration: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(duration)
}

pub(super) fn lua_pick(section: &Section<'_>) -> LuaPick {
    LuaPick {
        enabled: section.flag("enabled", true),
        timeout: section.interval("timeout", LUA_TIMEOUT),
        max_in_flight: non_zero_usize(section.integer("max_in_flight", 1..=IN_FLIGHT_MAX, 64)),
    }
}

/// Refuses a `lua_pick.timeout` that uses up the deadline of a pool, so that a session could not connect
/// any more. Where the timeout is left out, `pools.rs` refuses the deadline.
pub(super) fn check_lua_timeout(section: &Section<'_>, lua_pick: &LuaPick, pools: &[Pool]) {
    let Some(field) = section.field("timeout").filter(|_| lua_pick.enabled) else { return };
    let shortest = pools.iter().min_by_key(|pool| pool.connect.deadline);
    if let Some(Pool { name, connect, .. }) = shortest.filter(|p| p.connect.deadline <= lua_pick.timeout) {
        let (path, deadline) = (path_of_key("pools", name), shown(connect.deadline));
        field.refuse(format_args!(
            "no time would be left to connect: write less than {path}.connect.deadline, {deadline}, \
             or raise that"
        ));
    }
}
