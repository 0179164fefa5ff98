//! Sessions that end, or are told to hurry, while their bytes wait in a pipe.

use std::io::ErrorKind;

use rustix::process::Signal;
use socket2::SockRef;
use tokio::net::TcpListener;

use crate::support::{Kind, Pair, Pattern, Peer, Program, eventually, piped_bytes, seed, soon};

const MEGABYTE: u64 = 1024 * 1024;

/// More than the kernel takes of one direction.
const TOO_MUCH: u64 = 96 * MEGABYTE;

/// See [`Peer::stall_in_a_pipe`]: one of the proxy in this process.
async fn stalls(writer: &mut Peer, reader: &mut Peer, pattern: &Pattern) -> (u64, u64) {
    writer.stall_in_a_pipe(reader, pattern, 0, std::process::id()).await
}

/// The pipe with its bytes is closed, or empty in the pool.
async fn no_pipe_holds_bytes() {
    eventually("no pipe holds bytes", || async { piped_bytes(std::process::id()).is_empty() }).await;
}

/// What comes is the pattern from `place` on, then a reset. Returns how far it came.
async fn hears_a_part(peer: &mut Peer, pattern: &Pattern, mut place: u64) -> u64 {
    let (bytes, end) = peer.rest().await;
    assert_eq!(end.expect_err("no clean end").kind(), ErrorKind::ConnectionReset);
    for chunk in bytes.chunks(65_536) {
        assert!(chunk == pattern.from(place, chunk.len() as u64), "wrong bytes at {place}");
        place += chunk.len() as u64;
    }
    place
}

/// The reset of a client that nobody reads, because its bytes wait for a backend that does not take them.
#[tokio::test]
async fn a_stalled_session_notices_that_its_source_is_gone() {
    for kind in [Kind::Tcp, Kind::Unix] {
        let pair = Pair::new(kind, "idle_timeout: 1h, half_close_timeout: 1s").await;
        let (mut client, backend) = pair.session().await;
        client.stuff(&Pattern::new(seed()), TOO_MUCH).await;
        client.reset();
        assert_eq!(pair.line().await["close_reason"], "client_reset", "{kind:?}");
        no_pipe_holds_bytes().await;
        drop(backend);
    }
}

#[tokio::test]
async fn a_backend_that_resets_while_its_bytes_are_in_a_pipe_resets_the_client() {
    let pair = Pair::new(Kind::Tcp, "half_close_timeout: 1s").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let (read, sent) = stalls(&mut backend, &mut client, &pattern).await;
    backend.reset();
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
    no_pipe_holds_bytes().await;
    assert!(hears_a_part(&mut client, &pattern, read).await <= sent);
}

#[tokio::test]
async fn a_backend_that_resets_while_a_pipe_holds_bytes_for_it_resets_the_client() {
    let pair = Pair::new(Kind::Tcp, "").await;
    let (mut client, mut backend) = pair.session().await;
    backend.say(b"an answer").await;
    stalls(&mut client, &mut backend, &Pattern::new(seed())).await;
    backend.reset();
    client.hears(b"an answer").await;
    client.hears_a_reset().await;
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
    no_pipe_holds_bytes().await;
}

#[tokio::test]
async fn an_end_behind_a_full_pipe_comes_after_its_bytes() {
    let pair = Pair::new(Kind::Tcp, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let (read, sent) = stalls(&mut client, &mut backend, &pattern).await;
    client.end().await;
    pattern.expect_between(&mut backend, read, sent).await;
    backend.hears_the_end().await;
    backend.say_and_end(b"an answer").await;
    client.hears(b"an answer").await;
    client.hears_the_end().await;
    assert_eq!(pair.line().await["close_reason"], "finished");
}

#[tokio::test]
async fn an_end_passes_while_the_other_direction_is_stuck_in_a_pipe() {
    let pair = Pair::new(Kind::Tcp, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let (read, sent) = stalls(&mut client, &mut backend, &pattern).await;
    backend.end().await;
    client.hears_the_end().await;
    client.end().await;
    pattern.expect_between(&mut backend, read, sent).await;
    backend.hears_the_end().await;
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["bytes_in"]), (&"finished".into(), &sent.into()));
}

