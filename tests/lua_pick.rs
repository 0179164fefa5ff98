//! The Lua pick: it has the distribution of the snapshot, few sessions ask at once, and few wait for a Redis
//! that does not answer.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use redis::Value;
use redis::aio::MultiplexedConnection;
use statera::balance::backend::Registry;
use statera::balance::snapshot::{Origin, Snapshot};
use statera::balance::{BackendId, Balance, Table, Weight};

use crate::support::{
    Backend, LEAST_RIGHTS, Link, Passing, Proxy, Redis, backend_series, dead_address, eventually, greeting,
    info, seed,
};

const SCRIPT: &str = include_str!("../src/redis/pick/pick.lua");
/// The arguments that `src/redis/pick/lua_pick.rs` passes to the script.
const LARGEST_WHOLE: usize = 500;
const HEAVIEST: usize = 100;
const STATES: &str = "{t}:states";
const PICKS: usize = 10_000;

type Members = Vec<(Vec<u8>, String)>;

/// The script on its own server, called as Statera calls it.
struct Script {
    _redis: Redis,
    connection: MultiplexedConnection,
    sha: String,
    command: &'static str,
    rng: fastrand::Rng,
}

impl Script {
    async fn start() -> Self {
        let redis = Redis::start().await;
        let mut connection = redis.connection().await;
        let sha = redis::cmd("SCRIPT")
            .arg("LOAD")
            .arg(SCRIPT)
            .query_async(&mut connection)
            .await
            .expect("a script");
        let command = if Redis::is_before_7() { "EVALSHA" } else { "EVALSHA_RO" };
        Self { _redis: redis, connection, sha, command, rng: fastrand::Rng::with_seed(seed()) }
    }

    async fn write(&mut self, members: &Members) {
        let mut write = redis::pipe();
        write.del("t").ignore();
        for (member, score) in members {
            write.cmd("ZADD").arg("t").arg(score).arg(member).ignore();
        }
        write.query_async::<()>(&mut self.connection).await.expect("written");
    }

    /// Runs picks and counts the members; the empty name counts answers without a member.
    async fn picks(&mut self, count: usize, tried: &[&str]) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for _ in 0..count / 500 {
            let mut pipe = redis::pipe();
            for _ in 0..500 {
                let point = (self.rng.u64(..) >> 11) as f64 / 2f64.powi(53);
                pipe.cmd(self.command).arg(&self.sha).arg(1).arg("t").arg(format!("{point:.17}"));
                pipe.arg(self.rng.u32(1..=2_147_483_646))
                    .arg(LARGEST_WHOLE)
                    .arg(HEAVIEST)
                    .arg(STATES)
                    .arg(tried);
            }
            let answers: Vec<Value> = pipe.query_async(&mut self.connection).await.expect("no error");
            for answer in answers {
                let name = match answer {
                    Value::Nil => String::new(),
                    Value::Array(pair) => match pair.as_slice() {
                        [Value::BulkString(member), Value::BulkString(_)] => {
                            String::from_utf8(member.clone()).expect("only good members are picked")
                        }
                        other => panic!("{other:?}"),
                    },
                    other => panic!("{other:?}"),
                };
                *counts.entry(name).or_default() += 1;
            }
        }
        counts
    }

    /// Counts the members that 10,000 picks of a snapshot of this table give.
    fn snapshot_picks(&mut self, members: &Members, tried: &[&str]) -> BTreeMap<String, u64> {
        let decoded = members.iter().filter_map(|(member, score)| {
            let id: BackendId = std::str::from_utf8(member).ok()?.parse().ok()?;
            Some((id, Weight::new(score.parse().ok()?).ok()?))
        });
        let snapshot = Snapshot::new(
            1,
            Origin::Redis,
            &Table::new(decoded.collect()),
            Balance::WeightedRandom,
            &Registry::new(1),
        );
        let tried: Vec<BackendId> = tried.iter().map(|id| id.parse().expect("an address")).collect();
        let mut counts = BTreeMap::new();
        for _ in 0..PICKS {
            let picked =
                snapshot.pick(self.rng.u64(..), &tried).map(|member| member.backend.id().to_string());
            *counts.entry(picked.unwrap_or_default()).or_default() += 1;
        }
        counts
    }

    /// Checks by a chi-square test that 10,000 picks of the script and of the snapshot have one
    /// distribution.
    async fn agrees_with_the_snapshot(&mut self, what: &str, members: &Members, tried: &[&str]) {
        self.write(members).await;
        let lua = self.picks(PICKS, tried).await;
        let snapshot = self.snapshot_picks(members, tried);
        if let Some(difference) = differ(&lua, &snapshot) {
            panic!("{what}: {difference}\nlua {lua:?}\nsnapshot {snapshot:?}");
        }
    }
}

