//! Bulk goes through pipes: the same promises as in `relay.rs`, where pages are moved instead of copied.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::support::{Kind, Pair, Pattern, Peer, Program, eventually, seed, soon};

const MEGABYTE: u64 = 1024 * 1024;

/// Pipes that the program has open, counted by their ends.
fn pipe_ends(program: &Program) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", program.pid())).expect("it runs");
    entries
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("pipe:"))
        .count()
}

/// Sends until nobody takes any more, at most `most` bytes.
async fn stuff(writer: &mut Peer, most: u64) {
    let chunk = vec![7; 256 * 1024];
    for _ in 0..most / chunk.len() as u64 {
        if timeout(Duration::from_millis(300), writer.write_all(&chunk)).await.is_err() {
            return;
        }
    }
}

/// The program in front of a backend that the scenario plays itself, and where its clients connect.
async fn program_with_one_worker() -> (TcpListener, Program, SocketAddr) {
    let backend = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = backend.local_addr().expect("bound");
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{backends: {{\"{address}\": 1}}}}}}"
    ));
    let entry = program.listens().await[0];
    (backend, program, entry)
}

#[tokio::test]
async fn more_bulk_flows_than_pipes_lose_nothing() {
    // Two workers have 32 pipes each.
    const FLOWS: u64 = 90;
    let pair = Pair::new(Kind::Tcp, "").await;
    let pattern = std::sync::Arc::new(Pattern::new(seed()));
    let mut flows = tokio::task::JoinSet::new();
    for _ in 0..FLOWS {
        let (mut client, mut backend) = pair.session().await;
        let pattern = std::sync::Arc::clone(&pattern);
        flows.spawn(async move {
            let send = async {
                pattern.send(&mut client, 4 * MEGABYTE).await;
                client.end().await;
            };
            tokio::join!(send, pattern.expect(&mut backend, 4 * MEGABYTE));
        });
    }
    while let Some(flow) = flows.join_next().await {
        flow.expect("no byte is lost or out of order");
    }
}

#[tokio::test]
async fn a_flow_that_changes_between_bulk_and_talk_and_back_loses_nothing() {
    let pair = Pair::new(Kind::Tcp, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let mut place = 0;
    for round in 0..20 {
        let bulk = if round % 2 == 0 { 3 * MEGABYTE } else { 100_000 };
        let end = place + bulk;
        let send = async {
            let mut sent = place;
            while sent < end {
                sent += soon("it gets on", client.write(pattern.from(sent, end - sent)))
                    .await
                    .expect("connected") as u64;
            }
        };
        tokio::join!(send, pattern.expect_between(&mut backend, place, end));
        place = end;
        for _ in 0..20 {
            client.say(b"ping").await;
            backend.hears(b"ping").await;
            backend.say(b"pong").await;
            client.hears(b"pong").await;
        }
    }
}

#[tokio::test]
async fn sessions_that_die_with_full_pipes_give_them_up() {
    let (backend, program, entry) = program_with_one_worker().await;
    let without = pipe_ends(&program);
    // More sessions than there are pipes, each reset while its pipe holds what its backend does not read.
    for round in 0..40 {
        let mut client = Peer::connect(entry).await;
        let (stream, _) = soon("the backend gets it", backend.accept()).await.expect("a connection");
        stuff(&mut client, 64 * MEGABYTE).await;
        if round == 0 {
            assert!(pipe_ends(&program) > without, "the flow is not spliced");
        }
        drop(stream);
        client.reset();
    }
    eventually("all sessions have ended", || async {
        program.lines().iter().filter(|line| line["close_reason"].is_string()).count() == 40
    })
    .await;
    // What is left are the worker's empty ones, ready for the next.
    assert!(pipe_ends(&program) <= without + 4, "{} pipe ends are left", pipe_ends(&program));
    let mut client = Peer::connect(entry).await;
    let (mut stream, _) = soon("the backend gets it", backend.accept()).await.expect("a connection");
    let pattern = Pattern::new(seed());
    let send = async {
        pattern.send(&mut client, 16 * MEGABYTE).await;
        client.end().await;
    };
    tokio::join!(send, pattern.expect(&mut stream, 16 * MEGABYTE));
    assert!(pipe_ends(&program) > without, "the flow is not spliced any more");
}

#[tokio::test]
async fn an_idle_session_that_moved_bulk_holds_no_pipe_for_itself() {
    let (backend, program, entry) = program_with_one_worker().await;
    let without = pipe_ends(&program);
    let pattern = Pattern::new(seed());
    let mut idle = Vec::new();
    for _ in 0..50 {
        let mut client = Peer::connect(entry).await;
        let (mut stream, _) = soon("the backend gets it", backend.accept()).await.expect("a connection");
        tokio::join!(pattern.send(&mut client, 4 * MEGABYTE), pattern.expect(&mut stream, 4 * MEGABYTE));
        idle.push((client, stream));
    }
    // One after the other they used the same pipe.
    assert!(pipe_ends(&program) <= without + 4, "{} pipe ends for 50 idle sessions", pipe_ends(&program));
}

/// The reset of a client that nobody reads, because its bytes wait for a backend that does not take them.
#[tokio::test]
async fn a_stalled_session_notices_that_its_source_is_gone() {
    for kind in [Kind::Tcp, Kind::Unix] {
        let pair = Pair::new(kind, "idle_timeout: 1h, half_close_timeout: 1s").await;
        let (mut client, backend) = pair.session().await;
        stuff(&mut client, 64 * MEGABYTE).await;
        client.reset();
        assert_eq!(pair.line().await["close_reason"], "client_reset", "{kind:?}");
        drop(backend);
    }
}
