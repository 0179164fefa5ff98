//! Bulk goes through pipes: these tests check how many pipes there are, what they hold, and that no byte is
//! lost.
//!
//! `relay::spliced` tests all other promises for sessions that splice, and `relay_cuts.rs` how they end.

use std::net::SocketAddr;
use std::sync::Arc;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket};

use crate::support::{Kind, Pair, Pattern, Peer, Program, eventually, pipe_ends, piped_bytes, seed, soon};

const MEGABYTE: u64 = 1024 * 1024;

/// A program with one worker. The scenario is its backend: returns the backend's listener, the program, and
/// its address.
async fn program_with_one_worker() -> (TcpListener, Program, SocketAddr) {
    let backend = TcpSocket::new_v4().expect("a descriptor");
    // A small receive buffer, so that stalled flows need little memory.
    backend.set_recv_buffer_size(65_536).expect("tcp");
    backend.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
    let backend = backend.listen(64).expect("it listens");
    let address = backend.local_addr().expect("bound");
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{address}\": 1}}}}}}"
    ));
    let entry = program.address().await;
    (backend, program, entry)
}

/// Opens a session. Returns its client and its backend.
async fn session(backend: &TcpListener, entry: SocketAddr) -> (Peer, Peer) {
    let client = Peer::connect(entry).await;
    let (stream, _) = soon("the backend gets the session", backend.accept()).await.expect("a connection");
    (client, Peer::Tcp(stream))
}

/// Checks that `bytes` bytes pass from the writer to the reader.
async fn passes(pattern: &Pattern, writer: &mut Peer, reader: &mut Peer, bytes: u64) {
    tokio::join!(pattern.send(writer, bytes), pattern.expect(reader, bytes));
}

