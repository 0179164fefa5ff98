//! A Redis Cluster of thousands of slot ranges that does not change costs few bytes, and a change is still
//! noticed.

use redis::Value;

use crate::support::{Cluster, Proxy, Redis, eventually, node_id};

/// The slot of the key `servers`; it is odd.
const SLOT: u16 = 11_335;
const SETTINGS: &str = "heartbeat_interval: 200ms, resync_interval: 1h, response_timeout: 10s, connect_timeout: 10s, max_stale: 1m";

/// How often the server has run the commands whose names begin with `name`, by its own count.
async fn calls_of_all(redis: &Redis, name: &str) -> u64 {
    let info: String = redis::from_redis_value(redis.run("INFO commandstats").await).expect("a text");
    let name = format!("cmdstat_{name}");
    let lines = info.lines().filter(|line| line.starts_with(&name));
    lines.filter_map(|line| line.split_once(":calls=")?.1.split(',').next()?.parse::<u64>().ok()).sum()
}

/// The slot ranges that a node lists.
async fn ranges(redis: &Redis) -> usize {
    let Value::Array(ranges) = redis.run("CLUSTER SLOTS").await else { panic!("no ranges") };
    ranges.len()
}

async fn costs_little_and_is_followed(ranges_wanted: usize, slots: [Vec<u16>; 2]) {
    let arguments = [
        "--notify-keyspace-events",
        "KA",
        "--cluster-enabled",
        "yes",
        "--cluster-require-full-coverage",
        "no",
    ];
    let (first, second) = (Redis::start_with(&arguments).await, Redis::start_with(&arguments).await);
    for (epoch, (node, slots)) in [&first, &second].into_iter().zip(&slots).enumerate() {
        node.run(&format!("CLUSTER SET-CONFIG-EPOCH {}", epoch + 1)).await;
        let slots: Vec<String> = slots.iter().map(u16::to_string).collect();
        node.run(&format!("CLUSTER ADDSLOTS {}", slots.join(" "))).await;
    }
    second.run(&format!("CLUSTER MEET 127.0.0.1 {}", first.port)).await;
    eventually("the nodes know each other's slots", || async {
        ranges(&first).await == ranges_wanted && ranges(&second).await == ranges_wanted
    })
    .await;
    // The cluster must be up before a write succeeds.
    eventually("the cluster is up", || async {
        let info: String = redis::from_redis_value(first.run("CLUSTER INFO").await).expect("a text");
        info.contains("cluster_state:ok")
    })
    .await;
    first.run("ZADD servers 1 10.0.0.1:80").await;
    let section =
        format!("cluster: {{nodes: [\"127.0.0.1:{}\", \"127.0.0.1:{}\"]}}", first.port, second.port);
    let proxy = Proxy::web(&format!("redis: {{{section}, {SETTINGS}}}"), "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    eventually("its first questions are answered", || async { calls_of_all(&first, "zcard").await > 3 })
        .await;

    let (wholes, glances) =
        (calls_of_all(&first, "cluster|slots").await, calls_of_all(&first, "zcard").await);
    eventually("it asks many times", || async { calls_of_all(&first, "zcard").await > glances + 30 }).await;
    let more = calls_of_all(&first, "cluster|slots").await - wholes;
    assert!(more <= 1, "{more} whole answers of {ranges_wanted} ranges in 30 rounds");

    // Moves the slot as `redis-cli --cluster reshard` does. No notification announces such a move.
    let (from, to) = (node_id(&first).await, node_id(&second).await);
    second.run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
    first.run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
    first.run(&format!("MIGRATE 127.0.0.1 {} servers 0 5000", second.port)).await;
    // The first node learns of the move from the second one and drops its copy of the slot.
    second.run(&format!("CLUSTER SETSLOT {SLOT} NODE {to}")).await;
    second.run("ZADD servers 7 10.0.0.1:80").await;
    eventually("the new owner is followed", || async { proxy.weights().first().is_some_and(|w| w.1 == 7.0) })
        .await;
}

#[tokio::test]
async fn an_unchanged_cluster_of_two_thousand_ranges_is_not_read_whole_again_and_again() {
    let of_the_first = (0..1_999).map(|range| 2 * range + 9_001);
    let of_the_second = std::iter::once(0);
    let first: Vec<u16> = of_the_first.collect();
    costs_little_and_is_followed(first.len() + 1, [first, of_the_second.collect()]).await;
}

#[tokio::test]
async fn an_unchanged_cluster_of_16384_ranges_is_not_read_whole_again_and_again() {
    let [odd, even] = [1, 0].map(|first| (first..16_384).step_by(2).collect());
    costs_little_and_is_followed(16_384, [odd, even]).await;
}

/// In a cluster of few ranges the proxy reads all of them each time, by the same two commands.
#[tokio::test]
async fn a_cluster_of_few_ranges_is_asked_for_all_of_them() {
    let node = Cluster::alone(&[]).await;
    node.run("ZADD servers 1 10.0.0.1:80").await;
    let section = format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", node.port);
    let proxy = Proxy::web(&format!("redis: {{{section}, {SETTINGS}}}"), "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    let wholes = calls_of_all(&node, "cluster|slots").await;
    eventually("it asks many times", || async { calls_of_all(&node, "cluster|slots").await > wholes + 10 })
        .await;
    // At most those before the first answer, when the number of ranges is not known yet.
    assert!(calls_of_all(&node, "zcard").await <= 2);
}
