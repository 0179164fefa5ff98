//! In a Redis Cluster each pool's table is read from the node that owns its slot, wherever that goes.
//!
//! Each scenario has a cluster of its own: three primaries, and a replica of the one that has `servers`.

use std::time::Duration;

use redis::Value;
use serde_json::Value as Json;
use tokio::time::Instant;

use crate::support::{
    Backend, Cluster, Program, Proxy, Redis, Traffic, Typed, eventually, free_port, greeting, info,
    program_following, silent_address,
};

const HEARTBEAT: Duration = Duration::from_millis(500);
/// A reconnect or a re-read tells nothing in time: what arrives was followed. The deadlines are a busy machine's.
const SETTINGS: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 2s, connect_timeout: 2s, max_stale: 10s";
/// A server that is frozen is not left for its silence, but only because the cluster says so.
const PATIENT: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 60s, connect_timeout: 2s, max_stale: 2m";
/// Of `servers`.
const SLOT: u16 = 11_335;
/// On an idle machine it is one second; the tests' machine has two cores and other tests.
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
        // Whatever was written is on the replica, so that no failover loses it.
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

    /// Writes to a node, and tells how long the change took.
    async fn arrives(&self, node: usize, weight: f64) -> Duration {
        self.write(node, weight).await;
        self.seen(weight).await
    }

    async fn seen(&self, weight: f64) -> Duration {
        let written = Instant::now();
        eventually(&format!("weight {weight} arrives"), || async { self.weight() == weight }).await;
        written.elapsed()
    }

    /// The first node takes writes as a primary, and what it takes does not reach us.
    async fn is_not_fed_by_the_old_one(&self) {
        let role = info(&self.cluster.nodes[0], "replication").await;
        assert!(role.contains("role:master"), "{role}");
        self.write(0, 99.0).await;
        let written = Instant::now();
        eventually("two heartbeats have passed", || async {
            assert_ne!(self.weight(), 99.0, "the old primary feeds us");
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
    // By their slots.
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

/// As `redis-cli --cluster reshard` does it, and slowly: a change at every step.
#[tokio::test]
async fn a_slot_that_moves_to_another_node_is_followed_at_every_step() {
    let setup = Setup::start(SETTINGS).await;
    let nodes = &setup.cluster.nodes;
    let (from, to) = (setup.cluster.id(0).await, setup.cluster.id(1).await);
    nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
    nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
    setup.arrives(0, 2.0).await;
    nodes[0].run(&format!("MIGRATE 127.0.0.1 {} servers 0 5000", nodes[1].port)).await;
    // The key is ahead of its slot: the new node serves it to those alone that were sent there.
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

/// The old primary was frozen, and goes on as one when it wakes up: it takes writes, and tells of them.
#[tokio::test]
async fn an_old_primary_that_wakes_up_does_not_feed_us_after_the_failover() {
    let setup = Setup::start(PATIENT).await;
    let nodes = &setup.cluster.nodes;
    setup.cluster.cut_off(0).await;
    nodes[0].freeze();
    setup.cluster.takes_over(Cluster::REPLICA).await;
    let took = setup.arrives(Cluster::REPLICA, 5.0).await;
    println!("new weights took {took:?}");
    nodes[0].thaw();
    setup.is_not_fed_by_the_old_one().await;
    setup.arrives(Cluster::REPLICA, 6.0).await;
    setup.traffic.stop().await;
}

/// A cluster that is cut in two: the old primary answers us all the time, and nobody else.
#[tokio::test]
async fn an_old_primary_that_never_stopped_does_not_feed_us_after_the_failover() {
    let setup = Setup::start(SETTINGS).await;
    let nodes = &setup.cluster.nodes;
    setup.cluster.cut_off(0).await;
    nodes[Cluster::REPLICA].run("CLUSTER FAILOVER TAKEOVER").await;
    setup.cluster.takes_over(Cluster::REPLICA).await;
    let took = setup.arrives(Cluster::REPLICA, 5.0).await;
    println!("new weights took {took:?}");
    setup.is_not_fed_by_the_old_one().await;
    setup.arrives(Cluster::REPLICA, 6.0).await;
    setup.traffic.stop().await;
}

#[tokio::test]
async fn nodes_that_are_away_or_silent_do_not_matter() {
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
    // From the nodes that the one named: it is not needed any more.
    cluster.nodes[1].freeze();
    cluster.nodes[0].run("ZADD servers 2 10.0.0.1:80").await;
    eventually("a change arrives", || async { proxy.weights()[0].1 == 2.0 }).await;
    cluster.nodes[1].thaw();
}

#[tokio::test]
async fn a_node_that_is_frozen_keeps_only_its_own_pools_from_the_lua_pick() {
    let (cluster, backend) = (Cluster::start().await, Backend::named("picked").await);
    // Nothing can be watched, so Redis has to pick.
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
    let says = async |address, name| greeting(address).await.is_ok_and(|said| said == name);
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

/// What docs/questions/redis-rights.md tells people to grant.
const LEAST_RIGHTS: &str = "on >secret resetkeys %R~servers* %R~{servers}:states resetchannels &__keyspace@0__:servers* \
                            &__keyspace@0__:{servers}:states nocommands +hello +auth +ping +hlen +hgetall +hget +hstrlen \
                            +select +client|setname +client|id +client|tracking +subscribe +unsubscribe +zrange +zcard +eval_ro \
                            +evalsha_ro +script|load +config|get +cluster|slots +cluster|nodes +asking";

#[tokio::test]
async fn the_rights_that_are_documented_are_enough_while_a_slot_moves_too() {
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

/// The first line that says why: its error, then its cure.
async fn refusal(section: &str, message: &str) -> (String, String) {
    let program = program_following(section);
    let line = program.says(message).await;
    let field = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
    (field("error"), field("cure"))
}

#[tokio::test]
async fn what_is_wrong_is_told_with_its_cure() {
    const NOBODY: &str = "no node of the cluster says who owns the weights";
    let cluster = Cluster::start().await;
    for node in &cluster.nodes {
        node.grant(&LEAST_RIGHTS.replace(" +cluster|slots +cluster|nodes", "")).await;
    }
    let as_user = format!("{}, username: statera, password: secret", cluster.section());
    let (error, cure) = refusal(&as_user, NOBODY).await;
    assert!(error.contains("cluster") && cure.contains("grant"), "{error}: {cure}");

    let alone = Redis::start().await;
    let (error, cure) = refusal(&format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", alone.port), NOBODY).await;
    assert!(error.contains("not part of a cluster") && cure.contains("redis.url"), "{error}: {cure}");

    let (_, cure) = refusal(&format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", free_port()), NOBODY).await;
    assert!(cure.contains("redis.cluster.nodes"), "{cure}");

    // A node of a cluster, followed as if it were alone.
    let plain = program_following(&format!("url: \"{}\"", cluster.nodes[1].url()));
    let line = plain.says("cannot read the weights").await;
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("write redis.cluster"), "{line}");

    // Nobody serves the slot, and the replica must not go on saying that its primary does.
    for node in &cluster.nodes {
        node.run(&format!("CLUSTER DELSLOTS {SLOT}")).await;
    }
    let lost = program_following(&cluster.section());
    let line = lost.says("no node of the cluster serves the weights").await;
    assert_eq!((&line["pool"], &line["slot"]), (&"web".into(), &SLOT.into()), "{line}");
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("CLUSTER NODES")), "{line}");
}

/// `statera weights` and these words, with a config of its own.
async fn typed(config: &std::path::Path, words: &[&str]) -> Typed {
    let mut command = std::process::Command::new(Program::path());
    command.arg("weights").args(words).arg("-c").arg(config);
    Typed::of(command).await
}

#[tokio::test]
async fn weights_are_changed_by_command_and_the_proxies_report_it_while_a_slot_moves_too() {
    let cluster = Cluster::start().await;
    let yaml = format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{{}, {SETTINGS}}}\n",
        // One node, and not the owner.
        format_args!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", cluster.nodes[2].port)
    );
    let proxy = Proxy::start(&yaml);
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("config.yaml");
    std::fs::write(&config, yaml).expect("a file");
    let done = async |words: &[&str]| {
        let typed = typed(&config, words).await;
        assert_eq!((typed.code, typed.errors.as_str()), (Some(0), ""), "{words:?}");
        typed.said
    };
    let said = done(&["set", "web", "10.0.0.1:80=5", "--wait=20s"]).await;
    assert!(said.contains("applied by 1 proxy"), "{said}");
    assert_eq!(weights_of(&proxy, 0), [5.0]);

    // All keys of the pool move, the slot does not yet.
    let (from, to) = (cluster.id(0).await, cluster.id(1).await);
    cluster.nodes[1].run(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}")).await;
    cluster.nodes[0].run(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}")).await;
    done(&["set", "web", "10.0.0.1:80=6", "--wait=20s"]).await;
    let keys = cluster.nodes[0].run(&format!("CLUSTER GETKEYSINSLOT {SLOT} 100")).await;
    let keys: Vec<String> = redis::from_redis_value(keys).expect("a list");
    assert_eq!(keys.len(), 5, "{keys:?}");
    for key in keys {
        // The proxy may have reported to the new node already, which is what REPLACE is for.
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
