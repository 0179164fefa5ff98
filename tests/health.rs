//! Health checks of backends that behave badly, fail-open and slow start.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{
    Backend, Program, Proxy, Redis, backend_series, backends, dead_address, eventually, greeting,
};

/// A backend that sends `greeting` and then runs `then`.
async fn greets_and<F>(
    greeting: &'static str,
    then: impl Fn(TcpStream) -> F + Copy + Send + Sync + 'static,
) -> Backend
where
    F: Future<Output = ()> + Send + 'static,
{
    Backend::start(move |mut stream| async move {
        // The client may have left.
        let _ = stream.write_all(greeting.as_bytes()).await;
        then(stream).await;
    })
    .await
}

/// Reads until the client ends.
async fn wait_for_end(mut stream: TcpStream) {
    let mut end = [0; 64];
    while stream.read(&mut end).await.is_ok_and(|bytes| bytes > 0) {}
}

async fn megabytes(mut stream: TcpStream) {
    while stream.write_all(&[b'x'; 65_536]).await.is_ok() {}
}

async fn reset(stream: TcpStream) {
    // The client may have closed already after the handshake.
    let _ = stream.set_zero_linger();
}

async fn nothing(_: TcpStream) {}

#[tokio::test]
async fn backends_that_behave_badly_are_logged_once_each_with_the_reason_and_get_no_sessions() {
    let good = greets_and("220 ready\r\n", nothing).await;
    let bad = [
        (greets_and("", wait_for_end).await, "no answer within 2s, expected \\\"220 \\\""),
        (
            greets_and("500 no\r\n", wait_for_end).await,
            "no answer within 2s, expected \\\"220 \\\", got \\\"500 no\\\\r\\\\n\\\"",
        ),
        (
            greets_and("", megabytes).await,
            "not among the first 65536 bytes of the answer: \\\"220 \\\", got \\\"xxxx",
        ),
        (greets_and("", reset).await, "connection reset by peer)"),
        (
            greets_and("22", nothing).await,
            "the connection was closed before the answer, expected \\\"220 \\\", got \\\"22\\\"",
        ),
    ];
    let (_guard, dead) = dead_address();
    let addresses: Vec<SocketAddr> =
        bad.iter().map(|(backend, _)| backend.address).chain([dead, good.address]).collect();
    let mut program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{{}, \
         health_check: {{interval: 2s, timeout: 2s, expect: \"220 \"}}}}}}\n\
         log: {{access: false}}\n",
        backends(&addresses)
    ));
    let address = program.address().await;
    let lines_of = |log: &str, backend: SocketAddr| -> Vec<String> {
        let of_it = |line: &&str| {
            line.contains("\"message\":\"backend unhealthy after ") && line.contains(&backend.to_string())
        };
        log.lines().filter(of_it).map(str::to_owned).collect()
    };
    eventually("all are logged", || async {
        let log = program.log();
        addresses[..6].iter().all(|backend| !lines_of(&log, *backend).is_empty())
    })
    .await;
    let asked = bad[0].0.accepted();
    eventually("they are checked again", || async { bad[0].0.accepted() >= asked + 2 }).await;
    for _ in 0..50 {
        assert_eq!(greeting(address).await.expect("an answer"), "220 ready\r\n");
    }
    program.signal(rustix::process::Signal::TERM);
    program.wait();
    let log = program.log();
    for (backend, reason) in &bad {
        let lines = lines_of(&log, backend.address);
        assert!(lines.len() == 1 && lines[0].contains(reason), "{reason}: {lines:?}");
    }
    let lines = lines_of(&log, dead);
    assert!(lines.len() == 1 && lines[0].contains("cannot connect: connection refused"), "{lines:?}");
    assert!(lines_of(&log, good.address).is_empty());
}

#[tokio::test]
async fn a_dead_backend_is_found_at_weight_zero_and_gets_no_sessions_when_it_gets_weight() {
    let (redis, alive, (_guard, dead)) =
        (Redis::start().await, Backend::named("alive").await, dead_address());
    redis.run(&format!("ZADD servers 1 {} 0 {dead}", alive.address)).await;
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\"}}", redis.url()),
        "weights_key: servers, outlier: off, health_check: {interval: 50ms}",
    );
    eventually("it is checked", || async {
        proxy.weights().len() == 2 && proxy.backend_metric("up", dead) == 0.0
    })
    .await;
    redis.run(&format!("ZADD servers 1000 {dead}")).await;
    eventually("the weight arrives", || async { proxy.backend_metric("weight", dead) == 1000.0 }).await;
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "alive");
    }
    assert_eq!(proxy.backend_metric("connect_failures_total", dead), 0.0);
}

