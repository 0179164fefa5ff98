//! Clients that leave before they have a backend: their sessions end at once, and use no backend from then
//! on. Clients that only ended their half of the connection are served.

use std::net::SocketAddr;

use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{
    Backend, Link, Passing, Program, Proxy, Redis, echo, eventually, greeting, silent_address, soon,
};

/// Timeouts longer than any test waits: a session that ends earlier has ended because its client left.
const PATIENT: &str = "connect: {timeout: 5m, deadline: 10m, attempts: 3}";
/// The weight of the backend that is tried first: one session in a billion picks the other one first.
const FIRST: &str = "1e9";
const BANNER: &str = "220 ready";

/// A backend that sends a banner first, and then sends back the bytes it gets.
async fn backend_that_speaks_first() -> Backend {
    Backend::start(|mut stream| async move {
        let (mut reader, mut writer) = stream.split();
        // A scenario may reset the client, which fails the write or the copy.
        if writer.write_all(BANNER.as_bytes()).await.is_ok() {
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        }
    })
    .await
}

async fn connected(address: SocketAddr) -> TcpStream {
    soon("a connection", TcpStream::connect(address)).await.expect("it listens")
}

fn reset(client: TcpStream) {
    client.set_zero_linger().expect("a socket");
}

async fn connect_and_reset(address: SocketAddr) {
    reset(connected(address).await);
}

fn reason_is(line: &Value, reason: &str) -> bool {
    line["close_reason"] == reason
}

/// Waits for the lines of `count` sessions whose client left while they had no backend. There must not be
/// more.
async fn left(count: usize, lines: impl Fn() -> Vec<Value>) -> Vec<Value> {
    let left =
        || -> Vec<Value> { lines().into_iter().filter(|line| reason_is(line, "connect_left")).collect() };
    eventually(&format!("{count} clients have left"), || async { left().len() >= count }).await;
    let left = left();
    assert_eq!(left.len(), count, "{left:?}");
    assert!(left.iter().all(|line| line["term"] == "CC"), "{left:?}");
    left
}

fn program(backend: &Backend, more: &str) -> Program {
    Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}, {PATIENT}{more}}}}}",
        backend.address
    ))
}

/// Stops the program while `clients` connect, so that it finds all of them in its accept queue at once.
async fn all_at_once(program: &Program, clients: impl Future<Output = ()>) {
    program.signal(Signal::STOP);
    eventually("the program is stopped", || async { program.is_stopped() }).await;
    clients.await;
    program.signal(Signal::CONT);
}

#[tokio::test]
async fn clients_that_are_reset_while_their_backend_does_not_answer_try_no_other() {
    const CLIENTS: usize = 40;
    let ((_guard, silent), other) = (silent_address().await, Backend::echo().await);
    let pool = format!("backends: {{\"{silent}\": {FIRST}, \"{}\": 1}}, {PATIENT}", other.address);
    let proxy = Proxy::web("", &pool);
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let mut client = connected(proxy.address()).await;
        // Bytes that a client has sent must not keep its session alive.
        if number % 2 == 0 {
            client.write_all(b"request").await.expect("room");
        }
        clients.push(client);
    }
    eventually("all have a backend", || async { proxy.picks("configured") == CLIENTS as f64 }).await;
    clients.into_iter().for_each(reset);

    let lines = left(CLIENTS, || proxy.access_lines()).await;
    for line in lines {
        assert_eq!((&line["backend"], &line["retries"]), (&silent.to_string().into(), &0.into()), "{line}");
    }
    let metric = |name: &str, labels: &str| proxy.metric(&format!("{name}{{{labels}}}"));
    assert_eq!(metric("statera_sessions_closed_total", "reason=\"connect_left\""), Some(CLIENTS as f64));
    let of_silent = format!("pool=\"web\",backend=\"{silent}\"");
    assert_eq!(metric("statera_backend_connect_failures_total", &of_silent), Some(0.0));
    assert_eq!((other.accepted(), proxy.picks("configured")), (0, CLIENTS as f64));
}

#[tokio::test]
async fn a_client_that_is_reset_while_its_backend_does_not_answer_gives_its_slot_to_the_next() {
    let (_guard, silent) = silent_address().await;
    let proxy = Proxy::web(
        "",
        &format!(
            "backends: {{\"{silent}\": 1}}, {PATIENT}, max_connections: 5, queue: {{size: 10, timeout: 10m}}"
        ),
    );
    let mut first = Vec::new();
    for _ in 0..5 {
        first.push(connected(proxy.address()).await);
    }
    eventually("they have the slots", || async { proxy.picks("configured") == 5.0 }).await;
    let mut second = Vec::new();
    for _ in 0..5 {
        second.push(connected(proxy.address()).await);
    }
    let waiting = || proxy.metric("statera_pool_queue{pool=\"web\"}");
    eventually("the others wait", || async { waiting() == Some(5.0) }).await;
    first.into_iter().for_each(reset);
    eventually("the others have the slots", || async { proxy.picks("configured") == 10.0 }).await;
    assert_eq!(waiting(), Some(0.0));
    left(5, || proxy.access_lines()).await;
}