/// Pearson's test of homogeneity, with one false alarm in a million by the approximation of Wilson and
/// Hilferty. Rare names share one cell. Returns the difference if the test finds one.
fn differ(a: &BTreeMap<String, u64>, b: &BTreeMap<String, u64>) -> Option<String> {
    let mut cells: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for name in a.keys().chain(b.keys()) {
        let (x, y) = (a.get(name).copied().unwrap_or(0) as f64, b.get(name).copied().unwrap_or(0) as f64);
        if x + y >= 10.0 {
            cells.insert(name, (x, y));
        }
    }
    let (sum_a, sum_b) = cells.values().fold((0.0, 0.0), |(p, q), (x, y)| (p + x, q + y));
    let rare = (PICKS as f64 - sum_a, PICKS as f64 - sum_b);
    if rare.0 + rare.1 > 0.0 {
        cells.insert("\0rare", rare);
    }
    // Both rows have the same sum, so half of each cell is expected in either.
    let statistic: f64 = cells.values().map(|(x, y)| (x - y).powi(2) / (x + y)).sum();
    let freedom = (cells.len() - 1).max(1) as f64;
    let spread = 2.0 / (9.0 * freedom);
    let limit = freedom * (1.0 - spread + 4.75 * spread.sqrt()).powi(3);
    (statistic > limit).then(|| format!("chi-square {statistic} > {limit} at {freedom} degrees of freedom"))
}

/// A table of generated addresses with these weights.
fn members<'a>(weights: impl IntoIterator<Item = &'a str>) -> Members {
    let name = |i: usize| format!("10.0.{}.{}:80", i / 250, i % 250).into_bytes();
    weights.into_iter().enumerate().map(|(i, weight)| (name(i), weight.to_owned())).collect()
}

#[test]
fn the_chi_square_test_tells_a_fair_picker_from_one_that_is_five_percent_off() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let mut counts = |bias: f64| {
        let mut counts = BTreeMap::new();
        for _ in 0..PICKS {
            let name = if rng.f64() < 0.25 + bias { "a" } else { "b" };
            *counts.entry(name.to_owned()).or_default() += 1;
        }
        counts
    };
    let (one, other, biased) = (counts(0.0), counts(0.0), counts(0.05));
    assert_eq!(differ(&one, &other), None);
    assert!(differ(&one, &biased).is_some());
}

#[tokio::test]
async fn lua_picks_what_the_snapshot_would_pick_from_small_tables() {
    let mut script = Script::start().await;
    let hostile: Members = vec![
        (b"10.0.0.1:80".to_vec(), "3".into()),
        (b"10.0.0.2:80".to_vec(), "inf".into()),
        (b"10.0.0.3:80".to_vec(), "-1".into()),
        (b"no-port".to_vec(), "1".into()),
        (b"".to_vec(), "1".into()),
        (b"10.0.0.4:80".to_vec(), "1".into()),
        (b"unix:/run/a.sock".to_vec(), "2".into()),
    ];
    for (what, table) in [
        ("fractions", members(["0.5", "0.25", "0.125", "0.1", "0.025"])),
        ("fractions that a cast would cut off", members(["1.9", "1.1"])),
        ("zeros", members(["0", "1", "0", "3", "0"])),
        ("hostile scores and names", hostile),
        ("a single member", members(["0.001"])),
        ("huge weights", members(["1e308", "1e308", "5e307"])),
        ("tiny weights", members(["5e-324", "1e-320", "2e-320"])),
        ("the smallest beside the largest", members(["1e308", "1e-308"])),
        ("all the same at the limit", members(vec!["1"; LARGEST_WHOLE])),
        ("all zero", members(["0", "0", "0"])),
        ("no key", members([])),
    ] {
        script.agrees_with_the_snapshot(what, &table, &[]).await;
    }
}

