//! While a slot of a Redis Cluster moves, its keys are on two nodes: each pool is read from the node that
//! has its key.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::support::{Cluster, Proxy, Redis, eventually};

/// No full read happens within a scenario, so a change that arrives was notified.
const SETTINGS: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 2s, connect_timeout: 2s, max_stale: 10s";
/// The slot of the key `servers`.
const SLOT: u16 = 11_335;

/// A proxy with the pools `web` and `api`. Their keys share a slot, which moves from the first node to the
/// second.
struct Setup {
    cluster: Cluster,
    proxy: Proxy,
}

impl Setup {
    async fn start(settings: &str) -> Self {
        let cluster = Cluster::start().await;
        let proxy = Proxy::start(&format!(
            "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
             pools: {{web: {{weights_key: servers}}, api: {{weights_key: \"{{servers}}:api\"}}}}\n\
             redis: {{{}, {SETTINGS}, {settings}}}\n",
            cluster.section()
        ));
        let setup = Self { cluster, proxy };
        setup.write(0, "servers", 1).await;
        setup.write(0, "{servers}:api", 1).await;
        setup.see([1, 1]).await;
        let (from, to) = (setup.cluster.id(0).await, setup.cluster.id(1).await);
        setup.node(1).run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
        setup.node(0).run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
        setup
    }

    fn node(&self, node: usize) -> &Redis {
        &self.cluster.nodes[node]
    }

    async fn write(&self, node: usize, key: &str, weight: u32) {
        let mut write = redis::pipe();
        write.cmd("ASKING").ignore().cmd("ZADD").arg(key).arg(weight).arg("10.0.0.1:80").ignore();
        let mut connection = self.node(node).connection().await;
        write.query_async::<()>(&mut connection).await.expect("it has the key");
    }

    async fn move_key(&self, key: &str) {
        let port = self.node(1).port;
        self.node(0).run(&format!("MIGRATE 127.0.0.1 {port} {key} 0 5000")).await;
    }

    /// Waits until the two pools have these weights. Neither may be without a table meanwhile.
    async fn see(&self, weights: [u32; 2]) {
        let were_there = self.weights().iter().all(Option::is_some);
        eventually(&format!("both have {weights:?}"), || async {
            let seen = self.weights();
            assert!(!were_there || seen.iter().all(Option::is_some), "a table is gone: {seen:?}");
            seen == weights.map(|weight| Some(f64::from(weight)))
        })
        .await;
    }

    fn weights(&self) -> [Option<f64>; 2] {
        [0, 1].map(|index| {
            let snapshot = self.proxy.running.observed.pools()[index].pool.cell.load();
            snapshot.members().first().map(|member| member.weight.get())
        })
    }
}

#[tokio::test]
async fn a_key_that_moves_before_its_slot_leaves_the_other_pool_on_its_node() {
    let setup = Setup::start("on_empty: keep_last").await;
    both_pools_are_followed_while_one_key_has_moved(&setup).await;
}

#[tokio::test]
async fn a_key_that_moves_before_its_slot_is_never_taken_for_an_empty_table() {
    let setup = Setup::start("on_empty: refuse").await;
    both_pools_are_followed_while_one_key_has_moved(&setup).await;
}

async fn both_pools_are_followed_while_one_key_has_moved(setup: &Setup) {
    setup.move_key("servers").await;
    for weight in 2..6 {
        setup.write(1, "servers", weight).await;
        setup.write(0, "{servers}:api", weight).await;
        setup.see([weight; 2]).await;
    }
    setup.move_key("{servers}:api").await;
    setup.write(1, "{servers}:api", 7).await;
    setup.see([5, 7]).await;
}

#[tokio::test]
async fn a_pool_whose_moved_key_died_with_its_node_is_read_from_the_owner_again() {
    let mut setup = Setup::start("on_empty: keep_last").await;
    for node in &setup.cluster.nodes {
        node.run("CONFIG SET cluster-require-full-coverage no").await;
    }
    setup.move_key("servers").await;
    setup.write(1, "servers", 2).await;
    setup.see([2, 1]).await;
    setup.cluster.nodes[1].kill();
    setup.node(0).run(&format!("CLUSTER SETSLOT {SLOT} STABLE")).await;
    setup.write(0, "servers", 3).await;
    setup.write(0, "{servers}:api", 3).await;
    setup.see([3, 3]).await;
}

/// A reshard was aborted and cleaned up on one of the two nodes only.
#[tokio::test]
async fn a_key_that_moves_back_is_read_from_its_owner_although_the_other_node_still_imports_the_slot() {
    let setup = Setup::start("on_empty: refuse").await;
    setup.move_key("servers").await;
    setup.write(1, "servers", 2).await;
    setup.see([2, 1]).await;
    setup.node(0).run(&format!("CLUSTER SETSLOT {SLOT} STABLE")).await;
    let mut back = redis::pipe();
    back.cmd("ASKING").ignore().cmd("MIGRATE").arg("127.0.0.1").arg(setup.node(0).port);
    back.arg("servers").arg(0).arg(5000).ignore();
    let mut connection = setup.node(1).connection().await;
    back.query_async::<()>(&mut connection).await.expect("it has the key");
    setup.see([2, 1]).await;
    for weight in 3..6 {
        setup.write(0, "servers", weight).await;
        setup.see([weight, 1]).await;
    }
}

#[tokio::test]
async fn a_table_that_is_deleted_after_its_key_moved_is_empty() {
    let setup = Setup::start("on_empty: refuse").await;
    setup.move_key("servers").await;
    setup.write(1, "servers", 2).await;
    setup.see([2, 1]).await;
    let mut delete = redis::pipe();
    delete.cmd("ASKING").ignore().cmd("DEL").arg("servers").ignore();
    let mut connection = setup.node(1).connection().await;
    delete.query_async::<()>(&mut connection).await.expect("it has the key");
    eventually("it is empty", || async { setup.weights() == [None, Some(1.0)] }).await;
    setup.write(1, "servers", 3).await;
    eventually("it is back", || async { setup.weights() == [Some(3.0), Some(1.0)] }).await;
}

/// There are more nodes than are asked at once, so that each failure makes room for the next node.
#[tokio::test]
async fn nodes_that_are_all_down_are_not_dialled_without_a_pause() {
    let (dialled, mut nodes) = (Arc::new(AtomicU32::new(0)), Vec::new());
    for _ in 0..9 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        nodes.push(format!("\"{}\"", listener.local_addr().expect("bound")));
        let dialled = Arc::clone(&dialled);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                dialled.fetch_add(1, Relaxed);
                drop(client);
            }
        });
    }
    let section = format!("cluster: {{nodes: [{}]}}", nodes.join(", "));
    let _proxy = Proxy::web(&format!("redis: {{{section}, {SETTINGS}}}"), "weights_key: servers");
    eventually("each was dialled", || async { dialled.load(Relaxed) >= 9 }).await;
    let before = dialled.load(Relaxed);
    // At most two connections per node and heartbeat are allowed, and a fifth more.
    sleep(Duration::from_secs(2)).await;
    let count = dialled.load(Relaxed) - before;
    assert!((7..=9 * 10).contains(&count), "{count} connections in 2 s");
}
