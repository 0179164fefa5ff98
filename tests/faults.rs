//! Redis fails in every known manner, and no session fails.
//!
//! In each scenario sessions run during the whole fault, and afterwards the proxy gets the new weights.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::support::{
    Backend, Link, Outcome, PATIENCE, Passing, Program, Proxy, Redis, Traffic, eventually, greeting,
};

const HEARTBEAT: Duration = Duration::from_millis(200);
const RESPONSE: Duration = Duration::from_secs(1);
/// The delay that a busy machine may add. Without a deadline the wait would be far longer.
const SLACK: Duration = Duration::from_secs(5);
const HASTY: &str = "heartbeat_interval: 200ms, response_timeout: 1s, connect_timeout: 1s, \
    max_stale: 800ms, poll_interval: 300ms, resync_interval: 1s";
/// Timeouts that even a very busy machine keeps, for scenarios in which no reconnect may happen.
const PATIENT: &str = "heartbeat_interval: 200ms, response_timeout: 20s, connect_timeout: 20s, \
    max_stale: 1m, resync_interval: 1s";

/// A proxy that reads Redis through a link, traffic through it, and two backends. Redis has the old backend;
/// the new one comes after the fault.
struct Setup {
    redis: Redis,
    link: Link,
    proxy: Proxy,
    traffic: Traffic,
    new: Backend,
    old: Backend,
}

impl Setup {
    async fn start() -> Self {
        Self::with(HASTY, "").await
    }

    async fn with(settings: &str, top: &str) -> Self {
        let (old, new) = (Backend::named("old").await, Backend::named("new").await);
        let redis = Redis::start().await;
        redis.set_weights([(&old, 1.0)]).await;
        let link = Link::to(redis.port);
        let config = format!("redis: {{url: \"{}\", {settings}}}\n{top}", link.url());
        let proxy = Proxy::web(&config, "weights_key: servers");
        eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
        let traffic = Traffic::start(proxy.address());
        traffic.more(50).await;
        Self { redis, link, proxy, traffic, new, old }
    }

    fn is_connected(&self) -> bool {
        self.proxy.metric("statera_redis_connected").expect("it is there") > 0.0
    }

    fn reconnects(&self) -> f64 {
        self.proxy.metric("statera_redis_reconnects_total").expect("it is counted")
    }

    /// Checks that the metric reports Redis as away within the deadlines. Then picks come from the last
    /// snapshot.
    async fn notices_the_fault(&self) {
        let broken = Instant::now();
        eventually("the metric says that redis is away", || async { !self.is_connected() }).await;
        let took = broken.elapsed();
        assert!(took <= 2 * HEARTBEAT + RESPONSE + SLACK, "it took {took:?}");
        let stale = self.proxy.picks("stale");
        eventually("picks come from the last snapshot", || async {
            self.proxy.picks("stale") > stale + 50.0
        })
        .await;
    }

    /// Checks that the new weights arrive, and ends the traffic: no session may have failed.
    async fn recovers(self) -> Outcome {
        let fresh = self.proxy.picks("snapshot");
        eventually("the new weights arrive", || async {
            self.proxy.weights() == [(self.new.address.to_string(), 1.0)]
        })
        .await;
        eventually("redis is connected", || async { self.is_connected() }).await;
        eventually("picks come from a fresh snapshot", || async {
            self.proxy.picks("snapshot") > fresh + 20.0
        })
        .await;
        // Sessions that picked before the change may still connect to the old backend. They are over after
        // 20 more.
        self.traffic.more(20).await;
        let old = self.old.accepted();
        self.traffic.more(50).await;
        assert_eq!(self.old.accepted(), old, "the old backend still gets sessions");
        let outcome = self.traffic.stop().await;
        assert!(outcome.served["old"] > 0 && outcome.served["new"] > 0, "{:?}", outcome.served);
        assert_eq!(self.proxy.picks("configured"), 0.0, "the configured backends are the last resort");
        outcome
    }
}

#[tokio::test]
async fn traffic_goes_on_while_redis_is_killed_and_comes_back_empty() {
    let mut setup = Setup::start().await;
    setup.redis.kill();
    setup.notices_the_fault().await;
    setup.redis.launch().await;
    eventually("redis is connected", || async { setup.is_connected() }).await;
    // Redis is empty now. By default the proxy keeps the last table.
    setup.traffic.more(50).await;
    assert_eq!(setup.proxy.weights(), [(setup.old.address.to_string(), 1.0)]);
    setup.redis.run("CONFIG SET notify-keyspace-events KA").await;
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    setup.recovers().await;
}

