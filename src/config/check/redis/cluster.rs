//! `redis.cluster`: some nodes of a Redis Cluster, instead of `redis.url`.

use super::nodes;
use crate::config::Cluster;
use crate::config::decode::{Keys, Kind, Section};

/// `database` is a known key, so that the message about it can say that a cluster has only database 0.
const CLUSTER: Keys = Keys {
    now: &["nodes", "database"],
    later: &[],
    example: "{nodes: [\"10.0.0.1:6379\"]}",
    meant: &[(Kind::Text, "nodes")],
};
const PORT: u16 = 6379;

/// Reads `redis.cluster`. `None` where it is left out.
pub(super) fn cluster(redis: &Section<'_>) -> Option<Cluster> {
    let whole = redis.field("cluster")?;
    for other in ["url", "sentinel"] {
        if redis.has(other) {
            whole.refuse_unshown(format!("there is a {other}, too: keep one of them"));
        }
    }
    let section = redis.section("cluster", CLUSTER);
    if section.integer("database", 0..=u32::MAX.into(), 0) != 0 {
        section.field("database").inspect(|field| field.refuse("a cluster has only database 0: remove it"));
    }
    Some(Cluster { nodes: nodes::nodes(redis, &section, "node", PORT) })
}
