//! Admin states: a backend in drain or maint gets no new sessions on any proxy, whatever its weight and
//! health.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Backend, Operator, Program, Proxy, Redis, calls, dead_address, eventually, greeting};

const NOTIFIED: &str = "watch: notifications, resync_interval: 1h";

fn follow(redis: &Redis, settings: &str, pool: &str) -> Proxy {
    Proxy::web(
        &format!("redis: {{url: \"{}\", {settings}}}", redis.url()),
        &format!("weights_key: servers{pool}"),
    )
}

/// One metric of one backend.
fn metric_of(proxy: &Proxy, name: &str, backend: &Backend) -> f64 {
    let series = format!("statera_backend_{name}{{pool=\"web\",backend=\"{}\"}}", backend.address);
    proxy.metric(&series).unwrap_or_default()
}

async fn effective_weight_becomes(proxy: &Proxy, backend: &Backend, wanted: f64) {
    eventually("the effective weight", || async { metric_of(proxy, "effective_weight", backend) == wanted })
        .await;
}

#[tokio::test]
async fn a_state_is_obeyed_in_every_watch_mode_and_leaves_the_weight_alone() {
    let redis = Redis::start().await;
    let (a, b) = (Backend::named("a").await, Backend::named("b").await);
    redis.set_weights([(&a, 5.0), (&b, 5.0)]).await;
    let proxies = [
        follow(&redis, NOTIFIED, ""),
        follow(&redis, "watch: tracking, resync_interval: 1h", ""),
        follow(&redis, "watch: poll, poll_interval: 100ms", ""),
    ];
    for state in ["drain", "maint"] {
        redis.run(&format!("HSET {{servers}}:states {} {state}", a.address)).await;
        for proxy in &proxies {
            effective_weight_becomes(proxy, &a, 0.0).await;
            for _ in 0..10 {
                assert_eq!(greeting(proxy.address()).await.expect("an answer"), "b");
            }
            let labels = format!("{{pool=\"web\",backend=\"{}\",state=\"{state}\"}}", a.address);
            let shown = proxy.metric(&format!("statera_backend_admin_state{labels}"));
            assert_eq!((shown, metric_of(proxy, "weight", &a)), (Some(1.0), 5.0));
        }
        // A new weight leaves the state as it is.
        redis.run(&format!("ZADD servers 7 {}", a.address)).await;
        for proxy in &proxies {
            eventually("the weight arrives", || async { metric_of(proxy, "weight", &a) == 7.0 }).await;
            assert_eq!(metric_of(proxy, "effective_weight", &a), 0.0);
        }
        redis.run(&format!("HDEL {{servers}}:states {}", a.address)).await;
        for proxy in &proxies {
            effective_weight_becomes(proxy, &a, 7.0).await;
        }
        redis.run(&format!("ZADD servers 5 {}", a.address)).await;
    }
    // With all backends in drain, sessions are refused and the pool does not fail open.
    redis.run(&format!("HSET {{servers}}:states {} drain {} drain", a.address, b.address)).await;
    effective_weight_becomes(&proxies[0], &a, 0.0).await;
    greeting(proxies[0].address()).await.expect_err("all backends are in drain");
    assert_eq!(proxies[0].metric("statera_pool_fail_open{pool=\"web\"}"), Some(0.0));
}

#[tokio::test]
async fn a_backend_in_drain_is_checked_and_one_in_maint_is_not() {
    let redis = Redis::start().await;
    let (a, b) = (Backend::named("a").await, Backend::named("b").await);
    redis.set_weights([(&a, 1.0), (&b, 1.0)]).await;
    let proxy = follow(&redis, NOTIFIED, ", health_check: {interval: 50ms}");
    redis.run(&format!("HSET {{servers}}:states {} drain {} maint", a.address, b.address)).await;
    effective_weight_becomes(&proxy, &b, 0.0).await;
    let (of_a, of_b) = (a.accepted(), b.accepted());
    eventually("one is checked", || async { a.accepted() >= of_a + 10 }).await;
    // One check may have been under way.
    assert!(b.accepted() <= of_b + 1, "{} checks", b.accepted() - of_b);
}

#[tokio::test]
async fn an_unknown_state_is_ignored_and_a_key_that_is_no_hash_leaves_the_weights_alone() {
    let redis = Redis::start().await;
    let a = Backend::named("a").await;
    redis.set_weights([(&a, 1.0)]).await;
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{url: \"{}\", {NOTIFIED}}}\n",
        redis.url()
    ));
    let address = program.address().await;
    redis.run(&format!("HSET {{servers}}:states {} Drain no-address drain", a.address)).await;
    eventually("it is logged", || async {
        program.log().contains("ignored invalid entries in {servers}:states")
    })
    .await;
    assert_eq!(greeting(address).await.expect("an answer"), "a");
    redis.run("DEL {servers}:states").await;
    redis.run("SET {servers}:states x").await;
    eventually("it is logged", || async {
        program.log().contains("it holds something else than a hash: delete it")
    })
    .await;
    assert_eq!(greeting(address).await.expect("an answer"), "a");
    redis.run("DEL {servers}:states").await;
    redis.run(&format!("HSET {{servers}}:states {} drain", a.address)).await;
    eventually("it is obeyed", || async { greeting(address).await.is_err() }).await;
}

