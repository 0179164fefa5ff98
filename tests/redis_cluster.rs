//! In a Redis Cluster each pool's table is read from the node that owns its slot, also after the slot or its
//! owner changes.
//!
//! Each scenario starts its own cluster: three primaries, and a replica of the primary that has the key
//! `servers`.

use std::time::Duration;

use redis::Value;
use serde_json::Value as Json;
use tokio::time::Instant;

use crate::support::{
    Backend, Cluster, CommandOutput, Program, Proxy, Redis, Traffic, eventually, free_port, greeting, info,
    program_following, silent_address,
};

const HEARTBEAT: Duration = Duration::from_millis(500);
/// No full read happens within a scenario, so a change that arrives was notified. The timeouts allow for a
/// busy machine.
const SETTINGS: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 2s, connect_timeout: 2s, max_stale: 10s";
/// With these settings silence does not end a connection: a frozen server is left only because the cluster
/// names another.
const PATIENT: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 60s, connect_timeout: 2s, max_stale: 2m";
/// The slot of the key `servers`.
const SLOT: u16 = 11_335;
/// New weights must arrive within one second; two more are for a test machine with two cores and other
/// tests.
const AT_ONCE: Duration = Duration::from_secs(1 + 2);

/// A proxy that follows the cluster, a backend in its table, and traffic.
struct Setup {
    cluster: Cluster,
    proxy: Proxy,
    backend: Backend,
    traffic: Traffic,
}

impl Setup {
    async fn start(settings: &str) -> Self {
        let (cluster, backend) = (Cluster::start().await, Backend::named("backend").await);
        cluster.nodes[0].set_weights([(&backend, 1.0)]).await;
        let proxy = follow(&cluster, settings);
        eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
        // Waits until the replica has the table, so that no failover loses it.
        assert_eq!(cluster.nodes[0].run("WAIT 1 20000").await, Value::Int(1));
        let traffic = Traffic::start(proxy.address());
        traffic.more(20).await;
        Self { cluster, proxy, backend, traffic }
    }

    async fn write(&self, node: usize, weight: f64) {
        self.cluster.nodes[node].run(&format!("ZADD servers {weight} {}", self.backend.address)).await;
    }

    fn weight(&self) -> f64 {
        self.proxy.weights()[0].1
    }

    /// Writes a weight to a node and returns how long the proxy took to have it.
    async fn arrives(&self, node: usize, weight: f64) -> Duration {
        self.write(node, weight).await;
        self.seen(weight).await
    }

    /// Waits until the proxy has `weight`.
    async fn seen(&self, weight: f64) -> Duration {
        let written = Instant::now();
        eventually(&format!("weight {weight} arrives"), || async { self.weight() == weight }).await;
        written.elapsed()
    }

    /// The old primary, which is the first node, still accepts writes, and they do not reach the proxy.
    async fn does_not_follow_the_old_primary(&self) {
        let role = info(&self.cluster.nodes[0], "replication").await;
        assert!(role.contains("role:master"), "{role}");
        self.write(0, 99.0).await;
        let written = Instant::now();
        eventually("two heartbeats have passed", || async {
            assert_ne!(self.weight(), 99.0, "the proxy follows the old primary");
            written.elapsed() > 2 * HEARTBEAT
        })
        .await;
    }
}

fn follow(cluster: &Cluster, settings: &str) -> Proxy {
    Proxy::web(&format!("redis: {{{}, {settings}}}", cluster.section()), "weights_key: servers")
}

/// The weights of the backends of the pool with this index.
fn weights_of(proxy: &Proxy, index: usize) -> Vec<f64> {
    let snapshot = proxy.running.observed.pools()[index].pool.cell.load();
    snapshot.members().iter().map(|member| member.weight.get()).collect()
}

#[tokio::test]
async fn pools_on_different_nodes_are_followed_over_one_connection_a_node() {
    let cluster = Cluster::start().await;
    // Each key with the node that owns its slot.
    let keys = [("servers", 0), ("other", 0), ("api", 1), ("queues", 2)];
    for (key, node) in keys {
        cluster.nodes[node].run(&format!("ZADD {key} 1 10.0.0.1:80")).await;
    }
    let pools: Vec<String> = keys.iter().map(|(key, _)| format!("{key}: {{weights_key: {key}}}")).collect();
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: servers}}}}\npools: {{{}}}\nredis: {{{}, {SETTINGS}}}\n",
        pools.join(", "),
        cluster.section()
    ));
    for weight in [1.0, 2.0, 3.0] {
        for (index, (key, node)) in keys.into_iter().enumerate() {
            cluster.nodes[node].run(&format!("ZADD {key} {weight} 10.0.0.1:80")).await;
            eventually(&format!("{key} arrives"), || async { weights_of(&proxy, index) == [weight] }).await;
        }
    }
    assert_eq!(proxy.metric("statera_redis_watch_mode{mode=\"notifications\"}"), Some(1.0));
    for node in &cluster.nodes[..Cluster::REPLICA] {
        let clients: String = redis::from_redis_value(node.run("CLIENT LIST").await).expect("a text");
        let watching = clients.lines().filter(|client| !client.contains(" sub=0 ")).count();
        assert_eq!(watching, 1, "{clients}");
    }
}

