//! `drain.timeout`: the sessions of draining backends are closed after it.

use std::array::from_fn;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep};

use crate::support::{Backend, Proxy, Redis, backend_series, eventually, soon};

const TIMEOUT: Duration = Duration::from_secs(2);

/// A proxy with one worker, so that the session lines are in the order of the closes, and with a short
/// half-close timeout, so that its clock for silent sessions has small steps.
fn proxy(redis: &Redis) -> Proxy {
    Proxy::start(&format!(
        "workers: 1\nredis: {{url: \"{}\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{weights_key: servers, half_close_timeout: 1s, drain: {{timeout: {TIMEOUT:?}}}}}}}\n",
        redis.url()
    ))
}

async fn echoed(stream: &mut TcpStream) {
    let mut byte = [0];
    stream.write_all(b"x").await.expect("room");
    soon("the echo", stream.read_exact(&mut byte)).await.expect("the session is open");
}

/// Opens a session and moves a byte in both directions.
async fn session(proxy: &Proxy) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.address()).await.expect("it listens");
    echoed(&mut stream).await;
    stream
}

/// Waits for the end of a session. Returns what its client read, and when.
async fn end(stream: &mut TcpStream) -> (std::io::Result<usize>, Instant) {
    let mut bytes = [0; 16];
    let ended = soon("the session ends", stream.read(&mut bytes)).await;
    (ended, Instant::now())
}

async fn drained_lines(proxy: &Proxy, count: usize) -> Vec<Value> {
    proxy.lines_closed_by("drained", count).await
}

/// Sets the weights, removes the backends without one, and waits until the proxy has the change.
async fn set(redis: &Redis, proxy: &Proxy, weights: &[(&Backend, Option<f64>)]) {
    for (backend, weight) in weights {
        match weight {
            Some(weight) => redis.run(&format!("ZADD servers {weight} {}", backend.address)).await,
            None => redis.run(&format!("ZREM servers {}", backend.address)).await,
        };
    }
    let wanted = || async {
        let now = proxy.weights();
        weights.iter().all(|(backend, weight)| {
            let name = backend.address.to_string();
            now.iter().find(|(known, _)| *known == name).map(|(_, weight)| *weight) == *weight
        })
    };
    eventually("the weights arrive", wanted).await;
}

#[tokio::test]
async fn sessions_of_a_removed_backend_and_of_one_at_weight_zero_are_closed_after_the_timeout_and_not_before()
{
    let redis = Redis::start().await;
    let [removed, weightless, stays] = [Backend::echo().await, Backend::echo().await, Backend::echo().await];
    let proxy = proxy(&redis);
    set(&redis, &proxy, &[(&removed, Some(1.0))]).await;
    let mut of_removed = session(&proxy).await;
    set(&redis, &proxy, &[(&weightless, Some(1.0)), (&removed, Some(0.0))]).await;
    let mut of_weightless = session(&proxy).await;
    let left = Instant::now();
    set(&redis, &proxy, &[(&stays, Some(1.0)), (&weightless, Some(0.0)), (&removed, None)]).await;
    let mut of_stays = session(&proxy).await;
    assert_eq!((removed.accepted(), weightless.accepted(), stays.accepted()), (1, 1, 1));

    let (ended, _) = end(&mut of_removed).await;
    assert_eq!(ended.expect("a clean end"), 0);
    let (ended, at) = end(&mut of_weightless).await;
    assert_eq!(ended.expect("a clean end"), 0);
    assert!(at - left >= TIMEOUT, "{:?}", at - left);
    for line in drained_lines(&proxy, 2).await {
        assert_eq!((&line["term"], &line["bytes_in"]), (&"KD".into(), &1.into()), "{line}");
        assert!(line["duration_ms"].as_f64().expect("a number") >= TIMEOUT.as_secs_f64() * 1e3, "{line}");
    }
    echoed(&mut of_stays).await;
}

/// Puts a backend into a state, or makes it ready, and waits until the proxy has the change.
async fn put(redis: &Redis, proxy: &Proxy, backend: &Backend, state: &str) {
    let change = match state {
        "ready" => format!("HDEL {{servers}}:states {}", backend.address),
        _ => format!("HSET {{servers}}:states {} {state}", backend.address),
    };
    redis.run(&change).await;
    let series = backend_series("effective_weight", backend.address);
    let is_ready = state == "ready";
    let arrived = || async { proxy.metric(&series).is_some_and(|weight| (weight > 0.0) == is_ready) };
    eventually("the state arrives", arrived).await;
}