#[tokio::test]
async fn lua_picks_what_the_snapshot_would_pick_from_large_tables_that_are_not_read_whole() {
    let mut script = Script::start().await;
    let ramp: Vec<String> = (0..700).map(|i| format!("{}.5", i % 50)).collect();
    let filled = |first: &[&'static str], rest: usize| {
        members(first.iter().copied().chain(std::iter::repeat_n("1", rest)).collect::<Vec<_>>())
    };
    let mut mostly_zero = vec!["0"; 1_950];
    mostly_zero.extend(["1"; 50]);
    for (what, table) in [
        ("one over the limit", members(vec!["1"; LARGEST_WHOLE + 1])),
        ("equal weights", members(vec!["2.5"; 600])),
        ("a ramp", members(ramp.iter().map(String::as_str).collect::<Vec<_>>())),
        ("one that outweighs two thousand", filled(&["1e6"], 2_000)),
        ("one that equals two thousand", filled(&["2000"], 2_000)),
        ("twenty infinite ones on top", filled(&["inf"; 20], 600)),
        ("more infinite ones than are listed", filled(&["inf"; 150], 600)),
        ("zeros and negatives below", filled(&["0", "-1", "-inf", "0"], 600)),
        ("nearly all zero", members(mostly_zero)),
        ("huge weights", members(vec!["1e308"; 600])),
        ("all zero", members(vec!["0"; 600])),
        ("all negative", members(vec!["-1"; 600])),
    ] {
        script.agrees_with_the_snapshot(what, &table, &[]).await;
    }
}

#[tokio::test]
async fn lua_leaves_out_backends_that_were_tried_and_keeps_the_proportions_of_the_rest() {
    let mut script = Script::start().await;
    let small = members(["8", "4", "2", "1"]);
    script.agrees_with_the_snapshot("the heaviest was tried", &small, &["10.0.0.0:80"]).await;
    script.agrees_with_the_snapshot("two were tried", &small, &["10.0.0.0:80", "10.0.0.2:80"]).await;
    let all = ["10.0.0.0:80", "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"];
    script.agrees_with_the_snapshot("all were tried", &small, &all).await;
    assert_eq!(script.picks(500, &all).await, BTreeMap::from([(String::new(), 500)]));

    let large = members(std::iter::once("600").chain(std::iter::repeat_n("1", 600)).collect::<Vec<_>>());
    script
        .agrees_with_the_snapshot("the heaviest of a large table was tried", &large, &["10.0.0.0:80"])
        .await;
}

#[tokio::test]
async fn lua_leaves_out_backends_in_drain_or_maint_and_keeps_the_proportions_of_the_rest() {
    let mut script = Script::start().await;
    let huge = "x".repeat(5_000_000);
    let mut states = redis::cmd("HSET");
    states.arg(STATES).arg(&["10.0.0.0:80", "drain", "10.0.0.2:80", "maint", "10.0.0.3:80", "READY"]);
    states.arg("10.0.0.4:80").arg(&huge).arg("unknown").arg("drain");
    states.query_async::<()>(&mut script.connection).await.expect("written");
    let out = ["10.0.0.0:80", "10.0.0.2:80"];
    let large = std::iter::once("600").chain(std::iter::repeat_n("1", 600));
    for (what, table) in [
        ("a small table", members(["8", "4", "2", "1", "3"])),
        ("a large table, of which the heaviest is in drain", members(large.collect::<Vec<_>>())),
        ("no backend is ready", members(["8", "0", "2"])),
    ] {
        script.write(&table).await;
        let lua = script.picks(PICKS, &[]).await;
        let snapshot = script.snapshot_picks(&table, &out);
        if let Some(difference) = differ(&lua, &snapshot) {
            panic!("{what}: {difference}\nlua {lua:?}\nsnapshot {snapshot:?}");
        }
    }
    // A key of states that is no hash is ignored.
    let table = members(["8", "4", "2"]);
    script.write(&table).await;
    redis::cmd("SET")
        .arg(STATES)
        .arg("drain")
        .query_async::<()>(&mut script.connection)
        .await
        .expect("written");
    assert!(script.picks(500, &[]).await.contains_key("10.0.0.0:80"));
}

