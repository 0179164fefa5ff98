//! `max_connections` and `queue`: real sessions beside full backends, on all workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::{Backend, Proxy, Redis, backend_series, backends, dead_address, echo, eventually, soon};

const PATIENT: &str = "queue: {size: 500, timeout: 20s}";

/// Waits until `sessions` sessions are in the queue.
async fn queue_becomes(proxy: &Proxy, sessions: f64) {
    let series = "statera_pool_queue{pool=\"web\"}";
    let shown = || async { proxy.metric(series) == Some(sessions) };
    eventually(&format!("{sessions} sessions wait"), shown).await;
}

fn rejected(proxy: &Proxy, reason: &str) -> f64 {
    let series = format!("statera_listener_rejected_total{{listener=\"web\",reason=\"{reason}\"}}");
    proxy.metric(&series).expect("a counter")
}

/// Connects a client that sends one byte, by which the backend and the scenario know it.
async fn named_client(proxy: &Proxy, name: u8) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.address()).await.expect("it listens");
    stream.write_all(&[name]).await.expect("it is not refused");
    stream
}

/// Connects a client that must be refused: the proxy resets it, maybe before the handshake is over.
async fn client_is_refused(proxy: &Proxy) {
    if let Ok(mut stream) = TcpStream::connect(proxy.address()).await {
        soon("the session is reset", stream.read(&mut [0])).await.expect_err("no clean end");
    }
}

/// Ends a client that was served: it reads its answer and closes.
async fn finish(mut stream: TcpStream) {
    soon("the answer", stream.read_exact(&mut [0])).await.expect("an answer");
}

/// A backend that sends each byte back and reports it through the channel. A session lasts until its client
/// closes.
async fn reporting_backend() -> (Backend, mpsc::UnboundedReceiver<u8>) {
    let (report, reports) = mpsc::unbounded_channel();
    let backend = Backend::start(move |mut stream| {
        let report = report.clone();
        async move {
            let mut bytes = [0; 1];
            while let Ok(1) = stream.read(&mut bytes).await {
                // The scenario may be over.
                let _ = report.send(bytes[0]);
                let _ = stream.write_all(&bytes).await;
            }
        }
    })
    .await;
    (backend, reports)
}

/// Waits for the next byte that a backend reports.
async fn next_served(reports: &mut mpsc::UnboundedReceiver<u8>) -> u8 {
    soon("a session is served", reports.recv()).await.expect("the backend runs")
}

#[tokio::test]
async fn a_cap_holds_under_two_hundred_clients_and_all_are_served() {
    const CAP: u64 = 5;
    let (now, most) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut all = Vec::new();
    for _ in 0..2 {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        let own = Arc::new(AtomicU64::new(0));
        all.push(
            Backend::start(move |mut stream| {
                let (own, now, most) = (Arc::clone(&own), Arc::clone(&now), Arc::clone(&most));
                async move {
                    now.fetch_add(1, SeqCst);
                    most.fetch_max(own.fetch_add(1, SeqCst) + 1, SeqCst);
                    let mut bytes = Vec::new();
                    // The session lasts until its client closes.
                    let _ = stream.write_all(b"x").await;
                    let _ = stream.read_to_end(&mut bytes).await;
                    own.fetch_sub(1, SeqCst);
                    now.fetch_sub(1, SeqCst);
                }
            })
            .await,
        );
    }
    for balance in ["weighted_random", "weighted_round_robin", "least_conn", "source_hash"] {
        let addresses: Vec<_> = all.iter().map(|backend| backend.address).collect();
        let pool = format!("{}, balance: {balance}, max_connections: {CAP}, {PATIENT}", backends(&addresses));
        let proxy = Proxy::web("", &pool);
        let address = proxy.address();
        let mut clients = JoinSet::new();
        for _ in 0..200 {
            clients.spawn(async move {
                let mut stream = TcpStream::connect(address).await.expect("it listens");
                let mut byte = [0; 1];
                stream.read_exact(&mut byte).await
            });
        }
        let answers = soon("all clients are served", clients.join_all()).await;
        assert!(answers.iter().all(Result::is_ok), "{balance}: {answers:?}");
        queue_becomes(&proxy, 0.0).await;
        assert_eq!(rejected(&proxy, "queue_timeout") + rejected(&proxy, "queue_full"), 0.0, "{balance}");
        eventually("all sessions end", || async { now.load(SeqCst) == 0 }).await;
        assert_eq!(most.swap(0, SeqCst), CAP, "{balance}");
    }
}

