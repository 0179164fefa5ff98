//! `pools.*.health_check` and `pools.*.outlier`: when a backend that has weight gets no sessions.

use std::sync::Arc;
use std::time::Duration;

use super::non_zero_u32;
use crate::balance::Outlier;
use crate::config::HealthCheck;
use crate::config::decode::{Field, Keys, Kind, Section};

const HEALTH_CHECK: Keys = Keys {
    now: &["interval", "timeout", "rise", "fall", "port", "send", "expect"],
    later: &[],
    example: "{interval: 2s}",
    meant: &[(Kind::Duration, "interval")],
};
const OUTLIER: Keys = Keys {
    now: &["consecutive_failures", "ejection", "max_ejected_percent"],
    later: &[],
    example: "{consecutive_failures: 5}",
    meant: &[(Kind::Number, "consecutive_failures"), (Kind::Duration, "ejection")],
};
const BYTES: Keys = Keys { now: &["hex"], later: &[], example: "{hex: \"0a0b\"}", meant: &[] };

const IN_A_ROW_MAX: u64 = 1_000;
const PORT_MAX: u64 = 65_535;
/// Longer than any greeting.
const BYTES_MAX: usize = 4096;
const BYTES_CURE: &str = "a text, or {hex: \"0a0b\"}, of 1 to 4096 bytes is needed";

/// Returns the section under `key`; `None` if it is `off`, or was refused.
fn section_or_off<'a>(pool: &Section<'a>, key: &str, keys: Keys) -> Option<Section<'a>> {
    if let Some(field) = pool.field(key) {
        if field.is_text("off") {
            return None;
        }
        let is_one_of = |words: &[&str]| words.iter().any(|word| field.is_text(word));
        if field.is_flag(false) || is_one_of(&["no", "none", "false", "disabled"]) {
            field.refuse(format_args!("write {key}: off"));
            return None;
        }
        if field.is_flag(true) || is_one_of(&["on", "yes", "true", "enabled"]) {
            field.refuse(format_args!("write {key}: {{}} for the defaults, or a map like {}", keys.example));
            return None;
        }
    }
    Some(pool.section(key, keys))
}

/// Reads `health_check`. Without it a pool has no checks, since only the operator knows what a check does
/// to a backend. `only_unix`: the pool has backends, and all of them are unix sockets for ever.
pub(super) fn health_check(pool: &Section<'_>, only_unix: bool) -> Option<HealthCheck> {
    if !pool.has("health_check") {
        return None;
    }
    let section = section_or_off(pool, "health_check", HEALTH_CHECK)?;
    let port = section.field("port");
    if only_unix && let Some(port) = &port {
        port.refuse("the pool's backends are unix sockets, which have no ports: remove it");
    }
    let port = port.and_then(|field| field.integer(&(1..=PORT_MAX)));
    Some(HealthCheck {
        interval: section.interval("interval", Duration::from_secs(2)),
        timeout: section.interval("timeout", Duration::from_secs(1)),
        rise: non_zero_u32(section.integer("rise", 1..=IN_A_ROW_MAX, 2)),
        fall: non_zero_u32(section.integer("fall", 1..=IN_A_ROW_MAX, 3)),
        port: port.and_then(|port| u16::try_from(port).ok()),
        send: section.field("send").and_then(|field| bytes(&field)),
        expect: section.field("expect").and_then(|field| bytes(&field)),
    })
}

/// Reads `outlier`. It is on unless it is `off`, since it works with any protocol of the backends.
pub(super) fn outlier(pool: &Section<'_>) -> Option<Outlier> {
    let section = section_or_off(pool, "outlier", OUTLIER)?;
    let percent = section.integer("max_ejected_percent", 0..=100, 50);
    Some(Outlier {
        consecutive_failures: non_zero_u32(section.integer("consecutive_failures", 1..=IN_A_ROW_MAX, 5)),
        ejection: section.interval("ejection", Duration::from_secs(10)),
        max_ejected_percent: u32::try_from(percent).unwrap_or(100),
    })
}

fn bytes(field: &Field<'_>) -> Option<Arc<[u8]>> {
    let bytes = if field.is_map() {
        let section = Section::open(field.clone(), BYTES);
        let hex = section.field("hex").and_then(|field| field.text().map(from_hex));
        match hex {
            Some(Some(bytes)) => bytes,
            Some(None) => {
                section.whole().refuse(BYTES_CURE);
                return None;
            }
            None => {
                if !section.has("hex") {
                    section.whole().refuse(BYTES_CURE);
                }
                return None;
            }
        }
    } else {
        field.text()?.as_bytes().to_vec()
    };
    if bytes.is_empty() || bytes.len() > BYTES_MAX {
        field.refuse(BYTES_CURE);
        return None;
    }
    Some(bytes.into())
}

/// Reads pairs of hexadecimal digits, with or without blanks between them.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> =
        text.chars().filter(|c| !c.is_ascii_whitespace()).map(|c| c.to_digit(16)).collect();
    let pair = |pair: &[u32]| match pair {
        [high, low] => u8::try_from(high * 16 + low).ok(),
        _ => None,
    };
    digits?.chunks(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_in_pairs() {
        assert_eq!(from_hex("00 00\n0008 04d2 162F"), Some(vec![0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f]));
        assert_eq!((from_hex("0"), from_hex("0g"), from_hex("")), (None, None, Some(Vec::new())));
    }
}