#[tokio::test]
async fn a_backend_can_be_checked_at_another_port() {
    let (backend, other) = (Backend::named("served").await, Backend::named("fine").await);
    let pool = |port: u16| {
        format!(
            "{}, health_check: {{interval: 50ms, port: {port}, expect: fine}}",
            backends(&[backend.address])
        )
    };
    let proxy = Proxy::web("", &pool(other.address.port()));
    eventually("the other port is checked", || async { other.accepted() >= 3 }).await;
    assert_eq!((proxy.backend_metric("up", backend.address), backend.accepted()), (1.0, 0));
    let (_guard, dead) = dead_address();
    let proxy = Proxy::web("", &pool(dead.port()));
    eventually("it is down", || async { proxy.backend_metric("up", backend.address) == 0.0 }).await;
}

#[tokio::test]
async fn without_a_healthy_backend_health_is_ignored_which_is_logged_once_on_entry_and_once_on_exit() {
    let (first, second) = (Backend::named("first").await, Backend::named("second").await);
    let dead = dead_address();
    // Both backends serve sessions, but their checks fail.
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{{}, \
         health_check: {{interval: 50ms, port: {}}}}}}}\nlog: {{access: false}}\n\
         admin: {{bind: \"127.0.0.1:0\"}}\n",
        backends(&[first.address, second.address]),
        dead.1.port()
    ));
    let address = program.address().await;
    let logged = |text: &str| program.log().matches(text).count();
    eventually("it fails open", || async { logged("health is ignored (fail-open)") == 1 }).await;
    for _ in 0..10 {
        greeting(address).await.expect("an answer");
    }
    // Now a server at the checked port makes their checks pass.
    let (socket, answering) = dead;
    drop(socket);
    let _answers = Backend::start_at(answering, nothing).await;
    eventually("health counts again", || async { logged("health counts again") == 1 }).await;
    // One healthy backend is enough for that. The other one passes at another moment.
    eventually("both pass", || async { logged("backend healthy again after ") == 2 }).await;
    assert_eq!((logged("health is ignored (fail-open)"), logged("health counts again")), (1, 1));
}

#[tokio::test]
async fn below_its_percentage_of_healthy_weight_the_pool_fails_open_and_the_gauge_shows_it() {
    let (redis, alive, (_guard, dead)) =
        (Redis::start().await, Backend::named("alive").await, dead_address());
    redis.run(&format!("ZADD servers 1 {} 1 {dead}", alive.address)).await;
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\"}}", redis.url()),
        "weights_key: servers, outlier: off, fail_open_percent: 30, health_check: {interval: 50ms}",
    );
    let fails_open = || proxy.metric("statera_pool_fail_open{pool=\"web\"}");
    eventually("the dead backend is found", || async {
        proxy.weights().len() == 2 && proxy.backend_metric("effective_weight", dead) == 0.0
    })
    .await;
    assert_eq!((fails_open(), proxy.backend_metric("up", dead)), (Some(0.0), 0.0));
    redis.run(&format!("ZADD servers 3 {dead}")).await;
    eventually("a quarter is too little", || async { fails_open() == Some(1.0) }).await;
    assert_eq!(proxy.backend_metric("effective_weight", dead), 3.0);
    redis.run(&format!("ZADD servers 2 {dead}")).await;
    eventually("a third is enough", || async { fails_open() == Some(0.0) }).await;
}