#[tokio::test]
async fn more_bulk_flows_than_pipes_lose_nothing() {
    // Two workers have 32 pipes each.
    const FLOWS: u64 = 90;
    let pair = Pair::new(Kind::Tcp, "").await;
    let pattern = Arc::new(Pattern::new(seed()));
    let mut flows = tokio::task::JoinSet::new();
    for _ in 0..FLOWS {
        let (mut client, mut backend) = pair.session().await;
        let pattern = Arc::clone(&pattern);
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
async fn a_flow_that_changes_between_bulk_and_small_messages_loses_nothing() {
    let pair = Pair::new(Kind::Tcp, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let mut position = 0;
    for round in 0..20 {
        let bulk = if round % 2 == 0 { 3 * MEGABYTE } else { 100_000 };
        let end = position + bulk;
        let send = async {
            let mut sent = position;
            while sent < end {
                sent += soon("the writer makes progress", client.write(pattern.from(sent, end - sent)))
                    .await
                    .expect("connected") as u64;
            }
        };
        tokio::join!(send, pattern.expect_between(&mut backend, position, end));
        position = end;
        for _ in 0..20 {
            client.say(b"ping").await;
            backend.hears(b"ping").await;
            backend.say(b"pong").await;
            client.hears(b"pong").await;
        }
    }
}

#[tokio::test]
async fn sessions_that_are_reset_with_full_pipes_release_them() {
    let (backend, program, entry) = program_with_one_worker().await;
    let (without, pattern) = (pipe_ends(program.pid()), Pattern::new(seed()));
    // More sessions than there are pipes, each reset while its pipe holds what its backend does not read.
    for _ in 0..40 {
        let mut client = Peer::connect(entry).await;
        let (mut stream, _) =
            soon("the backend gets the session", backend.accept()).await.expect("a connection");
        client.stuff_a_pipe(&mut stream, &pattern, program.pid()).await;
        drop(stream);
        client.reset();
    }
    eventually("all sessions have ended", || async {
        program.lines().iter().filter(|line| line["close_reason"].is_string()).count() == 40
    })
    .await;
    // The pipes that are left are the empty ones that the worker keeps for the next flow.
    assert!(pipe_ends(program.pid()) <= without + 4, "{} pipe ends are left", pipe_ends(program.pid()));
    let mut client = Peer::connect(entry).await;
    let (mut stream, _) = soon("the backend gets the session", backend.accept()).await.expect("a connection");
    let send = async {
        pattern.send(&mut client, 16 * MEGABYTE).await;
        client.end().await;
    };
    tokio::join!(send, pattern.expect(&mut stream, 16 * MEGABYTE));
    assert!(pipe_ends(program.pid()) > without, "the flow is not spliced any more");
}

#[tokio::test]
async fn an_idle_session_that_moved_bulk_holds_no_pipe() {
    let (backend, program, entry) = program_with_one_worker().await;
    let without = pipe_ends(program.pid());
    let pattern = Pattern::new(seed());
    let mut idle = Vec::new();
    for _ in 0..50 {
        let mut client = Peer::connect(entry).await;
        let (mut stream, _) =
            soon("the backend gets the session", backend.accept()).await.expect("a connection");
        tokio::join!(pattern.send(&mut client, 4 * MEGABYTE), pattern.expect(&mut stream, 4 * MEGABYTE));
        idle.push((client, stream));
    }
    // The sessions used the same pipe one after the other.
    assert!(
        pipe_ends(program.pid()) <= without + 4,
        "{} pipe ends for 50 idle sessions",
        pipe_ends(program.pid())
    );
}

#[tokio::test]
async fn a_full_pipe_holds_what_it_can_and_gives_all_of_it_back_in_order() {
    let (backend, program, entry) = program_with_one_worker().await;
    let (mut client, mut stream) = session(&backend, entry).await;
    let pattern = Pattern::new(seed());
    client.say(pattern.from(0, 1)).await;
    pattern.expect(&mut stream, 1).await;
    let before = program.resident_kilobytes();
    // The pattern goes on after its first byte.
    let (read, sent) = client.stall_in_a_pipe(&mut stream, &pattern, 1, program.pid()).await;
    let held = piped_bytes(program.pid());
    assert!(held.len() == 1 && held[0] <= MEGABYTE, "{held:?} bytes wait in pipes");
    let grown = program.resident_kilobytes().saturating_sub(before);
    assert!(grown < 512, "{grown} kB for {sent} bytes that wait in the kernel");

    let end = sent + 8 * MEGABYTE;
    let write = async {
        pattern.send_between(&mut client, sent, end).await;
        client.end().await;
    };
    tokio::join!(write, pattern.expect_between(&mut stream, read, end));
    stream.hears_the_end().await;
    assert!(piped_bytes(program.pid()).is_empty());
}

/// Bulk that comes when every pipe holds bytes of another flow is copied. Those flows lose nothing either.
#[tokio::test]
async fn without_a_free_pipe_bulk_is_copied_until_there_is_one() {
    const PIPES: usize = 32;
    let (backend, program, entry) = program_with_one_worker().await;
    let without = pipe_ends(program.pid());
    let pattern = Arc::new(Pattern::new(seed()));
    let mut stalled = Vec::new();
    // In rounds, since a flow whose sender happens to be slow just before it stalls is not bulk and holds no
    // pipe.
    for _ in 0..5 {
        let mut stalling = tokio::task::JoinSet::new();
        for _ in 0..PIPES / 2 + 8 {
            let (mut client, stream) = session(&backend, entry).await;
            let pattern = Arc::clone(&pattern);
            stalling.spawn(async move {
                let sent = client.stuff(&pattern, 16 * MEGABYTE).await;
                (client, stream, sent)
            });
        }
        stalled.extend(stalling.join_all().await);
        if piped_bytes(program.pid()).len() == PIPES && stalled.len() > PIPES {
            break;
        }
    }
    assert_eq!(piped_bytes(program.pid()).len(), PIPES);

    for _ in 0..10 {
        let (mut client, mut stream) = session(&backend, entry).await;
        passes(&pattern, &mut client, &mut stream, 4 * MEGABYTE).await;
        assert_eq!(piped_bytes(program.pid()).len(), PIPES);
        assert_eq!(pipe_ends(program.pid()) - without, 2 * PIPES, "it has more pipes than its limit");
    }
    for (client, stream, sent) in &mut stalled {
        client.end().await;
        pattern.expect(stream, *sent).await;
        stream.hears_the_end().await;
    }
    assert!(piped_bytes(program.pid()).is_empty());
    let (mut client, mut stream) = session(&backend, entry).await;
    // This returns only when the flow is spliced.
    client.stall_in_a_pipe(&mut stream, &pattern, 0, program.pid()).await;
}

#[tokio::test]
async fn without_a_descriptor_for_a_pipe_bulk_is_copied_until_there_is_one() {
    let (backend, program, entry) = program_with_one_worker().await;
    let (mut client, mut stream) = session(&backend, entry).await;
    let (without, pattern) = (pipe_ends(program.pid()), Pattern::new(seed()));
    let pid = Pid::from_raw(program.pid().try_into().expect("a pid"));
    // Open descriptors stay open, and no more can be opened.
    let usual = getrlimit(Resource::Nofile);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), ..usual }).expect("it runs");
    passes(&pattern, &mut client, &mut stream, 16 * MEGABYTE).await;
    let sent = client.stuff(&pattern, 16 * MEGABYTE).await;
    assert_eq!(pipe_ends(program.pid()), without);

    prlimit(pid, Resource::Nofile, usual).expect("it runs");
    pattern.expect(&mut stream, sent).await;
    passes(&pattern, &mut client, &mut stream, 16 * MEGABYTE).await;
    assert!(pipe_ends(program.pid()) > without, "the flow is not spliced");
}
