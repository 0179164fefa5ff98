//! `redis.sentinel`: who is asked for the primary, instead of `redis.url`.

use super::redis::password_beside;
use super::redis_url::{address, host_and_port};
use crate::config::Sentinel;
use crate::config::decode::{Keys, Section};

const SENTINEL: Keys =
    Keys { now: &["master", "nodes", "database", "username", "password", "password_file"], later: &[] };
const PORT: u16 = 26379;
/// Each is asked at every heartbeat; nobody has more than a handful.
const NODES_MAX: usize = 100;

/// The section with the number of the database; `None` where it is left out.
pub(super) fn sentinel(redis: &Section<'_>) -> Option<(Sentinel, u32)> {
    let whole = redis.field("sentinel")?;
    if redis.has("url") {
        whole.refuse_unshown("there is a url, too: keep one of them");
    }
    let section = redis.section("sentinel", SENTINEL);
    let field = section.field("master");
    if let Some(empty) = field.as_ref().filter(|field| field.is_text("")) {
        empty.refuse("write the name that the sentinels know the primary by");
    }
    let master = field.and_then(|field| field.text()).map(str::to_owned);
    if !section.has("master") {
        whole.miss("master", "it is missing: write the name that the sentinels know the primary by");
    }
    // What holds of the servers holds of their sentinels: both speak TLS, or none does.
    let secure = redis.has("tls");
    let mut nodes = Vec::new();
    if let Some(field) = section.field("nodes") {
        for node in field.one_or_many() {
            let Some(text) = node.text() else { continue };
            match host_and_port(text, PORT).map(|(host, port)| address(host, port, secure)) {
                Some(address) if nodes.contains(&address) => {
                    node.refuse("it is there twice: keep one of them")
                }
                Some(address) => nodes.push(address),
                None => node.refuse("write a sentinel like \"10.0.0.1:26379\" or \"[::1]:26379\""),
            }
        }
        if field.one_or_many().is_empty() {
            field.refuse_unshown("it is empty: name the sentinels, like [\"10.0.0.1:26379\"]");
        }
        if nodes.len() > NODES_MAX {
            field.refuse_unshown(format!("at most {NODES_MAX} are possible: a few are enough"));
        }
    } else if !section.has("nodes") {
        whole.miss("nodes", "it is missing: name the sentinels, like [\"10.0.0.1:26379\"]");
    }
    let database = section.integer("database", 0..=u32::MAX.into(), 0);
    let sentinel = Sentinel {
        master: master.unwrap_or_default(),
        nodes,
        username: section.field("username").and_then(|field| field.text()).map(str::to_owned),
        password: password_beside(&section, None),
    };
    Some((sentinel, u32::try_from(database).unwrap_or(0)))
}