#[tokio::test]
async fn a_client_that_is_reset_while_redis_picks_costs_no_backend_a_connection() {
    let (backend, redis) = (Backend::named("web").await, Redis::start().await);
    redis.set_weights([(&backend, 1.0)]).await;
    let link = Link::to(redis.port);
    let hasty = "heartbeat_interval: 100ms, max_stale: 300ms, poll_interval: 100ms, response_timeout: 20s";
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\", {hasty}}}\nlua_pick: {{timeout: 1m}}", link.url()),
        &format!("weights_key: servers, {PATIENT}"),
    );
    eventually("the table arrives", || async { !proxy.weights().is_empty() }).await;
    link.pass(Passing::AllButTheWatch);
    eventually("the snapshot is stale and redis picks", || async {
        greeting(proxy.address()).await.expect("no session fails");
        proxy.picks("lua") > 0.0
    })
    .await;
    link.pass(Passing::Nothing);
    let accepted = backend.accepted();
    let opened =
        || proxy.metric("statera_listener_connections_total{listener=\"web\"}").expect("it is counted");
    let before = opened();
    let client = connected(proxy.address()).await;
    eventually("the session has begun", || async { opened() > before }).await;
    reset(client);
    let line = left(1, || proxy.access_lines()).await.remove(0);
    assert_eq!((&line["backend"], backend.accepted()), (&Value::Null, accepted), "{line}");
}

#[tokio::test]
async fn a_client_that_is_reset_while_its_session_waits_for_a_descriptor_ends_it() {
    let backend = Backend::echo().await;
    let program = program(&backend, "");
    let address = program.address().await;
    assert_eq!(echo(address, b"ping").await.expect("an answer"), b"ping");
    let finished = |line: &Value| reason_is(line, "finished");
    eventually("that session is over", || async { program.lines().iter().any(finished) }).await;
    // Enough to accept a client, not enough to connect to a backend for it.
    program.leave_descriptors(1);
    let open = program.descriptors().len();
    let client = connected(address).await;
    eventually("it is accepted", || async { program.descriptors().len() > open }).await;
    reset(client);
    left(1, || program.lines()).await;
    eventually("its descriptor is free", || async { program.descriptors().len() == open }).await;
    assert_eq!(backend.accepted(), 1);
    program.leave_descriptors(100);
    assert_eq!(echo(address, b"ping").await.expect("an answer"), b"ping");
}

#[tokio::test]
async fn clients_that_were_reset_before_they_are_accepted_cost_no_pick_and_no_backend_a_connection() {
    const CLIENTS: usize = 100;
    let backend = Backend::echo().await;
    let program = program(&backend, "");
    let address = program.address().await;
    all_at_once(&program, async {
        for number in 0..CLIENTS {
            let mut client = connected(address).await;
            if number % 2 == 0 {
                client.write_all(b"request").await.expect("room");
            }
            reset(client);
        }
    })
    .await;
    let lines = left(CLIENTS, || program.lines()).await;
    assert!(lines.iter().all(|line| line["backend"].is_null()), "{lines:?}");
    assert_eq!(backend.accepted(), 0);
    assert_eq!(echo(address, b"ping").await.expect("an answer"), b"ping");
}

/// The backend speaks first. Some clients only wait for its banner, and some end their half without a byte.
#[tokio::test]
async fn in_a_flood_of_resets_all_other_clients_are_served_and_only_they_reach_the_backend() {
    const EACH: usize = 20;
    let backend = backend_that_speaks_first().await;
    let program = program(&backend, "");
    let address = program.address().await;
    let mut answers = JoinSet::new();
    all_at_once(&program, async {
        for _ in 0..EACH {
            for _ in 0..10 {
                connect_and_reset(address).await;
            }
            let (mut asks, mut ends, mut listens) =
                (connected(address).await, connected(address).await, connected(address).await);
            asks.write_all(b" hello").await.expect("room");
            asks.shutdown().await.expect("a socket");
            ends.shutdown().await.expect("a socket");
            for (mut client, expected) in [(asks, format!("{BANNER} hello")), (ends, BANNER.to_owned())] {
                answers.spawn(async move {
                    let mut answer = String::new();
                    client.read_to_string(&mut answer).await.expect("a clean end");
                    assert_eq!(answer, expected);
                });
            }
            answers.spawn(async move {
                let mut answer = [0; BANNER.len()];
                listens.read_exact(&mut answer).await.expect("a banner");
                assert_eq!(answer, BANNER.as_bytes());
            });
        }
    })
    .await;
    soon("all are served", answers.join_all()).await;
    left(10 * EACH, || program.lines()).await;
    assert_eq!(backend.accepted(), 3 * EACH as u64);
}

/// The session goes on to the second backend: an ended half does not mean that the client has left.
#[tokio::test]
async fn a_client_that_only_ended_its_half_is_served_by_the_next_backend_that_answers() {
    let ((_guard, silent), other) = (silent_address().await, backend_that_speaks_first().await);
    let pool = format!(
        "backends: {{\"{silent}\": {FIRST}, \"{}\": 1}}, connect: {{timeout: 300ms, deadline: 20s}}, \
         outlier: off",
        other.address
    );
    let proxy = Proxy::web("", &pool);
    for request in ["", " hello"] {
        let answer = echo(proxy.address(), request.as_bytes()).await.expect("a clean end");
        assert_eq!(String::from_utf8(answer).expect("text"), format!("{BANNER}{request}"));
    }
    let served = || proxy.access_lines().into_iter().filter(|line| line["retries"] == 1).count();
    eventually("both sessions tried the silent backend first", || async { served() == 2 }).await;
}