/// Each change of a weight takes this pool into fail-open or out of it. The log must not have a line for
/// each.
#[tokio::test]
async fn a_pool_that_fails_open_again_and_again_logs_few_lines_and_its_gauge_follows() {
    let (redis, alive, (_guard, dead)) =
        (Redis::start().await, Backend::named("alive").await, dead_address());
    redis.run(&format!("ZADD servers 1 {} 1 {dead}", alive.address)).await;
    let program = Program::run(&format!(
        "workers: 1\nadmin: {{bind: \"127.0.0.1:0\"}}\n\
         listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools:\n  web: {{weights_key: servers, outlier: off, fail_open_percent: 30, \
         health_check: {{interval: 50ms}}}}\n\
         redis: {{url: \"{}\"}}\n",
        redis.url()
    ));
    program.says("backend unhealthy after ").await;
    for flip in 0..60 {
        redis.run(&format!("ZADD servers {} {dead}", if flip % 2 == 0 { 3 } else { 1 })).await;
        let wanted = f64::from(u8::from(flip % 2 == 0));
        eventually("the gauge follows", || async {
            program.metric("statera_pool_fail_open", "pool=\"web\"").await == wanted
        })
        .await;
    }
    let log = program.log();
    let lines = log.lines().filter(|line| line.contains("on healthy backends")).count();
    assert!((1..=20).contains(&lines), "{lines} lines\n{log}");
}

#[tokio::test]
async fn a_backend_that_joins_gets_its_share_step_by_step_and_the_first_table_applies_at_once() {
    let redis = Redis::start().await;
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    redis.set_weights([(&old, 100.0)]).await;
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\"}}", redis.url()),
        "weights_key: servers, slow_start: 1500ms",
    );
    let effective = |backend: &Backend| {
        proxy.metric(&backend_series("effective_weight", backend.address)).unwrap_or_default()
    };
    eventually("the table arrives", || async { effective(&old) == 100.0 }).await;
    let version = || proxy.metric("statera_snapshot_version{pool=\"web\"}").unwrap_or_default();
    let before = version();
    redis.run(&format!("ZADD servers 100 {}", new.address)).await;
    let mut seen = Vec::new();
    eventually("the backend has its full weight", || {
        let weight = effective(&new);
        seen.push(weight);
        async move { weight == 100.0 }
    })
    .await;
    seen.retain(|weight| *weight > 0.0);
    assert!(seen.is_sorted() && seen[0] < 50.0, "{seen:?}");
    seen.dedup();
    assert!(seen.len() >= 5, "{seen:?}");
    assert_eq!(effective(&old), 100.0);
    let steps = version();
    assert!(steps - before < 30.0, "{}", steps - before);
    redis.run(&format!("ZADD servers 50 {}", new.address)).await;
    eventually("a changed weight applies at once", || async { effective(&new) == 50.0 }).await;
}

/// Runs sessions one after the other, all of which must be served by a good backend. Returns how many each
/// has served.
async fn sessions_of_each(proxy: &Proxy, good: &[Backend], sessions: u64) -> Vec<u64> {
    let before: Vec<u64> = good.iter().map(Backend::accepted).collect();
    for _ in 0..sessions {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "good");
    }
    good.iter().zip(before).map(|(backend, before)| backend.accepted() - before).collect()
}

/// Adds one member after the other, each when the proxy has the one before.
async fn write_one_by_one(redis: &Redis, proxy: &Proxy, addresses: &[SocketAddr]) {
    for (n, address) in addresses.iter().enumerate() {
        redis.run(&format!("ZADD servers 100 {address}")).await;
        eventually("the member arrives", || async { proxy.weights().len() == n + 1 }).await;
    }
}

