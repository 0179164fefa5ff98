//! Shutdown: which sessions are still served, which are cut, and what the log says.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::support::{Backend, PATIENCE, Peer, Program, eventually, get, soon};

/// Starts the program in front of one backend. `top` are lines at the top level of its config.
fn program(backend: SocketAddr, top: &str) -> Program {
    Program::run(&format!(
        "workers: 2\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{backend}\": 1}}}}}}\n{top}\n"
    ))
}

/// How many sessions were cut, by the last log line.
fn cut(program: &Program) -> u64 {
    let stopped = program.messages("stopped");
    assert_eq!(stopped.len(), 1, "{}", program.log());
    stopped[0]["cut"].as_u64().expect("a number")
}

fn close_reasons(program: &Program) -> Vec<String> {
    let lines = program.lines();
    lines.iter().filter_map(|line| Some(line["close_reason"].as_str()?.to_owned())).collect()
}

/// Opens a session and returns its client, once the first bytes came back.
async fn session(address: SocketAddr) -> Peer {
    let mut client = Peer::connect(address).await;
    client.say(b"ping").await;
    client.hears(b"ping").await;
    client
}

/// Connects again and again until the port is closed. Every connection that was made must be served.
async fn hammer(address: SocketAddr, served: Arc<AtomicU64>, over: Arc<AtomicBool>) {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let Ok(connected) = tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await else { return };
        let Ok(stream) = connected else {
            assert!(over.load(Relaxed), "refused before the signal");
            return;
        };
        let mut client = Peer::Tcp(stream);
        client.say(b"question").await;
        client.end().await;
        let (answer, end) = client.rest().await;
        assert!(end.is_ok() && answer == b"question", "{end:?} after {} bytes", answer.len());
        served.fetch_add(1, Relaxed);
    }
    panic!("it accepts for ever");
}

