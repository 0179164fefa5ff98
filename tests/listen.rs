//! Listeners accept on every kind of address, by all workers, and also after descriptors were exhausted.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::time::{sleep, timeout};

use crate::support::{Backend, Peer, Program, Proxy, echo, eventually, output, require};

#[tokio::test]
async fn ipv4_and_ipv6_addresses_of_one_listener_all_serve() {
    let backend = Backend::echo_at("[::1]:0".parse().expect("an address")).await;
    let proxy = Proxy::start(&format!(
        "listeners: {{web: {{bind: [\"127.0.0.1:0\", \"[::1]:0\", \"127.0.0.2:0\"], pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}}}}}",
        backend.address
    ));
    let addresses = proxy.running.addresses[0].1.clone();
    assert_eq!(addresses.len(), 3);
    for address in &addresses {
        assert_eq!(echo(*address, b"ping").await.expect("an answer"), b"ping", "{address}");
    }
    eventually("three sessions are logged", || async { proxy.access_lines().len() == 3 }).await;
    let lines = proxy.access_lines();
    assert!(
        lines.iter().all(|line| line["listener"] == "web" && line["backend"] == backend.address.to_string())
    );
    let clients: Vec<_> = lines.iter().map(|line| line["client"].as_str().expect("a text")).collect();
    assert_eq!(clients.iter().filter(|client| client.starts_with("[::1]:")).count(), 1);
}

#[tokio::test]
async fn both_workers_get_sessions_of_every_listener() {
    let backend = Backend::echo().await;
    let proxy = Proxy::start(&format!(
        "workers: 2\n\
         listeners: {{a: {{bind: \"127.0.0.1:0\", pool: web}}, b: {{bind: \"[::1]:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}}}}}",
        backend.address
    ));
    for (name, addresses) in &proxy.running.addresses {
        for _ in 0..100 {
            assert_eq!(echo(addresses[0], b"ping").await.expect("an answer"), b"ping");
        }
        let listeners = proxy.running.observed.listeners();
        let listener = listeners.iter().find(|listener| listener.name == *name);
        let of_workers: Vec<_> =
            listener.expect("it is observed").counters.iter().map(|c| c.connections.get()).collect();
        assert_eq!((of_workers.len(), of_workers.iter().sum()), (2, 100));
        // With an even chance a worker gets fewer than 20 of 100 once in a billion runs.
        assert!(of_workers.iter().all(|count| *count >= 20), "{name}: {of_workers:?}");
    }
}