/// Heartbeats so often that scenarios are short. `lua_pick.timeout` gives picks enough time on a busy
/// machine.
const HASTY: &str = "heartbeat_interval: 100ms, max_stale: 300ms, poll_interval: 100ms, \
    response_timeout: 300ms, connect_timeout: 300ms, \
                     resync_interval: 1s";

/// A proxy whose watching connection gets no bytes, so that its snapshot is stale while Redis still answers
/// picks.
async fn stale_proxy(redis: &Redis, link: &Link, top: &str, more: &str) -> Proxy {
    stale_proxy_of("weights_key: servers", redis, link, top, more).await
}

async fn stale_proxy_of(pool: &str, redis: &Redis, link: &Link, top: &str, more: &str) -> Proxy {
    let proxy = Proxy::web(&format!("redis: {{url: \"{}\", {more}}}\n{top}", link.url()), pool);
    eventually("the table arrives", || async { !proxy.weights().is_empty() }).await;
    link.pass(Passing::AllButTheWatch);
    eventually("the snapshot is stale and redis picks", || async {
        greeting(proxy.address()).await.expect("no session fails");
        proxy.picks("lua") > 0.0
    })
    .await;
    assert!(redis.port > 0);
    proxy
}

#[tokio::test]
async fn while_the_snapshot_is_stale_redis_picks_by_weights_that_the_snapshot_never_saw() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let redis = Redis::start().await;
    redis.set_weights([(&old, 1.0)]).await;
    let link = Link::to(redis.port);
    let proxy = stale_proxy(&redis, &link, "lua_pick: {timeout: 2500ms}", HASTY).await;
    redis.set_weights([(&new, 2.5)]).await;
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "new");
    }
    assert_eq!(proxy.weights(), [(old.address.to_string(), 1.0)], "the snapshot cannot know");
    let lines = all_lines(&proxy).await;
    let served: Vec<_> = lines.iter().filter(|line| line["backend"] == new.address.to_string()).collect();
    assert_eq!(served.len(), 20);
    for line in served {
        assert_eq!((&line["source"], &line["weight"]), (&"lua".into(), &2.5.into()), "{line}");
    }

    // A backend that is in drain since then is not picked.
    redis.run(&format!("ZADD servers 1000 {}", old.address)).await;
    redis.run(&format!("HSET {{servers}}:states {} drain", old.address)).await;
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "new");
    }
    redis.run(&format!("ZREM servers {}", old.address)).await;

    // A flushed script is loaded again within the same pick.
    redis.run("SCRIPT FLUSH").await;
    let (asked, stale) = (proxy.picks("lua"), proxy.picks("stale"));
    for _ in 0..10 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "new");
    }
    assert_eq!((proxy.picks("lua"), proxy.picks("stale")), (asked + 10.0, stale));

    link.pass(Passing::All);
    eventually("the snapshot serves again", || async {
        let before = proxy.picks("snapshot");
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "new");
        proxy.picks("snapshot") > before
    })
    .await;
}