#[tokio::test]
async fn a_planned_failover_fails_no_session_and_new_weights_arrive_at_once() {
    let setup = Setup::start(SETTINGS).await;
    setup.cluster.nodes[Cluster::REPLICA].run("CLUSTER FAILOVER").await;
    setup.cluster.takes_over(Cluster::REPLICA).await;
    let took = setup.arrives(Cluster::REPLICA, 5.0).await;
    println!("new weights took {took:?}");
    assert!(took < AT_ONCE, "it took {took:?}");
    let took = setup.arrives(Cluster::REPLICA, 6.0).await;
    assert!(took < AT_ONCE, "it took {took:?}");
    eventually("it is connected", || async { setup.proxy.metric("statera_redis_connected") == Some(1.0) })
        .await;
    setup.traffic.more(20).await;
    setup.traffic.stop().await;
}

#[tokio::test]
async fn a_primary_that_is_killed_is_followed_by_its_replica_and_no_session_fails() {
    let mut setup = Setup::start(SETTINGS).await;
    setup.cluster.nodes[0].kill();
    setup.cluster.takes_over(Cluster::REPLICA).await;
    let took = setup.arrives(Cluster::REPLICA, 5.0).await;
    println!("new weights took {took:?}");
    assert!(took < AT_ONCE, "it took {took:?}");
    setup.traffic.more(20).await;
    setup.traffic.stop().await;
}

/// Moves the slot as `redis-cli --cluster reshard` does, with a weight change at every step.
#[tokio::test]
async fn a_slot_that_moves_to_another_node_is_followed_at_every_step() {
    let setup = Setup::start(SETTINGS).await;
    let nodes = &setup.cluster.nodes;
    let (from, to) = (setup.cluster.id(0).await, setup.cluster.id(1).await);
    nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
    nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
    setup.arrives(0, 2.0).await;
    nodes[0].run(&format!("MIGRATE 127.0.0.1 {} servers 0 5000", nodes[1].port)).await;
    // The key has moved and its slot has not: the new node serves the key only after ASKING.
    for weight in [3.0, 4.0] {
        let mut ahead = redis::pipe();
        ahead.cmd("ASKING").ignore();
        ahead.cmd("ZADD").arg("servers").arg(weight).arg(setup.backend.address.to_string()).ignore();
        let mut connection = nodes[1].connection().await;
        ahead.query_async::<()>(&mut connection).await.expect("it is importing the slot");
        setup.seen(weight).await;
    }
    nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} NODE {to}")).await;
    setup.arrives(1, 5.0).await;
    nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} NODE {to}")).await;
    setup.arrives(1, 6.0).await;
    setup.traffic.stop().await;
}

/// The old primary was frozen. When it wakes up it still acts as a primary: it accepts writes and notifies
/// of them.
#[tokio::test]
async fn an_old_primary_that_wakes_up_is_not_followed_after_the_failover() {
    let setup = Setup::start(PATIENT).await;
    let nodes = &setup.cluster.nodes;
    setup.cluster.cut_off(0).await;
    nodes[0].freeze();
    setup.cluster.takes_over(Cluster::REPLICA).await;
    let took = setup.arrives(Cluster::REPLICA, 5.0).await;
    println!("new weights took {took:?}");
    nodes[0].thaw();
    setup.does_not_follow_the_old_primary().await;
    setup.arrives(Cluster::REPLICA, 6.0).await;
    setup.traffic.stop().await;
}

/// The network is split: the old primary answers only the proxy, and the other nodes elect a new primary.
#[tokio::test]
async fn an_old_primary_that_never_stopped_is_not_followed_after_the_failover() {
    let setup = Setup::start(SETTINGS).await;
    let nodes = &setup.cluster.nodes;
    setup.cluster.cut_off(0).await;
    nodes[Cluster::REPLICA].run("CLUSTER FAILOVER TAKEOVER").await;
    setup.cluster.takes_over(Cluster::REPLICA).await;
    let took = setup.arrives(Cluster::REPLICA, 5.0).await;
    println!("new weights took {took:?}");
    setup.does_not_follow_the_old_primary().await;
    setup.arrives(Cluster::REPLICA, 6.0).await;
    setup.traffic.stop().await;
}