/// By the kernel's hash alone two sessions would be on one worker in every second run, and six or more of
/// eight in 29 runs of 100.
#[tokio::test]
async fn few_long_sessions_are_shared_evenly() {
    let backend = Backend::echo().await;
    // A worker may have half as many sessions more than the least loaded one.
    for (workers, few, at_most) in [(2, 2, 1), (2, 8, 5), (4, 4, 1), (4, 8, 2), (8, 8, 1)] {
        for _ in 0..10 {
            let proxy = Proxy::start(&format!(
                "workers: {workers}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
                 pools: {{web: {{backends: {{\"{}\": 1}}}}}}",
                backend.address
            ));
            let mut clients = Vec::new();
            for _ in 0..few {
                let mut client = Peer::connect(proxy.running.addresses[0].1[0]).await;
                client.say(b"ping").await;
                client.hears(b"ping").await;
                clients.push(client);
            }
            let listeners = proxy.running.observed.listeners();
            let counters = listeners[0].counters.iter();
            let of_workers: Vec<_> = counters.map(|listener| listener.connections.get()).collect();
            assert_eq!(of_workers.iter().sum::<u64>(), few, "no connection is lost or counted twice");
            assert!(of_workers.iter().all(|of_one| *of_one <= at_most), "{of_workers:?} of {workers}");
        }
    }
}

#[tokio::test]
async fn tcp_congestion_is_used_towards_clients_and_towards_backends() {
    let backend = Backend::echo().await;
    let system = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").expect("Linux");
    assert_ne!(
        system.trim(),
        "reno",
        "every kernel has reno; this scenario needs a system that uses another one"
    );
    for (listener, pool, expected) in [("reno", "system", (true, false)), ("system", "reno", (false, true))] {
        let key = |name| if name == "system" { String::new() } else { format!(", tcp_congestion: {name}") };
        let proxy = Proxy::start(&format!(
            "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web{}}}}}\n\
             pools: {{web: {{backends: {{\"{}\": 1}}{}}}}}",
            key(listener),
            backend.address,
            key(pool)
        ));
        let mut client = Peer::connect(proxy.address()).await;
        client.say(b"ping").await;
        client.hears(b"ping").await;
        // The two sockets of the proxy: from its listener's port, and to the backend's port.
        let uses_reno = async |filter: String| {
            let mut ss = Command::new(require("ss", "iproute2"));
            ss.args(["-tinHO", "state", "established", &filter]);
            let sockets = String::from_utf8(output(ss).await.stdout).expect("text");
            assert_eq!(sockets.lines().count(), 1, "{filter}: {sockets}");
            sockets.contains(" reno ")
        };
        let towards_client = uses_reno(format!("sport = :{}", proxy.address().port())).await;
        let towards_backend = uses_reno(format!("dport = :{}", backend.address.port())).await;
        assert_eq!((towards_client, towards_backend), expected, "listener: {listener}, pool: {pool}");
    }
}

async fn echoing_program(backend: &Backend, deadline: &str) -> Program {
    let program = Program::run(&format!(
        "workers: 2\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}, connect: {{deadline: {deadline}}}}}}}",
        backend.address
    ));
    program.address().await;
    program
}

#[tokio::test]
async fn without_descriptors_clients_wait_and_the_workers_use_little_cpu() {
    const HELD: usize = 30;
    const WAITING: usize = 20;
    let backend = Backend::echo().await;
    let program = echoing_program(&backend, "20s").await;
    let address = program.address().await;
    let mut held = Vec::new();
    for _ in 0..HELD {
        let mut client = Peer::connect(address).await;
        client.say(b"ping").await;
        client.hears(b"ping").await;
        held.push(client);
    }
    program.leave_descriptors(0);
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        let mut client = Peer::connect(address).await;
        client.say(b"ping").await;
        waiting.push(client);
    }
    let warnings = || {
        let lines = program.lines();
        lines.iter().filter(|l| l["message"].as_str().is_some_and(|m| m.starts_with("cannot accept"))).count()
    };
    eventually("the program logs that it cannot accept", || async { warnings() > 0 }).await;

    let before = program.cpu_time();
    sleep(Duration::from_secs(2)).await;
    let used = program.cpu_time() - before;
    assert!(used < Duration::from_millis(500), "{used:?} of CPU time in 2 s of waiting");
    // Sessions that have descriptors go on.
    for client in &mut held {
        client.say(b"pong").await;
        client.hears(b"pong").await;
    }
    for client in &mut waiting {
        let early = timeout(Duration::from_millis(1), client.read_u8()).await;
        assert!(early.is_err(), "{early:?} while there is no descriptor");
    }
    drop(held);
    // A client accepted on the last descriptor waits until another one is free: no client is refused.
    for client in &mut waiting {
        client.hears(b"ping").await;
    }
    drop(waiting);
    program.says("accepting again").await;
    // One line for each worker that found clients waiting.
    assert!((1..=2).contains(&warnings()), "{}", program.log());
    eventually("new sessions are served", || async {
        echo(address, b"ping").await.is_ok_and(|a| a == b"ping")
    })
    .await;
}

#[tokio::test]
async fn a_lack_of_descriptors_that_comes_and_goes_does_not_flood_the_log() {
    let backend = Backend::echo().await;
    let program = echoing_program(&backend, "100ms").await;
    let address = program.address().await;
    assert_eq!(echo(address, b"ping").await.expect("an answer"), b"ping");
    let is_session = |line: &serde_json::Value| line["close_reason"].is_string();
    eventually("the first session is over", || async { program.lines().iter().any(is_session) }).await;
    // Enough to accept a client, not enough to connect to a backend for it.
    program.leave_descriptors(1);
    for _ in 0..10 {
        // The stopped program finds all clients at once when it goes on, and the first takes the last
        // descriptor.
        program.signal(Signal::STOP);
        eventually("the program is stopped", || async { program.is_stopped() }).await;
        let mut clients = Vec::new();
        for _ in 0..5 {
            clients.push(Peer::connect(address).await);
        }
        program.signal(Signal::CONT);
        for mut client in clients {
            let (answer, end) = client.rest().await;
            assert!(answer.is_empty() && end.is_err());
        }
    }
    let lines = program.lines();
    let is = |line: &serde_json::Value, begin| line["message"].as_str().is_some_and(|m| m.starts_with(begin));
    let cannot_accept = lines.iter().filter(|line| is(line, "cannot accept")).count();
    let cannot_connect = lines.iter().filter(|line| is(line, "nothing left on this machine")).count();
    // Each worker may log each of the two once in ten seconds, and once that it accepts again.
    assert!(cannot_connect >= 1, "{}", program.log());
    assert!(cannot_accept <= 6 && cannot_connect <= 6, "{}", program.log());
    assert!(lines.iter().filter(|line| is(line, "accepting again")).count() <= 6, "{}", program.log());

    program.leave_descriptors(1_000);
    assert_eq!(echo(address, b"ping").await.expect("an answer"), b"ping");
}