#[tokio::test]
async fn redis_does_not_pick_a_backend_that_is_unhealthy() {
    let (redis, alive) = (Redis::start().await, Backend::named("alive").await);
    let (_guard, dead) = dead_address();
    redis.run(&format!("ZADD servers 1 {} 1000 {dead}", alive.address)).await;
    let link = Link::to(redis.port);
    let checked = "weights_key: servers, outlier: off, health_check: {interval: 50ms}";
    let proxy = stale_proxy_of(checked, &redis, &link, "lua_pick: {timeout: 2500ms}", HASTY).await;
    let up = backend_series("up", dead);
    eventually("its checks fail", || async { proxy.metric(&up) == Some(0.0) }).await;
    let series = backend_series("connect_failures_total", dead);
    let failures = || proxy.metric(&series).unwrap_or_default();
    let (asked, failed) = (proxy.picks("lua"), failures());
    for _ in 0..10 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "alive");
    }
    assert_eq!((proxy.picks("lua"), failures()), (asked + 10.0, failed));
}

#[tokio::test]
async fn redis_picks_for_a_user_that_may_not_write() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    redis.set_weights([(&backend, 1.0)]).await;
    redis
        .grant(
            "on >secret resetkeys %R~servers* resetchannels &__keyspace@0__:servers* nocommands +hello \
             +auth +ping +select +client|setname +client|id +subscribe +unsubscribe +zrange +zcard +eval_ro \
             +evalsha_ro \
             +script|load +config|get",
        )
        .await;
    let link = Link::to(redis.port);
    let more = format!("username: statera, password: secret, {HASTY}");
    let proxy = stale_proxy(&redis, &link, "lua_pick: {timeout: 2500ms}", &more).await;
    let stats = info(&redis, "commandstats").await;
    let (used, other) = if Redis::is_before_7() {
        ("cmdstat_evalsha:", "cmdstat_evalsha_ro:")
    } else {
        ("cmdstat_evalsha_ro:", "cmdstat_evalsha:")
    };
    assert!(stats.contains(used) && !stats.contains(other), "{stats}");

    // This user may not read the states either, so picks go by the weights alone. With the rights of
    // docs/questions/redis-rights.md they go by both.
    let drained = Backend::named("drained").await;
    redis.run(&format!("HSET {{servers}}:states {} drain", drained.address)).await;
    redis.run(&format!("ZADD servers 1000000 {}", drained.address)).await;
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "drained");
    redis.grant(LEAST_RIGHTS).await;
    eventually("the drained backend is left out", || async {
        greeting(proxy.address()).await.is_ok_and(|name| name == "backend")
    })
    .await;
    for _ in 0..10 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "backend");
    }
    assert_eq!(proxy.weights(), [(backend.address.to_string(), 1.0)], "the snapshot cannot know");
}

/// The user may not read the key of the first pool, and may only use the older EVALSHA.
#[tokio::test]
async fn a_pool_that_this_user_may_not_read_does_not_keep_redis_from_picking_for_another() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    redis.run(&format!("ZADD others 1 {}", backend.address)).await;
    // The user may not watch any key, so Redis has to pick.
    redis
        .grant(
            "on >secret resetkeys ~others resetchannels nocommands +hello +auth +ping +select \
             +client|setname +client|id \
             +evalsha +script|load +zcard +zrange +zrevrange",
        )
        .await;
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: other}}}}\n\
         pools: {{web: {{weights_key: servers}}, other: {{weights_key: others}}}}\n\
         redis: {{url: \"{}\", username: statera, password: secret, watch: notifications, {HASTY}}}\n\
         lua_pick: {{timeout: 2500ms}}\n",
        redis.url()
    ));
    eventually("redis picks", || async {
        greeting(proxy.address()).await.is_ok_and(|name| name == "backend")
    })
    .await;
    let picked = proxy.metric("statera_picks_total{pool=\"other\",source=\"lua\"}");
    assert!(picked > Some(0.0), "{picked:?}");
}