#[tokio::test]
async fn traffic_goes_on_while_redis_is_frozen_and_few_sessions_wait_for_it() {
    // A session that asks the frozen Redis for a pick takes two seconds.
    let setup = Setup::with(HASTY, "lua_pick: {timeout: 2s, max_in_flight: 2}").await;
    setup.redis.freeze();
    setup.notices_the_fault().await;
    let lines = setup.proxy.access_lines();
    setup.redis.thaw();
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    let outcome = setup.recovers().await;
    assert!(outcome.median() < Duration::from_secs(1), "the median session took {:?}", outcome.median());
    // At most max_in_flight sessions wait at once, and only before the freeze is noticed.
    let waited = lines.iter().filter(|line| line["queue_ms"].as_f64().is_some_and(|ms| ms > 1_000.0)).count();
    assert!(lines.len() > 100 && waited <= 4, "{waited} of {} waited for their pick", lines.len());
}

#[tokio::test]
async fn traffic_goes_on_while_redis_is_cut_off_and_the_weights_written_meanwhile_arrive_afterwards() {
    let setup = Setup::start().await;
    setup.link.pass(Passing::Nothing);
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    setup.notices_the_fault().await;
    assert_eq!(setup.proxy.weights(), [(setup.old.address.to_string(), 1.0)]);
    setup.link.pass(Passing::All);
    setup.recovers().await;
}

#[tokio::test]
async fn traffic_goes_on_while_every_connection_to_redis_is_reset() {
    let setup = Setup::start().await;
    setup.link.pass(Passing::Resets);
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    setup.notices_the_fault().await;
    setup.link.pass(Passing::All);
    setup.recovers().await;
}

#[tokio::test]
async fn traffic_goes_on_while_clients_are_killed_and_a_change_in_that_moment_is_not_lost() {
    let setup = Setup::start().await;
    let mut connection = setup.redis.connection().await;
    for round in 1..=3 {
        let reconnects = setup.reconnects();
        let mut both = redis::pipe();
        both.cmd("CLIENT").arg("KILL").arg("TYPE").arg("pubsub");
        both.cmd("CLIENT").arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes");
        both.cmd("ZADD").arg("servers").arg(10 * round).arg(setup.old.address.to_string());
        both.query_async::<()>(&mut connection).await.expect("killed");
        eventually("the change arrives", || async {
            setup.proxy.weights() == [(setup.old.address.to_string(), f64::from(10 * round))]
        })
        .await;
        eventually("it has connected again", || async {
            setup.is_connected() && setup.reconnects() > reconnects
        })
        .await;
    }
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    setup.recovers().await;
}

#[tokio::test]
async fn a_flush_without_a_notification_is_noticed_at_the_next_full_read() {
    let Setup { redis, link: _link, proxy, traffic, new, old: _old } =
        Setup::with(&format!("{PATIENT}, on_empty: refuse"), "").await;
    // The traffic ends here, because an empty table refuses sessions.
    traffic.stop().await;
    redis.run("FLUSHALL").await;
    eventually("the empty table arrives", || async { proxy.weights().is_empty() }).await;
    assert_eq!(proxy.metric("statera_redis_reconnects_total"), Some(0.0));
    redis.set_weights([(&new, 1.0)]).await;
    eventually("it serves again", || async {
        greeting(proxy.address()).await.is_ok_and(|name| name == "new")
    })
    .await;
}

#[tokio::test]
async fn traffic_goes_on_when_redis_is_flushed() {
    let setup = Setup::start().await;
    let reads = || setup.proxy.metric("statera_redis_resyncs_total").expect("it is counted");
    setup.redis.run("FLUSHALL").await;
    let before = reads();
    eventually("the empty table is read", || async { reads() >= before + 2.0 }).await;
    setup.traffic.more(50).await;
    assert_eq!(setup.proxy.weights(), [(setup.old.address.to_string(), 1.0)]);
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    setup.recovers().await;
}

