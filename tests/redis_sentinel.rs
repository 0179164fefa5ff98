//! The proxy follows the primary that the sentinels name, and leaves it as soon as they name another.
//!
//! Each scenario starts its own set: one primary, two replicas, three sentinels.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::support::{
    Backend, Proxy, Redis, Sentinels, Traffic, eventually, free_port, greeting, info, program_following,
};

const HEARTBEAT: Duration = Duration::from_millis(500);
/// No full read happens within a scenario, so a change that arrives was notified. The timeouts allow for a
/// busy machine.
const SETTINGS: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 2s, connect_timeout: 2s, max_stale: 10s";
/// With these settings silence does not end a connection: a frozen server is left only because the sentinels
/// name another.
const PATIENT: &str = "heartbeat_interval: 500ms, resync_interval: 1h, response_timeout: 60s, connect_timeout: 2s, max_stale: 2m";

/// A proxy that follows the sentinels' primary, a backend in its table, and traffic.
struct Setup {
    set: Sentinels,
    proxy: Proxy,
    backend: Backend,
    traffic: Traffic,
}

impl Setup {
    async fn start(settings: &str) -> Self {
        let (set, backend) = (Sentinels::start().await, Backend::named("backend").await);
        set.servers[0].set_weights([(&backend, 1.0)]).await;
        let proxy = follow(&set, settings);
        eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
        eventually("the table is replicated", || set.is_replicated(0)).await;
        let traffic = Traffic::start(proxy.address());
        traffic.more(20).await;
        Self { set, proxy, backend, traffic }
    }

    async fn write(&self, server: usize, weight: f64) {
        self.set.servers[server].run(&format!("ZADD servers {weight} {}", self.backend.address)).await;
    }

    fn weight(&self) -> f64 {
        self.proxy.weights()[0].1
    }

    /// Writes a weight to a server and returns how long the proxy took to have it.
    async fn arrives(&self, server: usize, weight: f64) -> Duration {
        self.write(server, weight).await;
        let written = Instant::now();
        eventually("the change arrives", || async { self.weight() == weight }).await;
        written.elapsed()
    }

    /// The old primary, which is the first server, still accepts writes, and they do not reach the proxy.
    async fn does_not_follow_the_old_primary(&self, primary: usize) {
        let role = info(&self.set.servers[0], "replication").await;
        assert!(role.contains("role:master"), "{role}");
        self.write(0, 99.0).await;
        let written = Instant::now();
        eventually("two heartbeats have passed", || async {
            assert_ne!(self.weight(), 99.0, "the proxy follows the old primary");
            written.elapsed() > 2 * HEARTBEAT
        })
        .await;
        self.write(primary, 6.0).await;
        eventually("the next change comes from the new one", || async {
            assert_ne!(self.weight(), 99.0, "the proxy follows the old primary");
            self.weight() == 6.0
        })
        .await;
    }
}

fn follow(set: &Sentinels, settings: &str) -> Proxy {
    Proxy::web(&format!("redis: {{{}, {settings}}}", set.section()), "weights_key: servers")
}

/// New weights must arrive within one second; two more are for a test machine with two cores and other
/// tests.
const AT_ONCE: Duration = Duration::from_secs(1 + 2);

#[tokio::test]
async fn a_planned_failover_fails_no_session_and_new_weights_arrive_at_once() {
    let setup = Setup::start(SETTINGS).await;
    setup.set.fail_over().await;
    let primary = setup.set.new_primary(0).await;
    let took = setup.arrives(primary, 5.0).await;
    println!("new weights took {took:?}");
    assert!(took < AT_ONCE, "it took {took:?}");
    let took = setup.arrives(primary, 6.0).await;
    assert!(took < AT_ONCE, "it took {took:?}");
    assert_eq!(setup.proxy.metric("statera_redis_connected"), Some(1.0));
    let outcome = setup.traffic.stop().await;
    assert!(outcome.served["backend"] > 20, "{:?}", outcome.served);
}

#[tokio::test]
async fn after_a_primary_is_killed_the_next_one_is_followed_and_no_session_fails() {
    let mut setup = Setup::start(SETTINGS).await;
    setup.set.servers[0].kill();
    let primary = setup.set.new_primary(0).await;
    let took = setup.arrives(primary, 5.0).await;
    println!("new weights took {took:?}");
    assert!(took < AT_ONCE, "it took {took:?}");
    setup.traffic.more(20).await;
    setup.traffic.stop().await;
}

/// The old primary was frozen. When it wakes up it still acts as a primary: it accepts writes and notifies
/// of them.
#[tokio::test]
async fn an_old_primary_that_wakes_up_is_not_followed_after_the_failover() {
    let setup = Setup::start(PATIENT).await;
    setup.set.servers[0].freeze();
    let primary = setup.set.new_primary(0).await;
    let took = setup.arrives(primary, 5.0).await;
    println!("new weights took {took:?}");

    // The sentinels are frozen, so that they do not make the old primary a replica.
    for sentinel in 0..3 {
        setup.set.signal_sentinel(sentinel, Signal::STOP);
    }
    setup.set.servers[0].thaw();
    setup.does_not_follow_the_old_primary(primary).await;
    for sentinel in 0..3 {
        setup.set.signal_sentinel(sentinel, Signal::CONT);
    }
    setup.traffic.stop().await;
}

