//! The age of a snapshot: the time since the proxy last asked Redis and the answer confirmed the snapshot.
//! The age decides where a pick comes from.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::support::{Backend, Link, Passing, Proxy, Redis, eventually, greeting};

const AGE: &str = "statera_snapshot_age_seconds{pool=\"web\"}";
const MAX_STALE: f64 = 0.8;
/// With these settings only heartbeats confirm the snapshot: there are no full reads and no new connections.
const BY_HEARTBEAT: &str = "heartbeat_interval: 100ms, resync_interval: 1h, response_timeout: 60s, max_stale: 800ms, \
                            poll_interval: 100ms";

/// A proxy that reaches Redis over a link, with one backend.
struct Setup {
    redis: Redis,
    link: Link,
    _backend: Backend,
    proxy: Proxy,
}

impl Setup {
    async fn start(more: &str) -> Self {
        let (redis, backend) = (Redis::start().await, Backend::named("backend").await);
        redis.set_weights([(&backend, 1.0)]).await;
        let link = Link::to(redis.port);
        let section = format!("redis: {{url: \"{}\", {BY_HEARTBEAT}}}\n{more}", link.url());
        let proxy = Proxy::web(&section, "weights_key: servers");
        eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
        Self { redis, link, _backend: backend, proxy }
    }

    fn age(&self) -> f64 {
        self.proxy.metric(AGE).expect("the table came from redis")
    }

    /// Runs one session and returns the `source` label that its pick was counted under.
    async fn source(&self) -> &'static str {
        let all = ["snapshot", "lua", "stale", "configured"];
        let before = all.map(|source| self.proxy.picks(source));
        assert_eq!(greeting(self.proxy.address()).await.expect("an answer"), "backend");
        all.into_iter().zip(before).find(|(source, count)| self.proxy.picks(source) > *count).expect("one").0
    }

    /// After the watching connection stopped answering: the age grows, and picks come from `next` as soon as
    /// the age passes `max_stale`, not sooner and not later.
    async fn picks_change_from_fresh_to(&self, next: &str) {
        // Answers that were already on their way have arrived by then.
        eventually("heartbeats are missed", || async { self.age() > MAX_STALE / 2.0 }).await;
        let mut fresh = 0;
        loop {
            let (before, source, after) = (self.age(), self.source().await, self.age());
            assert!(after >= before, "it fell from {before} to {after}, though nothing answers");
            if source != "snapshot" {
                assert_eq!(source, next);
                assert!(after > MAX_STALE, "{source} at an age of {after} s");
                break;
            }
            assert!(before <= MAX_STALE, "a snapshot {before} s old is picked from");
            fresh += 1;
        }
        assert!(fresh > 0, "it was stale from the beginning");
    }

    async fn is_confirmed_by_a_heartbeat(&self, reads: Option<f64>) {
        eventually("a heartbeat is answered", || async { self.age() < MAX_STALE / 2.0 }).await;
        eventually("the snapshot is picked from again", || async { self.source().await == "snapshot" }).await;
        assert_eq!(self.reads(), reads, "a read confirmed it, not a heartbeat");
    }

    fn reads(&self) -> Option<f64> {
        self.proxy.metric("statera_redis_resyncs_total")
    }
}

#[tokio::test]
async fn a_frozen_redis_lets_the_age_grow_until_picks_are_stale_and_a_heartbeat_brings_it_down() {
    let setup = Setup::start("lua_pick: {enabled: false}").await;
    let reads = setup.reads();
    setup.redis.freeze();
    setup.picks_change_from_fresh_to("stale").await;
    setup.redis.thaw();
    setup.is_confirmed_by_a_heartbeat(reads).await;
}

#[tokio::test]
async fn redis_is_asked_to_pick_as_soon_as_the_age_has_passed_max_stale() {
    let setup = Setup::start("lua_pick: {timeout: 2s}").await;
    let reads = setup.reads();
    setup.link.pass(Passing::AllButTheWatch);
    setup.picks_change_from_fresh_to("lua").await;
    setup.link.pass(Passing::All);
    setup.is_confirmed_by_a_heartbeat(reads).await;
}

/// An answer tells what was true when the question was asked; a change may have happened since.
#[tokio::test]
async fn a_snapshot_is_as_old_as_the_question_whose_answer_confirmed_it() {
    let setup = Setup::start("").await;
    let late = 0.4;
    setup.link.pass(Passing::Late(Duration::from_secs_f64(late)));
    eventually("answers are late", || async { setup.age() > late }).await;
    let (begun, mut confirmations, mut last) = (Instant::now(), 0, 0.0);
    while confirmations < 3 {
        let age = setup.age();
        // Confirmations are timed in whole milliseconds.
        assert!(age > late - 0.002, "only {age} s old, though each answer takes {late} s");
        confirmations += u32::from(age < last);
        last = age;
        assert!(begun.elapsed() < crate::support::PATIENCE, "no heartbeat is answered");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_table_that_did_not_come_from_redis_has_no_age() {
    let redis = Redis::start().await;
    let section = format!("redis: {{url: \"{}\", {BY_HEARTBEAT}}}", redis.url());
    let proxy = Proxy::web(&section, "weights_key: servers, backends: {\"127.0.0.1:1\": 1}");
    // Redis has no table, so the configured backends are used. Their snapshot does not come from Redis and
    // has no age.
    eventually("it was read", || async { proxy.running.observed.pools()[0].pool.cell.age().is_some() }).await;
    assert_eq!(proxy.metric(AGE), None);
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    eventually("the table arrives", || async { proxy.metric(AGE).is_some() }).await;
}