#[tokio::test]
async fn nodes_that_are_down_or_silent_do_not_delay_the_table() {
    let cluster = Cluster::start().await;
    cluster.nodes[0].run("ZADD servers 1 10.0.0.1:80").await;
    let (_silent, silent) = silent_address().await;
    let section = format!(
        "cluster: {{nodes: [\"127.0.0.1:{}\", \"{silent}\", \"127.0.0.1:{}\"]}}",
        free_port(),
        cluster.nodes[1].port
    );
    let proxy = Proxy::web(&format!("redis: {{{section}, {SETTINGS}}}"), "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    // The proxy has learned the other nodes from this one and no longer needs it.
    cluster.nodes[1].freeze();
    cluster.nodes[0].run("ZADD servers 2 10.0.0.1:80").await;
    eventually("a change arrives", || async { proxy.weights()[0].1 == 2.0 }).await;
    cluster.nodes[1].thaw();
}

#[tokio::test]
async fn a_frozen_node_stops_the_lua_pick_of_its_own_pools_only() {
    let (cluster, backend) = (Cluster::start().await, Backend::named("picked").await);
    // Without the right to subscribe the proxy cannot watch, so sessions need the Lua pick.
    for node in &cluster.nodes {
        node.grant(&LEAST_RIGHTS.replace(" +subscribe", "").replace("servers* ", "* ")).await;
    }
    for (key, node) in [("servers", 0), ("api", 1)] {
        cluster.nodes[node].run(&format!("ZADD {key} 1 {}", backend.address)).await;
    }
    let configured = Backend::named("configured").await;
    let pool = |key| format!("{key}: {{weights_key: {key}, backends: {{\"{}\": 1}}}}", configured.address);
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{a: {{bind: \"127.0.0.1:0\", pool: servers}}, b: {{bind: \"127.0.0.1:0\", pool: api}}}}\n\
         pools: {{{}, {}}}\nlua_pick: {{timeout: 2s}}\nredis: {{{}, watch: notifications, username: statera, password: secret, {}}}\n",
        pool("servers"),
        pool("api"),
        cluster.section(),
        SETTINGS.replace("response_timeout: 2s", "response_timeout: 500ms")
    ));
    let [first, second] = [0, 1].map(|listener| proxy.running.addresses[listener].1[0]);
    let says = async |address, name| greeting(address).await.is_ok_and(|greeting| greeting == name);
    eventually("redis picks for both", || async {
        says(first, "picked").await && says(second, "picked").await
    })
    .await;
    cluster.nodes[1].freeze();
    eventually("it does not pick for the second", || async { says(second, "configured").await }).await;
    let by_lua = "statera_picks_total{pool=\"servers\",source=\"lua\"}";
    let before = proxy.metric(by_lua).expect("it is counted");
    for _ in 0..10 {
        assert!(says(first, "picked").await, "it does not pick for the first either");
        assert!(says(second, "configured").await, "a frozen node picked");
    }
    assert_eq!(proxy.metric(by_lua), Some(before + 10.0));
    cluster.nodes[1].thaw();
    eventually("it picks again", || async { says(second, "picked").await }).await;
}

/// The rights that docs/questions/redis-rights.md lists for an operator to grant.
const LEAST_RIGHTS: &str = "on >secret resetkeys %R~servers* %R~{servers}:states resetchannels &__keyspace@0__:servers* \
                            &__keyspace@0__:{servers}:states nocommands +hello +auth +ping +hlen +hgetall +hget +hstrlen \
                            +select +client|setname +client|id +client|tracking +subscribe +unsubscribe +zrange +zcard +eval_ro \
                            +evalsha_ro +script|load +config|get +cluster|slots +cluster|nodes +asking";

#[tokio::test]
async fn the_documented_rights_are_enough_also_while_a_slot_moves() {
    let cluster = Cluster::start().await;
    for node in &cluster.nodes {
        node.grant(LEAST_RIGHTS).await;
    }
    cluster.nodes[0].run("ZADD servers 1 10.0.0.1:80").await;
    let user = format!("username: statera, password: secret, {SETTINGS}");
    let proxy = follow(&cluster, &user);
    let sees = async |weight| {
        eventually("a change arrives", || async { weights_of(&proxy, 0) == [weight] }).await;
    };
    sees(1.0).await;
    assert_eq!(proxy.metric("statera_redis_watch_mode{mode=\"notifications\"}"), Some(1.0));
    let (from, to) = (cluster.id(0).await, cluster.id(1).await);
    cluster.nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
    cluster.nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
    cluster.nodes[0].run("ZADD servers 2 10.0.0.1:80").await;
    sees(2.0).await;
    cluster.nodes[0].run(&format!("MIGRATE 127.0.0.1 {} servers 0 5000", cluster.nodes[1].port)).await;
    let mut ahead = redis::pipe();
    ahead.cmd("ASKING").ignore().cmd("ZADD").arg("servers").arg(3).arg("10.0.0.1:80").ignore();
    let mut connection = cluster.nodes[1].connection().await;
    ahead.query_async::<()>(&mut connection).await.expect("it is importing the slot");
    sees(3.0).await;
}

/// Waits for the log line `message` and returns its error and its cure.
async fn refusal(section: &str, message: &str) -> (String, String) {
    let program = program_following(section);
    let line = program.says(message).await;
    let field = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
    (field("error"), field("cure"))
}

#[tokio::test]
async fn a_wrong_cluster_setting_is_logged_with_its_cure() {
    const NO_OWNER: &str = "no node of the cluster says who owns the weights";
    let cluster = Cluster::start().await;
    for node in &cluster.nodes {
        node.grant(&LEAST_RIGHTS.replace(" +cluster|slots +cluster|nodes", "")).await;
    }
    let as_user = format!("{}, username: statera, password: secret", cluster.section());
    let (error, cure) = refusal(&as_user, NO_OWNER).await;
    assert!(error.contains("cluster") && cure.contains("grant"), "{error}: {cure}");

    let alone = Redis::start().await;
    let (error, cure) =
        refusal(&format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", alone.port), NO_OWNER).await;
    assert!(error.contains("not part of a cluster") && cure.contains("redis.url"), "{error}: {cure}");

    let (_, cure) = refusal(&format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", free_port()), NO_OWNER).await;
    assert!(cure.contains("redis.cluster.nodes"), "{cure}");

    // `redis.url` names a node of a cluster.
    let plain = program_following(&format!("url: \"{}\"", cluster.nodes[1].url()));
    let line = plain.says("cannot read the weights").await;
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("write redis.cluster"), "{line}");

    // No node owns the slot any more. The replica must not still report its primary as the owner.
    for node in &cluster.nodes {
        node.run(&format!("CLUSTER DELSLOTS {SLOT}")).await;
    }
    let lost = program_following(&cluster.section());
    let line = lost.says("no node of the cluster serves the weights").await;
    assert_eq!((&line["pool"], &line["slot"]), (&"web".into(), &SLOT.into()), "{line}");
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("CLUSTER NODES")), "{line}");
}

/// Runs `statera weights` with these words and this config file.
async fn typed(config: &std::path::Path, words: &[&str]) -> CommandOutput {
    let mut command = std::process::Command::new(Program::path());
    command.arg("weights").args(words).arg("-c").arg(config);
    CommandOutput::of(command).await
}

#[tokio::test]
async fn weights_are_changed_by_command_and_reported_by_proxies_also_while_a_slot_moves() {
    let cluster = Cluster::start().await;
    let yaml = format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{{}, {SETTINGS}}}\n",
        // The only configured node does not own the slot.
        format_args!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", cluster.nodes[2].port)
    );
    let proxy = Proxy::start(&yaml);
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("config.yaml");
    std::fs::write(&config, yaml).expect("a file");
    let done = async |words: &[&str]| {
        let typed = typed(&config, words).await;
        assert_eq!((typed.code, typed.stderr.as_str()), (Some(0), ""), "{words:?}");
        typed.stdout
    };
    let answer = done(&["set", "web", "10.0.0.1:80=5", "--wait=20s"]).await;
    assert!(answer.contains("applied by 1 proxy"), "{answer}");
    assert_eq!(weights_of(&proxy, 0), [5.0]);

    // All keys of the pool move before the slot itself does.
    let (from, to) = (cluster.id(0).await, cluster.id(1).await);
    cluster.nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
    cluster.nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
    done(&["set", "web", "10.0.0.1:80=6", "--wait=20s"]).await;
    let keys = cluster.nodes[0].run(&format!("CLUSTER GETKEYSINSLOT {SLOT} 100")).await;
    let keys: Vec<String> = redis::from_redis_value(keys).expect("a list");
    assert_eq!(keys.len(), 5, "{keys:?}");
    for key in keys {
        // REPLACE, because the proxy may have written its report to the new node already.
        let port = cluster.nodes[1].port;
        cluster.nodes[0].run(&format!("MIGRATE 127.0.0.1 {port} {key} 0 5000 REPLACE")).await;
    }
    done(&["set", "web", "10.0.0.1:80=7", "--wait=20s"]).await;
    eventually("the change arrives", || async { weights_of(&proxy, 0) == [7.0] }).await;
    cluster.nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} NODE {to}")).await;
    cluster.nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} NODE {to}")).await;
    done(&["rollback", "web", "--wait=20s"]).await;
    assert_eq!(weights_of(&proxy, 0), [6.0]);
    let history: Json = serde_json::from_str(&done(&["history", "web", "--json"]).await).expect("JSON");
    assert_eq!(history["entries"].as_array().map(Vec::len), Some(4), "{history}");
}
