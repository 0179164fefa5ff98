//! `pools`: the backends of each pool, and how they are reached.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use super::capacity::capacity;
use super::health::{health_check, outlier};
use super::{named_section, non_zero_u32, tcp_congestion};
use crate::balance::{BackendId, Balance, Weight};
use crate::config::decode::{Field, Keys, Kind, Section, escaped, path_of_key};
use crate::config::{Connect, Keepalive, Pool, companion_stem};

const POOL: Keys = Keys {
    now: &[
        "weights_key",
        "backends",
        "balance",
        "connect",
        "idle_timeout",
        "half_close_timeout",
        "keepalive",
        "tcp_congestion",
        "health_check",
        "outlier",
        "fail_open_percent",
        "slow_start",
        "max_connections",
        "queue",
        "drain",
    ],
    later: &["max_session_duration", "send_proxy", "source"],
    example: "{backends: {\"127.0.0.1:9001\": 100}}",
    meant: &[],
};
const CONNECT: Keys = Keys {
    now: &["timeout", "attempts", "deadline"],
    later: &[],
    example: "{timeout: 1s, attempts: 3}",
    meant: &[(Kind::Duration, "timeout")],
};
const DRAIN: Keys =
    Keys { now: &["timeout"], later: &[], example: "{timeout: 10m}", meant: &[(Kind::Duration, "timeout")] };
const KEEPALIVE: Keys = Keys {
    now: &["idle", "interval", "probes"],
    later: &[],
    example: "{idle: 60s}",
    meant: &[(Kind::Duration, "idle")],
};

const ATTEMPTS_MAX: u64 = 100;
/// Linux refuses more: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL in include/net/tcp.h.
const KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
/// MAX_TCP_KEEPCNT, in the same file.
const PROBES_MAX: u64 = 127;
const WEIGHTS_KEY_MAX_BYTES: usize = 1024;

/// Reads `pools`. `least_deadline` is the default of `lua_pick.timeout`, where that key is left out:
/// `connect.deadline` must be longer.
pub(super) fn pools(root: &Section<'_>, has_redis: bool, least_deadline: Option<Duration>) -> Vec<Pool> {
    let Some(section) = named_section(
        root,
        "pools",
        POOL,
        "web: {backends: {\"127.0.0.1:9001\": 100}}",
        "write at least one pool",
    ) else {
        return Vec::new();
    };
    let mut stems = HashMap::new();
    let pools = section.entries().map(|(name, field)| {
        let section = Section::open(field, POOL);
        let pool = pool(name, &section, has_redis, least_deadline);
        if has_redis {
            refuse_shared_companions(&mut stems, &section, &pool);
        }
        pool
    });
    pools.collect()
}

/// Refuses two tables whose companion keys have the same names. Two pools may share one table.
fn refuse_shared_companions(
    stems: &mut HashMap<String, (String, String)>,
    section: &Section<'_>,
    pool: &Pool,
) {
    let stem = companion_stem(&pool.weights_key);
    let (other, key) = match stems.entry(stem) {
        Entry::Vacant(first) => {
            first.insert((path_of_key("pools", &pool.name), pool.weights_key.clone()));
            return;
        }
        Entry::Occupied(first) if first.get().1 == pool.weights_key => return,
        Entry::Occupied(first) => first.get().clone(),
    };
    let key = escaped(&key, 60);
    let message = format!(
        "its version and history would have the same keys as those of {other}.weights_key ({key}): \
         rename one of the two"
    );
    match section.field("weights_key") {
        Some(field) => field.refuse(message),
        None => section.whole().refuse_unshown(format!("weights_key is {}: {message}", pool.weights_key)),
    }
}

fn pool(name: &str, section: &Section<'_>, has_redis: bool, least_deadline: Option<Duration>) -> Pool {
    let backends = backends(section, has_redis);
    let is_unix = |(id, _): &(BackendId, Weight)| id.as_str().starts_with("unix:");
    let only_unix = !has_redis && !backends.is_empty() && backends.iter().all(is_unix);
    Pool {
        name: name.into(),
        weights_key: weights_key(name, section),
        backends,
        balance: section.choice("balance", &Balance::NAMES, &[], Balance::WeightedRandom),
        connect: connect(&section.section("connect", CONNECT), least_deadline),
        idle_timeout: section.limit("idle_timeout", Duration::from_secs(60 * 60)),
        half_close_timeout: section.interval("half_close_timeout", Duration::from_secs(30)),
        keepalive: keepalive(&section.section("keepalive", KEEPALIVE)),
        tcp_congestion: tcp_congestion(section),
        health_check: health_check(section, only_unix),
        outlier: outlier(section),
        fail_open: section.integer("fail_open_percent", 0..=100, 0) as f64 / 100.0,
        slow_start: section.duration("slow_start", Duration::ZERO),
        capacity: capacity(section),
        drain_timeout: section.section("drain", DRAIN).duration("timeout", Duration::ZERO),
    }
}