#[tokio::test]
async fn a_proxy_that_may_not_read_the_states_follows_the_weights_and_logs_the_missing_rights() {
    let redis = Redis::start().await;
    let a = Backend::named("a").await;
    redis.set_weights([(&a, 1.0)]).await;
    redis
        .grant("on >secret resetkeys %R~servers* resetchannels &__keyspace@0__:servers* nocommands +hello +auth +select +subscribe +zrange +config|get")
        .await;
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{url: \"{}\", username: statera, password: secret}}\n",
        redis.url()
    ));
    let address = program.address().await;
    eventually("it is logged", || async {
        let log = program.log();
        log.contains("grant the ACL user +hlen +hgetall %R~{servers}:states")
            && log.contains("grant &__keyspace@0__:{servers}:states")
    })
    .await;
    assert_eq!(greeting(address).await.expect("an answer"), "a");
}

#[tokio::test]
async fn a_states_key_that_is_too_large_does_not_stop_the_weights() {
    let redis = Redis::start().await;
    let (a, b) = (Backend::named("a").await, Backend::named("b").await);
    redis.set_weights([(&a, 1.0)]).await;
    redis.run("EVAL local\u{a0}s=string.rep('x',30000000)redis.call('HSET','{servers}:states','10.0.0.1:80',s) 0".replace('\u{a0}', "\t").as_str()).await;
    let proxy = follow(&redis, NOTIFIED, "");
    eventually("the table arrives", || async { metric_of(&proxy, "weight", &a) == 1.0 }).await;
    redis.set_weights([(&b, 2.0)]).await;
    eventually("the next one, too", || async { metric_of(&proxy, "weight", &b) == 2.0 }).await;
}

/// With `on_empty: keep_last` an empty table keeps the weights, but the admin states still apply.
#[tokio::test]
async fn states_are_obeyed_beside_a_kept_table_and_kept_with_it() {
    let redis = Redis::start().await;
    let (a, b) = (Backend::named("a").await, Backend::named("b").await);
    redis.set_weights([(&a, 5.0), (&b, 5.0)]).await;
    let proxy = follow(&redis, NOTIFIED, "");
    effective_weight_becomes(&proxy, &a, 5.0).await;
    redis.run("DEL servers").await;
    redis.run(&format!("HSET {{servers}}:states {} drain", a.address)).await;
    effective_weight_becomes(&proxy, &a, 0.0).await;
    redis.run(&format!("HSET {{servers}}:states {} maint", b.address)).await;
    redis.run(&format!("HDEL {{servers}}:states {}", a.address)).await;
    effective_weight_becomes(&proxy, &a, 5.0).await;
    assert_eq!(metric_of(&proxy, "effective_weight", &b), 0.0);
    // If the states disappear as the weights did, both are kept.
    let before = calls(&redis, "hlen").await;
    redis.run("DEL {servers}:states").await;
    eventually("it is read", || async { calls(&redis, "hlen").await > before }).await;
    for _ in 0..10 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "a");
    }

    // States are also obeyed while the weights key has the wrong type.
    redis.run("SET servers x").await;
    redis.run(&format!("HSET {{servers}}:states {} drain", a.address)).await;
    effective_weight_becomes(&proxy, &a, 0.0).await;
    effective_weight_becomes(&proxy, &b, 5.0).await;
}

/// Each change would be a log line of its own; the log limiter keeps them few.
#[tokio::test]
async fn states_that_flip_write_few_lines() {
    let redis = Redis::start().await;
    let a = Backend::named("a").await;
    redis.set_weights([(&a, 1.0)]).await;
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{url: \"{}\", {NOTIFIED}}}\n",
        redis.url()
    ));
    let address = program.address().await;
    eventually("the table arrives", || async { greeting(address).await.is_ok_and(|name| name == "a") }).await;
    for flip in 0..100 {
        let before = calls(&redis, "hlen").await;
        redis.run("DEL {servers}:states").await;
        match flip % 3 {
            0 => redis.run(&format!("HSET {{servers}}:states {} Drain", a.address)).await,
            1 => redis.run("SET {servers}:states x").await,
            _ => redis.run("PING").await,
        };
        eventually("it is read", || async { calls(&redis, "hlen").await > before }).await;
    }
    let log = program.log();
    let lines =
        log.lines().filter(|line| line.contains("drain or maint") || line.contains("neither drain")).count();
    assert!((2..=30).contains(&lines), "{lines} lines\n{log}");
}

/// Opens sessions until one reaches `backend`, and returns that one.
async fn session_at(backend: &Backend, proxy: std::net::SocketAddr) -> TcpStream {
    let before = backend.accepted();
    loop {
        let mut session = TcpStream::connect(proxy).await.expect("it listens");
        session.write_all(b"x").await.expect("a session");
        session.read_exact(&mut [0]).await.expect("an answer");
        if backend.accepted() > before {
            return session;
        }
    }
}