/// No side may take a session for complete that shutdown cut while its bytes were in a pipe.
#[tokio::test]
async fn shutdown_resets_both_sides_of_a_session_whose_bytes_are_in_a_pipe() {
    let (mut program, mut client, mut backend) = program_with_a_session("shutdown: {timeout: 300ms}").await;
    let pattern = Pattern::new(seed());
    let (read, _) = client.stall_in_a_pipe(&mut backend, &pattern, 0, program.pid()).await;
    program.signal(Signal::TERM);
    client.hears_a_reset().await;
    hears_a_part(&mut backend, &pattern, read).await;
    program.wait();
    let lines = program.lines();
    assert!(lines.iter().any(|line| line["close_reason"] == "shutdown"), "{}", program.log());
}

#[tokio::test]
async fn a_session_whose_bytes_are_in_a_pipe_may_finish_during_shutdown() {
    let (mut program, mut client, mut backend) = program_with_a_session("shutdown: {timeout: 30s}").await;
    let pattern = Pattern::new(seed());
    let (read, sent) = client.stall_in_a_pipe(&mut backend, &pattern, 0, program.pid()).await;
    program.signal(Signal::TERM);
    program.says("draining").await;
    client.end().await;
    pattern.expect_between(&mut backend, read, sent).await;
    backend.hears_the_end().await;
    backend.end().await;
    client.hears_the_end().await;
    assert!(program.wait().success());
}

async fn program_with_a_session(top: &str) -> (Program, Peer, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{address}\": 1}}}}}}\n{top}\n"
    ));
    let client = Peer::connect(program.address().await).await;
    let (backend, _) = soon("the backend gets it", listener.accept()).await.expect("a connection");
    (program, client, Peer::Tcp(backend))
}

/// A byte that is sent as urgent (`MSG_OOB`) stands beside the stream, not in it: like in HAProxy, nobody passes it on. But
/// no byte of the stream is lost for it, and none waits for something to come behind it: a splice gets no further than to it,
/// and says there what it says where there is nothing; a read stops at it too, and is taken for the last one.
#[tokio::test]
async fn no_byte_on_either_side_of_an_urgent_one_is_lost_or_waits() {
    for kind in [Kind::Tcp, Kind::Unix, Kind::Spliced] {
        let pair = Pair::new(kind, "").await;
        for bytes in [1, 300, 20_000, 3 * MEGABYTE] {
            let (mut client, mut backend) = pair.session().await;
            let pattern = Pattern::new(seed());
            let send = async {
                pattern.send_between(&mut client, 0, bytes).await;
                urgent(&client);
                pattern.send_between(&mut client, bytes, 2 * bytes).await;
            };
            tokio::join!(send, pattern.expect(&mut backend, 2 * bytes));
            client.say(b"and more").await;
            backend.hears(b"and more").await;
            client.end().await;
            backend.hears_the_end().await;
        }
    }
}

/// The urgent byte is the last thing before the end: it must not stay unread, or closing would reset the client instead of
/// ending cleanly.
#[tokio::test]
async fn an_urgent_byte_before_the_end_makes_no_reset_of_it() {
    for kind in [Kind::Tcp, Kind::Unix, Kind::Spliced] {
        let pair = Pair::new(kind, "").await;
        for bytes in [1, 300, 40_000, 3 * MEGABYTE] {
            let (mut client, mut backend) = pair.session().await;
            let pattern = Pattern::new(seed());
            let send = async {
                pattern.send_between(&mut client, 0, bytes).await;
                urgent(&client);
            };
            tokio::join!(send, pattern.expect(&mut backend, bytes));
            client.end().await;
            backend.hears_the_end().await;
            backend.say_and_end(b"an answer").await;
            client.hears(b"an answer").await;
            client.hears_the_end().await;
        }
    }
}

fn urgent(peer: &Peer) {
    let Peer::Tcp(stream) = peer else { panic!("a unix socket knows no urgent byte here") };
    assert_eq!(SockRef::from(stream).send_out_of_band(b"!").expect("connected"), 1);
}
