//! Sessions that end, or that shutdown ends, while their bytes wait in a pipe.

use std::io::ErrorKind;

use rustix::process::Signal;
use socket2::SockRef;
use tokio::net::TcpListener;

use crate::support::{Kind, Pair, Pattern, Peer, Program, eventually, piped_bytes, seed, soon};

const MEGABYTE: u64 = 1024 * 1024;

/// More bytes than the kernel buffers of one direction take.
const TOO_MUCH: u64 = 96 * MEGABYTE;

/// [`Peer::stall_in_a_pipe`] for the proxy in this process.
async fn stalls(writer: &mut Peer, reader: &mut Peer, pattern: &Pattern) -> (u64, u64) {
    writer.stall_in_a_pipe(reader, pattern, 0, std::process::id()).await
}

/// Waits until the pipe with the bytes is closed, or is empty and free again.
async fn no_pipe_holds_bytes() {
    eventually("no pipe holds bytes", || async { piped_bytes(std::process::id()).is_empty() }).await;
}

/// Checks that the bytes of the pattern from `position` on come, and then a reset. Returns the position
/// that they reached.
async fn hears_a_part(peer: &mut Peer, pattern: &Pattern, mut position: u64) -> u64 {
    let (bytes, end) = peer.rest().await;
    assert_eq!(end.expect_err("no clean end").kind(), ErrorKind::ConnectionReset);
    for chunk in bytes.chunks(65_536) {
        assert!(chunk == pattern.from(position, chunk.len() as u64), "wrong bytes at {position}");
        position += chunk.len() as u64;
    }
    position
}

/// The proxy does not read from this client, because its bytes wait for a backend that takes none. It must
/// notice the reset nevertheless.
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

/// Shutdown cuts this session while its bytes are in a pipe. Neither side may get a clean end, since it is
/// not complete.
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

/// A program with an open session: returns its client and its backend too.
async fn program_with_a_session(top: &str) -> (Program, Peer, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{address}\": 1}}}}}}\n{top}\n"
    ));
    let client = Peer::connect(program.address().await).await;
    let (backend, _) = soon("the backend gets the session", listener.accept()).await.expect("a connection");
    (program, client, Peer::Tcp(backend))
}

/// A byte sent as urgent (`MSG_OOB`) is not in the stream, and the proxy does not pass it on, as HAProxy
/// does not. No byte of the stream may be lost for it or wait until more bytes come. A splice stops before
/// the urgent byte and returns EAGAIN there, as it does without bytes. A read stops there too, and its short
/// count looks as if there were no more bytes.
#[tokio::test]
async fn no_byte_before_or_after_an_urgent_one_is_lost_or_waits() {
    for kind in [Kind::Tcp, Kind::Unix, Kind::Spliced] {
        let pair = Pair::new(kind, "").await;
        for bytes in [1, 300, 20_000, 3 * MEGABYTE] {
            let (mut client, mut backend) = pair.session().await;
            let pattern = Pattern::new(seed());
            let send = async {
                pattern.send_between(&mut client, 0, bytes).await;
                send_urgent(&client);
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

/// An urgent byte just before the end must not stay unread: with it the close would reset the client instead
/// of ending cleanly.
#[tokio::test]
async fn an_urgent_byte_before_the_end_does_not_turn_it_into_a_reset() {
    for kind in [Kind::Tcp, Kind::Unix, Kind::Spliced] {
        let pair = Pair::new(kind, "").await;
        for bytes in [1, 300, 40_000, 3 * MEGABYTE] {
            let (mut client, mut backend) = pair.session().await;
            let pattern = Pattern::new(seed());
            let send = async {
                pattern.send_between(&mut client, 0, bytes).await;
                send_urgent(&client);
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

/// Sends an urgent byte.
fn send_urgent(peer: &Peer) {
    let Peer::Tcp(stream) = peer else { panic!("a unix socket knows no urgent byte here") };
    assert_eq!(SockRef::from(stream).send_out_of_band(b"!").expect("connected"), 1);
}
