//! `nodes` of `redis.sentinel` and of `redis.cluster`: the servers that are asked for the primary.

use super::url::{address, host_and_port};
use crate::config::RedisAddress;
use crate::config::decode::Section;

/// A few are enough.
const NODES_MAX: usize = 100;

/// Reads `nodes`. Messages call one of them `what`: `sentinel` or `node`.
pub(super) fn nodes(redis: &Section<'_>, section: &Section<'_>, what: &str, port: u16) -> Vec<RedisAddress> {
    // Either all servers and nodes speak TLS, or none of them does.
    let secure = redis.has("tls");
    let mut nodes = Vec::new();
    let Some(field) = section.field("nodes") else {
        if !section.has("nodes") {
            let cure = format!("it is missing: name the {what}s, like [\"10.0.0.1:{port}\"]");
            section.whole().miss("nodes", cure);
        }
        return nodes;
    };
    for node in field.one_or_many() {
        let Some(text) = node.text() else { continue };
        match host_and_port(text, port).map(|(host, port)| address(host, port, secure)) {
            Some(address) if nodes.contains(&address) => node.refuse("it is written twice: keep one of them"),
            Some(address) => nodes.push(address),
            None => node.refuse(format_args!("write a {what} like \"10.0.0.1:{port}\" or \"[::1]:{port}\"")),
        }
    }
    if field.one_or_many().is_empty() {
        field.refuse_unshown(format!("it is empty: name the {what}s, like [\"10.0.0.1:{port}\"]"));
    }
    if nodes.len() > NODES_MAX {
        field.refuse_unshown(format!("at most {NODES_MAX} are possible: a few are enough"));
    }
    nodes
}