#[tokio::test]
async fn sessions_in_drain_or_maint_are_closed_after_the_timeout_unless_their_backend_is_ready_again() {
    let redis = Redis::start().await;
    let backends = [Backend::echo().await, Backend::echo().await, Backend::echo().await];
    let [drained, in_maint, back] = &backends;
    let proxy = proxy(&redis);
    set(&redis, &proxy, &[(drained, Some(1.0)), (in_maint, Some(1.0)), (back, Some(1.0))]).await;
    // Opens sessions until each backend has one.
    let mut sessions: [_; 3] = from_fn(|_| None);
    while let Some(missing) = sessions.iter().position(Option::is_none) {
        let before = backends[missing].accepted();
        let session = session(&proxy).await;
        if backends[missing].accepted() > before {
            sessions[missing] = Some(session);
        }
    }
    let left = Instant::now();
    put(&redis, &proxy, back, "drain").await;
    put(&redis, &proxy, back, "ready").await;
    put(&redis, &proxy, drained, "drain").await;
    put(&redis, &proxy, in_maint, "maint").await;
    let [mut of_drained, mut of_maint, mut of_back] = sessions.map(|session| session.expect("it was made"));
    for session in [&mut of_drained, &mut of_maint] {
        let (ended, at) = end(session).await;
        assert_eq!(ended.expect("a clean end"), 0);
        assert!(at - left >= TIMEOUT, "{:?}", at - left);
    }
    // Longer than a session needs to be closed after its timeout.
    sleep(Duration::from_secs(2)).await;
    echoed(&mut of_back).await;
    assert_eq!(drained_lines(&proxy, 2).await.len(), 2);
}

#[tokio::test]
async fn sessions_of_a_backend_that_gets_weight_again_stay_open() {
    let redis = Redis::start().await;
    let (backend, other) = (Backend::echo().await, Backend::echo().await);
    let proxy = proxy(&redis);
    set(&redis, &proxy, &[(&backend, Some(1.0))]).await;
    let mut session = session(&proxy).await;
    for back in [0.5, 7.0] {
        set(&redis, &proxy, &[(&other, Some(1.0)), (&backend, if back < 1.0 { Some(0.0) } else { None })])
            .await;
        sleep(TIMEOUT * 2 / 3).await;
        set(&redis, &proxy, &[(&backend, Some(back))]).await;
    }
    // Longer than the timeout and the time in which a session is closed after it.
    sleep(TIMEOUT + Duration::from_secs(2)).await;
    echoed(&mut session).await;
    set(&redis, &proxy, &[(&backend, None)]).await;
    let (ended, _) = end(&mut session).await;
    assert!(ended.is_err() || ended.is_ok_and(|bytes| bytes == 0));
    assert_eq!(drained_lines(&proxy, 1).await.len(), 1);
}

/// Busy sessions are cut last, and by a reset: they are not complete, and a clean end would say that they
/// are.
#[tokio::test]
async fn silent_sessions_are_closed_first_and_not_all_at_once() {
    const SILENT: usize = 60;
    const BUSY: usize = 10;
    let redis = Redis::start().await;
    let (backend, other) = (Backend::echo().await, Backend::echo().await);
    let proxy = proxy(&redis);
    set(&redis, &proxy, &[(&backend, Some(1.0))]).await;
    let mut ends = JoinSet::new();
    let mut busy_clients = Vec::new();
    for n in 0..SILENT + BUSY {
        let mut stream = session(&proxy).await;
        let is_busy = n % 7 == 0 && busy_clients.len() < BUSY;
        if is_busy {
            busy_clients.push(stream.local_addr().expect("connected").to_string());
        }
        ends.spawn(async move {
            let mut ticks = interval(Duration::from_millis(20));
            let mut byte = [0];
            loop {
                if !is_busy {
                    let (ended, at) = end(&mut stream).await;
                    return (is_busy, ended, at);
                }
                ticks.tick().await;
                if stream.write_all(b"x").await.is_err()
                    || !stream.read(&mut byte).await.is_ok_and(|n| n == 1)
                {
                    return (is_busy, Err(std::io::ErrorKind::ConnectionReset.into()), Instant::now());
                }
            }
        });
    }
    assert_eq!(busy_clients.len(), BUSY);
    set(&redis, &proxy, &[(&other, Some(1.0)), (&backend, None)]).await;
    let ends = soon("all sessions end", ends.join_all()).await;
    let (first, last) = (ends.iter().map(|end| end.2).min(), ends.iter().map(|end| end.2).max());
    let took = last.zip(first).map(|(last, first)| last - first).expect("some");
    assert!(took >= Duration::from_millis(500), "all within {took:?}");
    for (is_busy, ended, _) in &ends {
        assert_eq!(*is_busy, ended.is_err(), "{ended:?}");
    }
    let lines = drained_lines(&proxy, SILENT + BUSY).await;
    let is_busy = |line: &Value| busy_clients.iter().any(|client| line["client"] == *client);
    let order: Vec<_> = lines.iter().map(is_busy).collect();
    assert!(order.is_sorted(), "{order:?}");
}