#[tokio::test]
async fn the_first_to_come_is_served_first_and_the_log_says_how_long_each_session_waited() {
    let (backend, mut reports) = reporting_backend().await;
    let pool = format!("{}, max_connections: 1, {PATIENT}", backends(&[backend.address]));
    let proxy = Proxy::web("", &pool);
    let (mut clients, mut addresses) = (Vec::new(), Vec::new());
    for name in 0..10 {
        clients.push(named_client(&proxy, name).await);
        if name == 0 {
            assert_eq!(next_served(&mut reports).await, 0);
        }
        queue_becomes(&proxy, f64::from(name)).await;
    }
    for name in 0..10 {
        if name > 0 {
            assert_eq!(next_served(&mut reports).await, name);
        }
        assert!(reports.try_recv().is_err(), "one session at a time");
        addresses.push(clients[0].local_addr().expect("connected").to_string());
        finish(clients.remove(0)).await;
    }
    let lines = proxy.lines_closed_by("finished", 10).await;
    assert_eq!(proxy.metric("statera_pool_queued_total{pool=\"web\"}"), Some(9.0));
    let waited = |client: &String| {
        let line = lines.iter().find(|line| line["client"] == *client).expect("each has a line");
        assert_eq!(line["retries"], 0, "{line}");
        line["queue_ms"].as_f64().expect("a number")
    };
    assert!(waited(&addresses[9]) > waited(&addresses[0]), "{lines:?}");
}

#[tokio::test]
async fn a_session_that_waits_for_too_long_is_refused_and_so_is_one_that_finds_the_queue_full() {
    let (backend, mut reports) = reporting_backend().await;
    let pool =
        format!("{}, max_connections: 1, queue: {{size: 1, timeout: 300ms}}", backends(&[backend.address]));
    let proxy = Proxy::web("", &pool);
    let mut held = named_client(&proxy, 0).await;
    assert_eq!(next_served(&mut reports).await, 0);
    let mut second = named_client(&proxy, 1).await;
    queue_becomes(&proxy, 1.0).await;
    client_is_refused(&proxy).await;

    let full = &proxy.lines_closed_by("queue_full", 1).await[0];
    assert_eq!(full["term"], "PQ", "{full}");
    assert!(full["backend"].is_null(), "{full}");
    let late = &proxy.lines_closed_by("queue_timeout", 1).await[0];
    assert_eq!(late["term"], "sQ", "{late}");
    assert!(late["queue_ms"].as_f64().expect("a number") >= 300.0, "{late}");
    soon("the session is reset", second.read(&mut [0])).await.expect_err("no clean end");
    assert_eq!((rejected(&proxy, "queue_full"), rejected(&proxy, "queue_timeout")), (1.0, 1.0));
    queue_becomes(&proxy, 0.0).await;
    held.write_all(&[3]).await.expect("it goes on");
    assert_eq!(next_served(&mut reports).await, 3);
}

#[tokio::test]
async fn without_a_queue_no_session_waits() {
    let (backend, mut reports) = reporting_backend().await;
    let proxy = Proxy::web("", &format!("{}, max_connections: 2", backends(&[backend.address])));
    let held = [named_client(&proxy, 0).await, named_client(&proxy, 0).await];
    assert_eq!([next_served(&mut reports).await, next_served(&mut reports).await], [0, 0]);
    client_is_refused(&proxy).await;
    assert_eq!(proxy.lines_closed_by("queue_full", 1).await.len(), 1);
    for client in held {
        finish(client).await;
    }
    proxy.lines_closed_by("finished", 2).await;
    let _next = named_client(&proxy, 7).await;
    assert_eq!(next_served(&mut reports).await, 7);
}

#[tokio::test]
async fn a_client_that_leaves_also_leaves_the_queue_and_one_that_only_ended_its_half_stays_in_it() {
    let (backend, mut reports) = reporting_backend().await;
    let pool = format!("{}, max_connections: 1, {PATIENT}", backends(&[backend.address]));
    let proxy = Proxy::web("", &pool);
    let held = named_client(&proxy, 0).await;
    assert_eq!(next_served(&mut reports).await, 0);

    let resets = named_client(&proxy, 1).await;
    queue_becomes(&proxy, 1.0).await;
    let address = proxy.address();
    let ends_its_half = tokio::spawn(async move { echo(address, &[2]).await });
    queue_becomes(&proxy, 2.0).await;
    let closes = TcpStream::connect(proxy.address()).await.expect("it listens");
    queue_becomes(&proxy, 3.0).await;
    let _last = named_client(&proxy, 4).await;
    queue_becomes(&proxy, 4.0).await;

    resets.set_zero_linger().expect("a socket");
    drop((resets, closes));
    queue_becomes(&proxy, 2.0).await;
    let left = proxy.lines_closed_by("queue_left", 2).await;
    assert!(left.iter().all(|line| line["term"] == "CQ"), "{left:?}");

    drop(held);
    assert_eq!(next_served(&mut reports).await, 2);
    assert_eq!(ends_its_half.await.expect("it ends").expect("an answer"), [2]);
    assert_eq!(next_served(&mut reports).await, 4);
    queue_becomes(&proxy, 0.0).await;
}

