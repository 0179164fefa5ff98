//! A Redis Cluster of real servers on free ports.

use std::net::TcpListener;

use redis::Value;

use super::{Redis, eventually, free_port, info};

/// The first primary owns the slot of the key `servers`, and has the one replica.
const PRIMARIES: u16 = 3;
const SLOTS: u16 = 16_384;
/// A node's cluster bus listens at its port plus this.
const BUS: u16 = 10_000;

/// Three primaries, and one replica of the first. Dropping it kills each by its own pid.
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

impl Cluster {
    /// The index of the replica among the nodes.
    pub const REPLICA: usize = PRIMARIES as usize;

    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// [`Cluster::start`] with more arguments for each server. Returns when all nodes know each other and
    /// the replica follows.
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
            // Let a replica take over even after it was cut off for long.
            "--cluster-replica-validity-factor",
            "0",
        ];
        // Redis 6.2 allows DEBUG to every client, and does not know the option.
        let debug: &[&str] = if Redis::is_before_7() { &[] } else { &["--enable-debug-command", "local"] };
        let arguments = [&own[..], debug, more].concat();
        let mut nodes = Vec::new();
        for _ in 0..=PRIMARIES {
            nodes.push(Redis::start_at(port_with_bus(), &arguments).await);
        }
        let cluster = Self { nodes };
        for (index, node) in cluster.nodes.iter().enumerate() {
            node.run(&format!("CLUSTER SET-CONFIG-EPOCH {}", index + 1)).await;
        }
        for index in 0..PRIMARIES {
            // The first primary gets the highest slots, among them that of `servers`.
            let (first, end) =
                ((PRIMARIES - 1 - index) * SLOTS / PRIMARIES, (PRIMARIES - index) * SLOTS / PRIMARIES);
            add_slots(&cluster.nodes[usize::from(index)], first, end).await;
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

    /// One node that owns all slots and has met no other node, so that it does not even know its own
    /// address.
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

    pub async fn id(&self, index: usize) -> String {
        node_id(&self.nodes[index]).await
    }

    /// The key `cluster` for the `redis` section of a config, with all nodes.
    pub fn section(&self) -> String {
        let nodes: Vec<String> =
            self.nodes.iter().map(|node| format!("\"127.0.0.1:{}\"", node.port)).collect();
        format!("cluster: {{nodes: [{}]}}", nodes.join(", "))
    }

    /// Cuts the node at `index` off: for a minute it hears no other node, while the others still know it.
    pub async fn cut_off(&self, index: usize) {
        let node = &self.nodes[index];
        if info(node, "server").await.contains("valkey_version") {
            // A Valkey node that forgets all others makes them forget each other, but it can drop their
            // packets.
            node.run("CONFIG SET cluster-node-timeout 60000").await;
            node.run("DEBUG DROP-CLUSTER-PACKET-FILTER -2").await;
            return;
        }
        node.run("CONFIG SET cluster-require-full-coverage no").await;
        // In one transaction: since Redis 7.2 a node tells the nodes it still knows which others to forget.
        let mut forget = redis::pipe();
        forget.atomic();
        for other in (0..self.nodes.len()).filter(|other| *other != index) {
            forget.cmd("CLUSTER").arg("FORGET").arg(self.id(other).await).ignore();
        }
        let mut connection = node.connection().await;
        forget.query_async::<()>(&mut connection).await.expect("the node forgets the others");
    }

    /// Waits until the node at `index` is a primary that takes writes.
    pub async fn takes_over(&self, index: usize) {
        eventually("the replica has taken over", || async {
            let node = &self.nodes[index];
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

/// Gives the node the slots from `first` to `end`, one by one: Redis 6.2 does not know ADDSLOTSRANGE.
async fn add_slots(node: &Redis, first: u16, end: u16) {
    let words = ["CLUSTER".to_owned(), "ADDSLOTS".to_owned()].into_iter();
    let words: Vec<String> = words.chain((first..end).map(|slot| slot.to_string())).collect();
    node.run_words(&words).await;
}

/// The text of an answer that must be a text.
fn text(value: Value) -> String {
    redis::from_redis_value(value).expect("a text")
}

/// A free port for a node of a cluster: the port of its bus is free too.
pub fn port_with_bus() -> u16 {
    loop {
        let port = free_port();
        if port.checked_add(BUS).is_some_and(|bus| TcpListener::bind(("127.0.0.1", bus)).is_ok()) {
            return port;
        }
    }
}