#[tokio::test]
async fn every_connection_that_was_made_before_the_port_closed_is_served() {
    let backend = Backend::echo().await;
    // Each round sends the signal at another moment of a session.
    for signal in [Signal::TERM, Signal::INT, Signal::TERM, Signal::INT, Signal::TERM] {
        let mut program = program(backend.address, "");
        let address = program.address().await;
        let (served, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let clients: Vec<_> =
            (0..16).map(|_| tokio::spawn(hammer(address, Arc::clone(&served), Arc::clone(&over)))).collect();
        eventually("all are busy", || async { served.load(Relaxed) >= 300 }).await;
        over.store(true, Relaxed);
        program.signal(signal);
        for client in clients {
            soon("the client is done", client).await.expect("no client lost a connection");
        }
        let status = program.wait();
        assert!(status.success(), "{status}\n{}", program.log());
        assert_eq!(cut(&program), 0);
        let reasons = close_reasons(&program);
        assert!(reasons.iter().all(|reason| reason == "finished"));
        assert_eq!(reasons.len() as u64, served.load(Relaxed), "one line for each session");
    }
}

#[tokio::test]
async fn during_the_delay_it_is_not_ready_but_live_and_still_accepts() {
    let backend = Backend::echo().await;
    let admin = "admin: {bind: \"127.0.0.1:0\"}\nshutdown: {delay: 1h}";
    let mut program = program(backend.address, admin);
    let address = program.address().await;
    let admin = program.says("admin server listening").await;
    let admin: SocketAddr = admin["address"].as_str().expect("a text").parse().expect("an address");
    let status = async |path| get(admin, path).await.expect("an answer").status;
    assert_eq!((status("/readyz").await, status("/livez").await), (200, 200));

    program.signal(Signal::TERM);
    program.says("leaving").await;
    assert_eq!((status("/readyz").await, status("/livez").await), (503, 200));
    let mut client = session(address).await;
    // The delay is an hour; the second signal ends it, and the session with it.
    program.signal(Signal::INT);
    client.hears_a_reset().await;
    assert!(program.wait().success());
    assert_eq!(cut(&program), 1);
}

#[tokio::test]
async fn admin_requests_are_answered_during_the_drain() {
    let backend = Backend::echo().await;
    let mut program = program(backend.address, "admin: {bind: \"127.0.0.1:0\"}\nshutdown: {timeout: 1h}");
    let mut client = session(program.address().await).await;
    let admin = program.says("admin server listening").await;
    let admin: SocketAddr = admin["address"].as_str().expect("a text").parse().expect("an address");
    program.signal(Signal::TERM);
    program.says("draining").await;
    assert_eq!(get(admin, "/readyz").await.expect("an answer").status, 503);
    assert_eq!(get(admin, "/livez").await.expect("an answer").status, 200);
    let metrics = get(admin, "/metrics").await.expect("an answer").body;
    assert!(metrics.contains("statera_listener_connections_active{listener=\"web\"} 1"), "{metrics}");
    client.end().await;
    client.hears_the_end().await;
    assert!(program.wait().success());
}

#[tokio::test]
async fn a_long_session_finishes_during_the_drain_and_no_new_one_begins() {
    let backend = Backend::echo().await;
    let mut program = program(backend.address, "shutdown: {timeout: 1h}");
    let address = program.address().await;
    let mut client = session(address).await;
    program.signal(Signal::TERM);
    program.says("draining").await;
    eventually("the port is closed", || async { TcpStream::connect(address).await.is_err() }).await;
    for _ in 0..10 {
        client.say(b"pong").await;
        client.hears(b"pong").await;
    }
    client.end().await;
    client.hears_the_end().await;
    assert!(program.wait().success());
    assert_eq!(cut(&program), 0);
    assert_eq!(close_reasons(&program).last().expect("a line"), "finished");
}

#[tokio::test]
async fn a_program_without_sessions_ends_at_once() {
    let backend = Backend::echo().await;
    let mut program = program(backend.address, "shutdown: {timeout: 1h}");
    program.address().await;
    program.signal(Signal::TERM);
    assert!(program.wait().success());
    assert_eq!(cut(&program), 0);
}

#[tokio::test]
async fn sessions_that_outlast_the_timeout_are_reset_counted_and_logged() {
    let (sender, mut backends) = tokio::sync::mpsc::unbounded_channel();
    let backend = Backend::start(move |stream| {
        let sender = sender.clone();
        async move {
            let mut peer = Peer::Tcp(stream);
            peer.hears(b"hold on").await;
            peer.say(b"yes").await;
            let _ = sender.send(peer);
        }
    })
    .await;
    let mut program = program(backend.address, "shutdown: {timeout: 300ms}");
    let address = program.address().await;
    let mut both_sides = Vec::new();
    for _ in 0..7 {
        let mut client = Peer::connect(address).await;
        client.say(b"hold on").await;
        client.hears(b"yes").await;
        both_sides.push(client);
        both_sides.push(soon("the backend's side", backends.recv()).await.expect("a session"));
    }
    program.signal(Signal::TERM);
    for mut side in both_sides {
        side.hears_a_reset().await;
    }
    assert!(program.wait().success());
    assert_eq!(cut(&program), 7);
    assert_eq!(close_reasons(&program), ["shutdown"; 7]);
    let lines = program.lines();
    let line = lines.iter().find(|line| line["close_reason"] == "shutdown").expect("there are seven");
    assert_eq!((&line["term"], &line["bytes_in"], &line["bytes_out"]), (&"KD".into(), &7.into(), &3.into()));
}

#[tokio::test]
async fn a_second_signal_cuts_all_sessions_at_once() {
    let backend = Backend::echo().await;
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::TERM)] {
        let mut program = program(backend.address, "shutdown: {timeout: 1h}");
        let address = program.address().await;
        let (mut one, mut two) = (session(address).await, session(address).await);
        program.signal(first);
        program.says("draining").await;
        program.signal(second);
        one.hears_a_reset().await;
        two.hears_a_reset().await;
        assert!(program.wait().success());
        assert_eq!(cut(&program), 2);
        assert_eq!(program.messages("second signal").len(), 1);
        assert_eq!(close_reasons(&program), ["shutdown"; 2]);
    }
}
