//! Idle timeouts of slow readers: a reader that takes bytes slowly is active, whichever buffers the bytes
//! come from, and a reader that takes none is idle, however many bytes wait for it.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{MissedTickBehavior, interval};

use crate::support::{Kind, Pair, Pattern, Peer, eventually, seed, soon};

/// Longer than the time in which a slow reader on the loopback takes a step of 95 kB, and shorter than the
/// ten seconds for which the kernel's send buffers can feed it.
const IDLE_TIMEOUT: &str = "idle_timeout: 3s, half_close_timeout: 3s";
/// Several times the timeout.
const READS_FOR: Duration = Duration::from_secs(13);
const PACE: Duration = Duration::from_millis(50);

/// Reads `bytes_a_second` for [`READS_FOR`], while `writer` writes as fast as it can.
async fn reads_slowly(mut writer: Peer, mut reader: Peer, bytes_a_second: u64) -> (Peer, Peer) {
    let pattern = Pattern::new(seed());
    let total = bytes_a_second * READS_FOR.as_secs();
    let writes = async {
        pattern.send(&mut writer, u64::MAX).await;
    };
    let reads = async {
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let step = bytes_a_second * PACE.as_millis() as u64 / 1000;
        let mut position = 0;
        while position < total {
            pace.tick().await;
            pattern.expect_between(&mut reader, position, position + step).await;
            position += step;
        }
    };
    tokio::select! {
        () = writes => unreachable!("it has no end"),
        () = reads => {}
    }
    (writer, reader)
}

/// Runs two sessions for each rate, one for each direction, all at once.
async fn slow_readers_are_kept(kind: Kind, rates: &[u64]) {
    let pair = Pair::new(kind, IDLE_TIMEOUT).await;
    let mut sessions = Vec::new();
    for rate in rates {
        let (client, backend) = pair.session().await;
        sessions.push(tokio::spawn(reads_slowly(backend, client, *rate)));
        let (client, backend) = pair.session().await;
        sessions.push(tokio::spawn(reads_slowly(client, backend, *rate)));
    }
    for session in sessions {
        session.await.expect("a slow reader is served");
    }
}

#[tokio::test]
async fn a_reader_that_takes_bytes_slowly_is_not_idle() {
    slow_readers_are_kept(Kind::Tcp, &[100_000, 400_000]).await;
}

#[tokio::test]
async fn a_reader_that_takes_spliced_bytes_slowly_is_not_idle() {
    slow_readers_are_kept(Kind::Spliced, &[100_000, 400_000]).await;
}

/// The kernel reports a unix socket as writable only when three quarters of its 208 KiB are free, but it
/// accepts bytes as soon as an earlier write of up to 64 KiB was read whole.
#[tokio::test]
async fn a_reader_behind_a_unix_socket_that_takes_bytes_slowly_is_not_idle() {
    slow_readers_are_kept(Kind::Unix, &[40_000, 100_000]).await;
}

#[tokio::test]
async fn a_reader_that_takes_the_answer_slowly_after_a_half_close_is_not_idle() {
    let pair = Pair::new(Kind::Tcp, "idle_timeout: 1h, half_close_timeout: 3s").await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"question").await;
    client.end().await;
    backend.hears(b"question").await;
    backend.hears_the_end().await;
    reads_slowly(backend, client, 100_000).await;
}

/// The whole answer fits into the kernel's buffers, so no bytes wait in the proxy.
#[tokio::test]
async fn a_session_whose_last_bytes_are_taken_slowly_is_not_idle() {
    const ANSWER_BYTES: u64 = 1_500_000;
    let pair = Pair::new(Kind::Tcp, IDLE_TIMEOUT).await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    pattern.send(&mut backend, ANSWER_BYTES).await;
    let mut pace = interval(PACE);
    for step in 0..ANSWER_BYTES / 6_000 {
        pace.tick().await;
        pattern.expect_between(&mut client, step * 6_000, (step + 1) * 6_000).await;
    }
    // Twelve seconds later the session still works in both directions.
    client.say(b"next").await;
    backend.hears(b"next").await;
    backend.say(b"answer").await;
    client.hears(b"answer").await;
}

async fn is_ended_as_idle(kind: Kind) {
    let pair = Pair::new(kind, "idle_timeout: 2s").await;
    let (_client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    // Writes more than all buffers hold, so that the write ends only when the session is cut.
    let write = async { while backend.write_all(pattern.from(0, u64::MAX)).await.is_ok() {} };
    soon("a session whose reader takes nothing is cut", write).await;
    assert_eq!(pair.line().await["close_reason"], "idle_timeout");
}

#[tokio::test]
async fn a_reader_whose_window_is_closed_is_idle() {
    is_ended_as_idle(Kind::Tcp).await;
}

#[tokio::test]
async fn a_reader_of_spliced_bytes_whose_window_is_closed_is_idle() {
    is_ended_as_idle(Kind::Spliced).await;
}

#[tokio::test]
async fn a_reader_behind_a_unix_socket_that_takes_nothing_is_idle() {
    let pair = Pair::new(Kind::Unix, "idle_timeout: 2s").await;
    let (mut client, _backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let write = async { while client.write_all(pattern.from(0, u64::MAX)).await.is_ok() {} };
    soon("a session whose reader takes nothing is cut", write).await;
    assert_eq!(pair.line().await["close_reason"], "idle_timeout");
}

#[tokio::test]
async fn a_slow_reader_that_stops_is_idle() {
    let pair = Pair::new(Kind::Tcp, "idle_timeout: 2s").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    let write =
        tokio::spawn(async move { while backend.write_all(pattern.from(0, u64::MAX)).await.is_ok() {} });
    let mut pace = interval(PACE);
    for _ in 0..100 {
        pace.tick().await;
        let mut step = [0; 10_000];
        soon("bytes arrive", client.read_exact(&mut step)).await.expect("it is active");
    }
    assert!(pair.proxy.access_lines().is_empty(), "it was active");
    eventually("it is ended", || async { !pair.proxy.access_lines().is_empty() }).await;
    soon("the writer fails", write).await.expect("no panic");
    assert_eq!(pair.line().await["close_reason"], "idle_timeout");
}
