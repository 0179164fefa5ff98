//! A Redis Cluster of real servers on free ports.

use std::net::TcpListener;

use redis::Value;

use super::{Redis, eventually, free_port, info};

/// The first has the slot of the key `servers`, the last is its replica.
const PRIMARIES: u16 = 3;
const SLOTS: u16 = 16_384;
/// The bus is at the port and this.
const BUS: u16 = 10_000;

/// Three primaries, and one replica of the first. Each is killed by its own pid when this is dropped.
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

impl Cluster {
    /// The place of the replica.
    pub const REPLICA: usize = PRIMARIES as usize;

    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With more arguments for each server. Waits until everybody knows everybody and the replica follows.
    pub async fn start_with(more: &[&str]) -> Self {
        let own = [
            "--notify-keyspace-events",
            "KA",
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--repl-diskless-sync-delay",
            "0",
            // A replica that was cut off for long is still better than none.
            "--cluster-replica-validity-factor",
            "0",
        ];
        // Redis 6.2 allows DEBUG to everybody, and does not know the option.
        let debug: &[&str] = if Redis::is_before_7() { &[] } else { &["--enable-debug-command", "local"] };
        let arguments = [&own[..], debug, more].concat();
        let mut nodes = Vec::new();
        for _ in 0..=PRIMARIES {
            nodes.push(Redis::start_at(port_with_bus(), &arguments).await);
        }
        let cluster = Self { nodes };
        for (place, node) in cluster.nodes.iter().enumerate() {
            node.run(&format!("CLUSTER SET-CONFIG-EPOCH {}", place + 1)).await;
        }
        for place in 0..PRIMARIES {
            // The highest slots first, `servers` among them.
            let (first, end) =
                ((PRIMARIES - 1 - place) * SLOTS / PRIMARIES, (PRIMARIES - place) * SLOTS / PRIMARIES);
            add_slots(&cluster.nodes[usize::from(place)], first, end).await;
        }
        for node in &cluster.nodes[1..] {
            cluster.nodes[0].run(&format!("CLUSTER MEET 127.0.0.1 {}", node.port)).await;
        }
        eventually("the nodes know each other", || async { cluster.is_whole().await }).await;
        let first = cluster.id(0).await;
        cluster.nodes[Self::REPLICA].run(&format!("CLUSTER REPLICATE {first}")).await;
        eventually("the replica follows", || async {
            info(&cluster.nodes[0], "replication").await.contains("state=online")
                && cluster.all_know(&format!("slave {first}")).await
        })
        .await;
        cluster
    }

    /// One node that owns all slots and has met nobody, so that it does not even know its own address.
    pub async fn alone(more: &[&str]) -> Redis {
        let own = ["--notify-keyspace-events", "KA", "--cluster-enabled", "yes"];
        let node = Redis::start_at(port_with_bus(), &[&own[..], more].concat()).await;
        add_slots(&node, 0, SLOTS).await;
        eventually("the cluster is up", || async {
            text(node.run("CLUSTER INFO").await).contains("cluster_state:ok")
        })
        .await;
        node
    }

    async fn is_whole(&self) -> bool {
        for node in &self.nodes {
            let state = text(node.run("CLUSTER INFO").await);
            if !state.contains("cluster_state:ok") || !state.contains("cluster_known_nodes:4") {
                return false;
            }
        }
        !self.all_know("handshake").await
    }

    async fn all_know(&self, part: &str) -> bool {
        for node in &self.nodes {
            if !text(node.run("CLUSTER NODES").await).contains(part) {
                return false;
            }
        }
        true
    }

    pub async fn id(&self, place: usize) -> String {
        node_id(&self.nodes[place]).await
    }

    /// For the `redis` section of a config: all nodes.
    pub fn section(&self) -> String {
        let nodes: Vec<String> =
            self.nodes.iter().map(|node| format!("\"127.0.0.1:{}\"", node.port)).collect();
        format!("cluster: {{nodes: [{}]}}", nodes.join(", "))
    }

    /// The node at `place` goes on alone: for a minute it hears nobody, while everybody still knows it.
    pub async fn cut_off(&self, place: usize) {
        let node = &self.nodes[place];
        if info(node, "server").await.contains("valkey_version") {
            // There a node that forgets all others makes them forget each other; but it can be made deaf.
            node.run("CONFIG SET cluster-node-timeout 60000").await;
            node.run("DEBUG DROP-CLUSTER-PACKET-FILTER -2").await;
            return;
        }
        node.run("CONFIG SET cluster-require-full-coverage no").await;
        // All at once: since Redis 7.2 a node tells those that it still knows whom they should forget too.
        let mut forget = redis::pipe();
        forget.atomic();
        for other in (0..self.nodes.len()).filter(|other| *other != place) {
            forget.cmd("CLUSTER").arg("FORGET").arg(self.id(other).await).ignore();
        }
        let mut connection = node.connection().await;
        forget.query_async::<()>(&mut connection).await.expect("it forgets them");
    }

    /// Waits until the node at `place` is a primary that takes writes.
    pub async fn takes_over(&self, place: usize) {
        eventually("the replica has taken over", || async {
            let node = &self.nodes[place];
            info(node, "replication").await.contains("role:master")
                && text(node.run("CLUSTER INFO").await).contains("cluster_state:ok")
        })
        .await;
    }
}

/// The name that a node of a cluster has for the others.
pub async fn node_id(node: &Redis) -> String {
    text(node.run("CLUSTER MYID").await)
}

/// Redis 6.2 does not know ranges.
async fn add_slots(node: &Redis, first: u16, end: u16) {
    let words = ["CLUSTER".to_owned(), "ADDSLOTS".to_owned()].into_iter();
    let words: Vec<String> = words.chain((first..end).map(|slot| slot.to_string())).collect();
    node.run_words(&words).await;
}

/// An answer that is a text.
fn text(value: Value) -> String {
    redis::from_redis_value(value).expect("a text")
}

/// A free port whose bus is free too.
pub fn port_with_bus() -> u16 {
    loop {
        let port = free_port();
        if port.checked_add(BUS).is_some_and(|bus| TcpListener::bind(("127.0.0.1", bus)).is_ok()) {
            return port;
        }
    }
}