#[tokio::test]
async fn a_table_that_is_deleted_and_written_one_by_one_keeps_its_health_and_its_even_shares() {
    let redis = Redis::start().await;
    let mut good = Vec::new();
    for _ in 0..7 {
        good.push(greets_and("good", nothing).await);
    }
    // Accepts connections and sends nothing.
    let hanging = greets_and("", wait_for_end).await;
    let mut addresses: Vec<SocketAddr> = good.iter().map(|backend| backend.address).collect();
    addresses.insert(3, hanging.address);
    let checks = "health_check: {interval: 60s, timeout: 200ms, expect: good}, slow_start: 60s";
    let members: Vec<_> = addresses.iter().map(|address| format!("100 {address}")).collect();
    let all = format!("ZADD servers {}", members.join(" "));
    redis.run(&all).await;
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\"}}", redis.url()),
        &format!("weights_key: servers, balance: weighted_round_robin, outlier: off, {checks}"),
    );
    let up = |backend: &Backend| proxy.metric(&backend_series("up", backend.address));
    eventually("its checks fail", || async { up(&hanging) == Some(0.0) }).await;
    let checked = |backend: &Backend| backend.accepted();
    let sessions_before = checked(&hanging);

    // The table is also empty for a while, which means that all members have left.
    for _ in 0..2 {
        redis.run("DEL servers").await;
        write_one_by_one(&redis, &proxy, &addresses).await;
        assert_eq!(up(&hanging), Some(0.0), "its health is remembered");
        let each = sessions_of_each(&proxy, &good, 70).await;
        // A count deviates from the exact share by 3.42 sessions at most, wherever the sequence begins.
        assert!(each.iter().all(|sessions| (7..=13).contains(sessions)), "{each:?}");
    }
    assert_eq!(checked(&hanging), sessions_before, "the hanging backend got no session and no check");
}

#[tokio::test]
async fn a_first_table_that_is_written_one_by_one_has_even_shares() {
    for on_empty in ["keep_last", "refuse"] {
        let redis = Redis::start().await;
        let mut good = Vec::new();
        for _ in 0..4 {
            good.push(greets_and("good", nothing).await);
        }
        let addresses: Vec<SocketAddr> = good.iter().map(|backend| backend.address).collect();
        let proxy = Proxy::web(
            &format!("redis: {{url: \"{}\", on_empty: {on_empty}}}", redis.url()),
            "weights_key: servers, balance: weighted_round_robin, slow_start: 60s",
        );
        let first_answer = || {
            let is_kept = proxy.metric("statera_pool_table_kept{pool=\"web\"}") == Some(1.0);
            is_kept || proxy.metric("statera_snapshot_age_seconds{pool=\"web\"}").is_some()
        };
        eventually("redis has answered that the table is empty", || async { first_answer() }).await;
        write_one_by_one(&redis, &proxy, &addresses).await;
        let each = sessions_of_each(&proxy, &good, 40).await;
        assert!(each.iter().all(|sessions| (7..=13).contains(sessions)), "{on_empty}: {each:?}");
    }
}

#[tokio::test]
async fn a_backend_that_resets_its_sessions_is_ejected() {
    let (good, bad) = (Backend::named("good").await, greets_and("", reset).await);
    let pool = format!(
        "{}, balance: weighted_round_robin, outlier: {{consecutive_failures: 3, ejection: 1h}}",
        backends(&[good.address, bad.address])
    );
    let proxy = Proxy::web("", &pool);
    let mut failed = 0;
    for _ in 0..100 {
        failed += u32::from(greeting(proxy.address()).await.map_or(true, |text| text.is_empty()));
        if proxy.backend_metric("ejections_total", bad.address) == 1.0 {
            break;
        }
    }
    assert!((3..10).contains(&failed), "{failed}");
    for _ in 0..50 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "good");
    }
}