/// Reads `weights_key`. Redis accepts any bytes, but control characters are refused, since logs show the key.
fn weights_key(name: &str, section: &Section<'_>) -> String {
    let default = || format!("statera:{{{name}}}:weights");
    let Some(field) = section.field("weights_key") else { return default() };
    let Some(text) = field.text() else { return default() };
    if text.is_empty() || text.len() > WEIGHTS_KEY_MAX_BYTES || text.chars().any(char::is_control) {
        field.refuse("a Redis key of 1 to 1024 bytes without control characters is needed");
    }
    text.to_owned()
}

/// Reads `backends`. All weights may be 0: the pool then refuses every session until Redis has other
/// weights.
fn backends(section: &Section<'_>, has_redis: bool) -> Vec<(BackendId, Weight)> {
    if !section.has("backends") && !has_redis && section.whole().is_map() {
        section.whole().miss("backends", "it is missing: without redis a pool needs at least one backend");
    }
    let Some(field) = section.field("backends") else { return Vec::new() };
    let backends = open_backends(field);
    if backends.is_empty() && backends.whole().is_map() && !has_redis {
        backends.whole().refuse_unshown("it is empty: without redis a pool needs at least one backend");
    }
    let read = backends.entries().filter_map(|(address, field)| {
        let backend = backend(address, &field);
        let weight = weight(&field);
        Some((backend?, weight?))
    });
    read.collect()
}

/// Opens `backends`. A list, as other load balancers have it, is refused with its first backend as the
/// example.
fn open_backends<'a>(field: Field<'a>) -> Section<'a> {
    let address = field.first_text().filter(|text| text.parse::<BackendId>().is_ok());
    let example =
        format!("{{\"{}\": 100}} (a backend, then its weight)", address.unwrap_or("127.0.0.1:9001"));
    Section::open_values(field, &example)
}

/// Reads the address. The path of the problem shows it already, so the message does not.
fn backend(address: &str, field: &Field<'_>) -> Option<BackendId> {
    address.parse().inspect_err(|reason| field.refuse_unshown(format!("{reason}"))).ok()
}

fn weight(field: &Field<'_>) -> Option<Weight> {
    if let Some(number) = field.percentage() {
        field.refuse(format_args!("weights are relative to each other, not percentages: write {number}"));
        return None;
    }
    if field.is_map() {
        field.refuse("a weight is a number right behind the backend, like 100");
        return None;
    }
    let number = field.number()?;
    let weight = Weight::new(number);
    weight.inspect_err(|_| field.refuse("a weight is a finite number of at least 0")).ok()
}

fn connect(section: &Section<'_>, least_deadline: Option<Duration>) -> Connect {
    let connect = Connect {
        timeout: section.interval("timeout", Duration::from_secs(1)),
        attempts: non_zero_u32(section.integer("attempts", 1..=ATTEMPTS_MAX, 3)),
        deadline: section.interval("deadline", Duration::from_secs(3)),
    };
    if let Some(least) = least_deadline.filter(|least| connect.deadline <= *least)
        && let Some(field) = section.field("deadline")
    {
        let least = humantime::format_duration(least);
        field.refuse(format_args!(
            "no time would be left after Redis was asked to pick: write more than lua_pick.timeout, {least}, \
             or lower that"
        ));
    }
    connect
}

fn keepalive(section: &Section<'_>) -> Keepalive {
    Keepalive {
        idle: whole_seconds(section, "idle", Duration::from_secs(60)),
        interval: whole_seconds(section, "interval", Duration::from_secs(10)),
        probes: non_zero_u32(section.integer("probes", 1..=PROBES_MAX, 6)),
    }
}

/// Reads a number of whole seconds, as the kernel counts them. Other durations are refused, not rounded.
fn whole_seconds(section: &Section<'_>, key: &str, default: Duration) -> Duration {
    let value = section.interval(key, default);
    if value.subsec_nanos() != 0 || value > KEEPALIVE_MAX {
        section.field(key).inspect(|field| field.refuse("whole seconds from 1s to 32767s are needed"));
    }
    value
}
