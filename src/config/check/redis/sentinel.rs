//! `redis.sentinel`: the sentinels that are asked for the primary, instead of `redis.url`.

use super::nodes;
use super::password_beside;
use crate::config::Sentinel;
use crate::config::decode::{Keys, Section};

const SENTINEL: Keys = Keys {
    now: &["master", "nodes", "database", "username", "password", "password_file"],
    later: &[],
    example: "{master: mymaster, nodes: [\"10.0.0.1:26379\"]}",
    meant: &[],
};
const PORT: u16 = 26379;

/// Reads `redis.sentinel` and the database number in it. `None` where it is left out.
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
    let nodes = nodes::nodes(redis, &section, "sentinel", PORT);
    let database = section.integer("database", 0..=u32::MAX.into(), 0);
    let sentinel = Sentinel {
        master: master.unwrap_or_default(),
        nodes,
        username: section.field("username").and_then(|field| field.text()).map(str::to_owned),
        password: password_beside(&section, None),
    };
    Some((sentinel, u32::try_from(database).unwrap_or(0)))
}