#[tokio::test]
async fn a_hundred_backends_in_drain_are_waited_for_at_once() {
    let operator = Operator::start().await;
    let members: Vec<_> = (0..100).map(|n| format!("10.0.0.{n}:80")).collect();
    let weights: Vec<_> = members.iter().map(|member| format!("1 {member}")).collect();
    operator.redis.run(&format!("ZADD servers {}", weights.join(" "))).await;
    let program = Program::run(&operator.yaml(""));
    program.address().await;
    eventually("it reports", || async {
        operator.json("get web").await["applied"]["have"].as_array().is_some_and(|have| have.len() == 1)
    })
    .await;
    let drained = operator.weights(&format!("drain web {} --wait=60s", members.join(" "))).await;
    assert!(
        drained.code == Some(0) && drained.stdout.contains("no session is left on 1 proxy"),
        "{drained:?}"
    );
}

/// Exchanges bytes on `session` ten times a second, `times` times. The command `waiting` must still wait
/// then, and succeed after the session has ended.
async fn is_waited_for(mut session: TcpStream, mut waiting: std::process::Child, times: u32) {
    for _ in 0..times {
        session.write_all(b"y").await.expect("it lives");
        session.read_exact(&mut [0]).await.expect("an answer");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert!(waiting.try_wait().expect("a child process").is_none(), "a session is left");
    }
    drop(session);
    let ended = tokio::task::spawn_blocking(move || waiting.wait().expect("a child process"));
    assert!(ended.await.expect("no panic").success());
}

#[tokio::test]
async fn drain_waits_for_the_last_session_of_the_fleet() {
    let operator = Operator::start().await;
    let (echo, other) = (Backend::echo().await, Backend::echo().await);
    operator.redis.set_weights([(&echo, 1.0)]).await;
    let programs = [Program::run(&operator.yaml("")), Program::run(&operator.yaml(""))];
    eventually("both report", || async {
        operator.json("get web").await["applied"]["have"].as_array().is_some_and(|have| have.len() == 2)
    })
    .await;
    // Opens one session through each proxy.
    let mut sessions = Vec::new();
    for program in &programs {
        let mut session = TcpStream::connect(program.address().await).await.expect("it listens");
        session.write_all(b"x").await.expect("a session");
        session.read_exact(&mut [0]).await.expect("an answer");
        sessions.push(session);
    }
    operator.redis.run(&format!("ZADD servers 1 {}", other.address)).await;
    let drain = format!("drain web {} --wait=1s", echo.address);
    let typed = operator.weights(&drain).await;
    assert_eq!(typed.code, Some(3), "{typed:?}");
    assert!(
        typed.stderr.contains("waiting for 2 of 2 proxies: ") && typed.stderr.contains(" (1 session)"),
        "{typed:?}"
    );
    let get = operator.weights("get web").await;
    let line = get.stdout.lines().find(|line| line.starts_with(&echo.address.to_string()));
    assert!(line.is_some_and(|line| line.ends_with("0.0 %  drain")), "{get:?}");

    drop(sessions.pop());
    let mut waiting = operator.command(&["drain", "web", &echo.address.to_string(), "--wait=60s"]);
    let waiting = waiting.stdout(std::process::Stdio::null()).spawn().expect("it starts");
    let session = sessions.pop().expect("the other one");
    is_waited_for(session, waiting, 10).await;

    // The backend is back and in drain again before a proxy reports; its last report is about the first
    // drain.
    operator.done(&format!("ready web {}", echo.address)).await;
    operator.redis.run(&format!("ZADD servers 0 {}", other.address)).await;
    let address = programs[0].address().await;
    let again = session_at(&echo, address).await;
    operator.redis.run(&format!("ZADD servers 1 {}", other.address)).await;
    let typed = operator.weights(&format!("drain web {} --wait=3s", echo.address)).await;
    assert!(typed.code == Some(3) && typed.stderr.contains(" (1 session)"), "{typed:?}");

    // A backend that left the table is waited for as well.
    let mut waiting = operator.command(&["drain", "web", &echo.address.to_string(), "--wait=60s"]);
    let waiting = waiting.stdout(std::process::Stdio::null()).spawn().expect("it starts");
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    operator.redis.run(&format!("ZREM servers {}", echo.address)).await;
    is_waited_for(again, waiting, 25).await;
    operator.redis.run(&format!("ZADD servers 1 {}", echo.address)).await;

    let simulated = operator.json(&format!("simulate web {}=5", echo.address)).await.to_string();
    let all = format!("\"member\":\"{}\",", other.address);
    assert!(simulated.contains(&all) && simulated.contains("\"share_percent\":100"), "{simulated}");

    let ready = operator.done(&format!("ready web {}", echo.address)).await;
    assert_eq!(ready.stdout, format!("{}: drain -> ready\n", echo.address));
    let (_guard, stranger) = dead_address();
    let missing = operator.weights(&format!("drain web {stranger}")).await;
    assert_eq!(missing.code, Some(1));
    assert!(
        missing.stderr.contains(&format!("servers has no member {stranger}: nothing was changed")),
        "{missing:?}"
    );
}