/// The network is split: the old primary answers only the proxy, and the sentinels name a new primary.
#[tokio::test]
async fn an_old_primary_that_never_stopped_is_not_followed_after_the_failover() {
    let setup = Setup::start(SETTINGS).await;
    // Without these rights the sentinels can neither ping the server nor make it a replica.
    setup.set.servers[0].run("ACL SETUSER default -ping -slaveof -replicaof").await;
    let primary = setup.set.new_primary(0).await;
    let took = setup.arrives(primary, 5.0).await;
    println!("new weights took {took:?}");
    setup.does_not_follow_the_old_primary(primary).await;
    setup.traffic.stop().await;
}

#[tokio::test]
async fn the_known_primary_is_followed_while_no_sentinel_answers() {
    let set = Sentinels::start().await;
    let backend = Backend::named("backend").await;
    set.servers[0].set_weights([(&backend, 1.0)]).await;
    let program = program_following(&set.section());
    let connected = program.says("connected to redis").await;
    let primary = format!("redis://127.0.0.1:{}", set.servers[0].port);
    assert_eq!(connected["redis"], primary);
    let address = program.address().await;
    let mut set = set;
    for sentinel in 0..3 {
        set.kill_sentinel(sentinel);
    }
    let line = program.says("no sentinel answers").await;
    assert_eq!((&line["level"], &line["primary"]), (&"WARN".into(), &primary.into()));
    let other = Backend::named("other").await;
    set.servers[0].set_weights([(&other, 1.0)]).await;
    eventually("a change arrives", || async { greeting(address).await.is_ok_and(|name| name == "other") })
        .await;
    assert_eq!(program.messages("no sentinel answers").len(), 1);
    assert_eq!(program.messages("connected to redis").len(), 1);
}

#[tokio::test]
async fn the_primary_is_found_while_some_sentinels_are_down_or_frozen() {
    let mut set = Sentinels::start().await;
    set.servers[0].run("ZADD servers 1 10.0.0.1:80").await;
    set.kill_sentinel(0);
    set.signal_sentinel(1, Signal::STOP);
    let proxy = follow(&set, SETTINGS);
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    set.signal_sentinel(1, Signal::CONT);
}

#[tokio::test]
async fn an_unknown_primary_and_nodes_that_are_no_sentinels_are_logged_with_their_cure() {
    let set = Sentinels::start().await;
    let unknown = program_following(&set.section().replace("mymaster", "another"));
    let line = unknown.says("no sentinel names a primary").await;
    assert_eq!(line["cure"], "check redis.sentinel.master", "{line}");
    let unreachable =
        program_following(&format!("sentinel: {{master: mymaster, nodes: [\"127.0.0.1:{}\"]}}", free_port()));
    let line = unreachable.says("no sentinel names a primary").await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("refused")), "{line}");
    let server: &Redis = &set.servers[0];
    let plain =
        program_following(&format!("sentinel: {{master: mymaster, nodes: [\"127.0.0.1:{}\"]}}", server.port));
    let line = plain.says("no sentinel names a primary").await;
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("redis.sentinel.nodes")), "{line}");
}

/// The rights that docs/questions/redis-rights.md lists for an operator to grant on the sentinels.
const LEAST_RIGHTS: &str = "resetkeys resetchannels &+switch-master &+promoted-slave nocommands +hello +auth \
                            +sentinel|master +sentinel|get-master-addr-by-name +subscribe";

#[tokio::test]
async fn sentinels_and_servers_each_get_their_own_password() {
    let set = Sentinels::start_with(&format!("user statera on >of-sentinels {LEAST_RIGHTS}")).await;
    set.servers[0].run("ZADD servers 1 10.0.0.1:80").await;
    set.servers[0].run("ACL SETUSER statera on >of-servers ~* &* +@all").await;
    let section = set.section().replace("]}", "], username: statera, password: of-sentinels}");
    let proxy = Proxy::web(
        &format!("redis: {{{section}, username: statera, password: of-servers, {SETTINGS}}}"),
        "weights_key: servers",
    );
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    set.fail_over().await;
    let primary = set.new_primary(0).await;
    set.servers[primary].run("ACL SETUSER statera on >of-servers ~* &* +@all").await;
    set.servers[primary].run("ZADD servers 2 10.0.0.1:80").await;
    eventually("the failover is followed", || async { proxy.weights()[0].1 == 2.0 }).await;

    let wrong = program_following(&section.replace("of-sentinels", "wr0ng"));
    let line = wrong.says("no sentinel names a primary").await;
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("redis.sentinel.password")), "{line}");
    assert!(!wrong.log().contains("wr0ng"), "the password is in the log");
}