#[tokio::test]
async fn a_new_backend_serves_waiting_sessions_and_a_table_without_backends_refuses_them() {
    let redis = Redis::start().await;
    let ((one, mut at_one), (two, mut at_two)) = (reporting_backend().await, reporting_backend().await);
    redis.set_weights([(&one, 1.0)]).await;
    let pool = format!("weights_key: servers, max_connections: 3, {PATIENT}");
    let proxy = Proxy::web(&format!("redis: {{url: \"{}\"}}", redis.url()), &pool);
    let connections = backend_series("connections_total", one.address);
    let mut clients = Vec::new();
    for name in 0..8 {
        clients.push(named_client(&proxy, name).await);
        let begun =
            || async { proxy.metric(&connections).unwrap_or_default() >= f64::from(name + 1).min(3.0) };
        eventually("the session begins", begun).await;
        queue_becomes(&proxy, f64::from(name.saturating_sub(2))).await;
    }
    let mut served =
        [next_served(&mut at_one).await, next_served(&mut at_one).await, next_served(&mut at_one).await];
    served.sort_unstable();
    assert_eq!(served, [0, 1, 2]);
    redis.set_weights([(&one, 1.0), (&two, 1.0)]).await;
    let mut served =
        [next_served(&mut at_two).await, next_served(&mut at_two).await, next_served(&mut at_two).await];
    served.sort_unstable();
    assert_eq!(served, [3, 4, 5]);
    queue_becomes(&proxy, 2.0).await;

    redis.set_weights([(&one, 0.0), (&two, 0.0)]).await;
    queue_becomes(&proxy, 0.0).await;
    assert_eq!(proxy.lines_closed_by("no_backend", 2).await.len(), 2);
}

/// One backend refuses, and the other is full: a session that tried the first waits for the second, and
/// holds no slot meanwhile. The time in the queue does not count against the time for connecting.
#[tokio::test]
async fn a_session_that_waits_after_a_failure_holds_no_slot_and_loses_no_time_for_connecting() {
    const WAIT: Duration = Duration::from_millis(600);
    let (backend, mut reports) = reporting_backend().await;
    let (_guard, dead) = dead_address();
    let pool = format!(
        "{}, max_connections: 1, connect: {{timeout: 300ms, deadline: 300ms}}, outlier: off, {PATIENT}",
        backends(&[backend.address, dead])
    );
    let proxy = Proxy::web("", &pool);
    let series = backend_series("connect_failures_total", dead);
    let failures = || proxy.metric(&series).unwrap_or_default();
    let mut clients = Vec::new();
    for name in 0..5 {
        clients.push(named_client(&proxy, name).await);
        if name == 0 {
            assert_eq!(next_served(&mut reports).await, 0);
        }
        // A session that finds others waiting queues behind them, before it tries the dead backend and after
        // that.
        eventually("it has tried the dead backend", || async { failures() >= f64::from(name) }).await;
        queue_becomes(&proxy, f64::from(name)).await;
    }
    let first = clients[0].local_addr().expect("it is connected").to_string();
    let failures = failures();
    assert!(
        (4.0..=5.0).contains(&failures),
        "{failures}: each session but the first finds only the dead backend free"
    );
    sleep(WAIT).await;
    finish(clients.remove(0)).await;
    for name in 1..5 {
        assert_eq!(next_served(&mut reports).await, name);
        finish(clients.remove(0)).await;
    }
    let lines = proxy.lines_closed_by("finished", 5).await;
    // Two workers write the lines, so they may not be in the order in which the sessions ended.
    let waited: Vec<_> = lines.iter().filter(|line| line["client"] != first).collect();
    assert_eq!(waited.len(), 4, "{lines:?}");
    assert!(waited.iter().all(|line| line["retries"] == 1), "{lines:?}");
}