#[tokio::test]
async fn when_every_backend_of_a_fresh_snapshot_was_tried_redis_is_asked_for_another() {
    let (_dead, dead) = dead_address();
    let good = Backend::named("good").await;
    let redis = Redis::start().await;
    redis.run(&format!("ZADD servers 1000000 {dead}")).await;
    let link = Link::to(redis.port);
    let proxy = Proxy::web(
        &format!(
            "redis: {{url: \"{}\", max_stale: 1h, response_timeout: 1h}}\nlua_pick: {{timeout: 2500ms}}",
            link.url()
        ),
        "weights_key: servers",
    );
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    // The snapshot stays fresh for an hour, and has only the dead backend.
    link.pass(Passing::AllButTheWatch);
    redis.run(&format!("ZADD servers 1 {}", good.address)).await;
    for _ in 0..10 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "good");
    }
    eventually("they are logged", || async { proxy.access_lines().len() == 10 }).await;
    for line in proxy.access_lines() {
        assert_eq!((&line["source"], &line["retries"]), (&"lua".into(), &1.into()), "{line}");
    }
    assert_eq!((proxy.picks("snapshot"), proxy.picks("lua")), (10.0, 10.0));
}

/// Waits until all sessions so far are logged, and returns their lines. No session may be open.
async fn all_lines(proxy: &Proxy) -> Vec<serde_json::Value> {
    let sessions =
        proxy.metric("statera_listener_connections_total{listener=\"web\"}").expect("it is counted");
    eventually("all sessions are logged", || async { proxy.access_lines().len() as f64 >= sessions }).await;
    proxy.access_lines()
}

/// Opens `sessions` sessions at once, which must all be served. Returns how long each waited for its pick,
/// in milliseconds.
async fn queue_times(proxy: &Proxy, address: SocketAddr, sessions: usize) -> Vec<f64> {
    let before = all_lines(proxy).await.len();
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..sessions {
        clients.spawn(greeting(address));
    }
    while let Some(served) = clients.join_next().await {
        assert_eq!(served.expect("no panic").expect("no session fails"), "backend");
    }
    all_lines(proxy).await[before..].iter().map(|line| line["queue_ms"].as_f64().expect("a number")).collect()
}

#[tokio::test]
async fn at_a_frozen_redis_at_most_max_in_flight_sessions_wait_and_later_ones_do_not() {
    const WAIT_MS: f64 = 900.0;
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    redis.set_weights([(&backend, 1.0)]).await;
    let link = Link::to(redis.port);
    // Heartbeats are rare, so that the picks notice the freeze first.
    let rare_heartbeats =
        "heartbeat_interval: 3s, max_stale: 3100ms, response_timeout: 10s, resync_interval: 1h";
    let proxy =
        stale_proxy(&redis, &link, "lua_pick: {timeout: 900ms, max_in_flight: 4}", rare_heartbeats).await;
    redis.freeze();
    let waited = queue_times(&proxy, proxy.address(), 60).await;
    let long = waited.iter().filter(|ms| **ms >= WAIT_MS / 2.0).count();
    assert!((1..=4).contains(&long), "{long} of 60 waited: {waited:?}");
    assert!(waited.iter().all(|ms| *ms < WAIT_MS * 4.0), "{waited:?}");
    for _ in 0..3 {
        let waited = queue_times(&proxy, proxy.address(), 60).await;
        assert!(
            waited.iter().all(|ms| *ms < WAIT_MS / 2.0),
            "a session waited although picks had failed: {waited:?}"
        );
    }
    redis.thaw();
    let asked = proxy.picks("lua");
    eventually("redis picks again", || async {
        greeting(proxy.address()).await.expect("no session fails");
        proxy.picks("lua") > asked
    })
    .await;
}

#[tokio::test]
async fn redis_is_asked_again_when_the_picked_member_is_no_valid_address() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    redis.set_weights([(&backend, 1.0)]).await;
    for hostile in ["10.0.0.256:80", "a..b:80", "10.0.0.1:0"] {
        redis.run(&format!("ZADD servers 1000000 {hostile}")).await;
    }
    let link = Link::to(redis.port);
    let proxy = stale_proxy(&redis, &link, "lua_pick: {timeout: 2500ms}", HASTY).await;
    let stale = proxy.picks("stale");
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "backend");
    }
    assert_eq!(proxy.picks("stale"), stale);
}