#[tokio::test]
async fn a_redis_that_is_slow_to_answer_is_followed_and_no_session_waits_for_it() {
    let setup = Setup::with(PATIENT, "lua_pick: {timeout: 2500ms}").await;
    setup.link.pass(Passing::Late(Duration::from_millis(500)));
    setup.traffic.more(200).await;
    setup.redis.set_weights([(&setup.new, 1.0)]).await;
    let wanted = [(setup.new.address.to_string(), 1.0)];
    eventually("the new weights arrive", || async { setup.proxy.weights() == wanted }).await;
    assert_eq!(setup.reconnects(), 0.0, "slow is not away");
    assert_eq!((setup.proxy.picks("lua"), setup.proxy.picks("stale")), (0.0, 0.0), "only the snapshot picks");
    setup.recovers().await;
}

#[tokio::test]
async fn while_redis_loads_its_data_the_proxy_waits_on_one_connection() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    // Loading the keys below takes two seconds. Meanwhile the server answers LOADING, or, before Redis 7,
    // nothing.
    let mut arguments = vec!["--notify-keyspace-events", "KA", "--key-load-delay", "400"];
    if !Redis::is_before_7() {
        arguments.extend(["--loading-process-events-interval-bytes", "1024"]);
    }
    let mut redis = Redis::start_with(&arguments).await;
    let mut fill = redis::pipe();
    for key in 0..5_000 {
        fill.cmd("SET")
            .arg(format!("filler:{key}"))
            .arg("some forty bytes that make the file a bit larger")
            .ignore();
    }
    let mut connection = redis.connection().await;
    fill.query_async::<()>(&mut connection).await.expect("written");
    redis.set_weights([(&new, 1.0)]).await;
    redis.run("SAVE").await;
    redis.set_weights([(&old, 1.0)]).await;

    let config = format!("redis: {{url: \"{}\", {HASTY}}}", redis.url());
    let proxy = Proxy::web(&config, "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights() == [(old.address.to_string(), 1.0)] }).await;
    let traffic = Traffic::start(proxy.address());
    traffic.more(50).await;
    redis.kill();
    redis.launch().await;
    eventually("the saved table arrives", || async { proxy.weights() == [(new.address.to_string(), 1.0)] })
        .await;
    let reconnects = proxy.metric("statera_redis_reconnects_total").expect("it is counted");
    assert!((1.0..=5.0).contains(&reconnects), "{reconnects} connections for one restart");
    traffic.stop().await;
}

#[tokio::test]
async fn a_web_server_at_the_address_of_redis_is_logged_with_a_cure_while_the_configured_backends_serve() {
    let configured = Backend::named("configured").await;
    let web = Backend::start(|mut stream| async move {
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        let page = "<html><body>400 Bad Request</body></html>";
        let answer = format!(
            "HTTP/1.1 400 Bad Request\r\nServer: nginx\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{page}",
            page.len()
        );
        let _ = stream.write_all(answer.as_bytes()).await;
    })
    .await;
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}}}}}\n\
         redis: {{url: \"redis://{}/0\"}}\n",
        configured.address, web.address
    ));
    let address = program.address().await;
    assert_eq!(greeting(address).await.expect("an answer"), "configured");
    let logged = || {
        program
            .log()
            .lines()
            .filter(|line| line.contains("cannot connect to redis"))
            .map(str::to_owned)
            .collect()
    };
    eventually("it is logged and tried again", || async {
        let lines: Vec<String> = logged();
        !lines.is_empty() && web.accepted() >= 6
    })
    .await;
    let lines: Vec<String> = logged();
    assert!(
        lines[0].contains("what answers there does not speak redis's protocol: check its address"),
        "{}",
        lines[0]
    );
    assert_eq!(lines.len(), 1, "{lines:?}");
    for _ in 0..20 {
        assert_eq!(greeting(address).await.expect("an answer"), "configured");
    }
}

#[tokio::test]
async fn a_server_that_never_answers_does_not_hold_back_the_start() {
    let configured = Backend::named("configured").await;
    let redis = Redis::start().await;
    redis.freeze();
    let started = Instant::now();
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\", {HASTY}}}", redis.url()),
        &format!("weights_key: servers, backends: {{\"{}\": 1}}", configured.address),
    );
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "configured");
    assert!(started.elapsed() < PATIENCE / 2, "it took {:?}", started.elapsed());
    redis.thaw();
    eventually("redis is connected", || async { proxy.metric("statera_redis_connected") == Some(1.0) }).await;
}
