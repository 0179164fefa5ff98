//! Random sessions: both sides write and read in pieces of any size, pause, change the direction, half-close
//! or reset, many sessions at a time. No byte may be lost, doubled or out of order, and each side must see
//! the right end.
//!
//! STATERA_SEED replays the same operations, but not their timing. STATERA_LONG=1 runs for ten minutes.

use std::time::Duration;

use fastrand::Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep};

use crate::support::{Kind, Pair, Pattern, Peer, seed, soon};

/// How many sessions run at once. They share the buffers and pipes of the workers.
const AT_ONCE: u64 = 8;

/// One side of a session, with the number of bytes it has sent and read.
struct Side {
    reader: ReadHalf<Peer>,
    writer: WriteHalf<Peer>,
    sends: Pattern,
    hears: Pattern,
    sent_bytes: u64,
    heard_bytes: u64,
    random: Rng,
}

/// The bytes that pass before both sides wait for each other.
#[derive(Clone, Copy, Debug)]
struct Phase {
    to_backend_bytes: u64,
    to_client_bytes: u64,
}

impl Phase {
    fn any(random: &mut Rng) -> Self {
        let mut amount = || match random.u8(..8) {
            0..3 => 0,
            3..5 => random.u64(1..1_000),
            5..7 => random.u64(1_000..300_000),
            _ => random.u64(300_000..6_000_000),
        };
        Self { to_backend_bytes: amount(), to_client_bytes: amount() }
    }
}

impl Side {
    fn new(peer: Peer, sends: Pattern, hears: Pattern, random: Rng) -> Self {
        let (reader, writer) = tokio::io::split(peer);
        Self { reader, writer, sends, hears, sent_bytes: 0, heard_bytes: 0, random }
    }

    /// Sends and reads so many more bytes at the same time.
    async fn plays(&mut self, send_bytes: u64, hear_bytes: u64) {
        let (mut write_random, mut read_random) = (self.random.fork(), self.random.fork());
        let write = async {
            let end = self.sent_bytes + send_bytes;
            while self.sent_bytes < end {
                let piece = piece_bytes(&mut write_random).min(end - self.sent_bytes);
                let write = self.writer.write(self.sends.from(self.sent_bytes, piece));
                self.sent_bytes += soon("the writer makes progress", write).await.expect("connected") as u64;
                maybe_pauses(&mut write_random).await;
            }
        };
        let read = async {
            let end = self.heard_bytes + hear_bytes;
            let mut buffer = vec![0; 300_000];
            while self.heard_bytes < end {
                let piece = piece_bytes(&mut read_random).min(end - self.heard_bytes) as usize;
                let read = self.reader.read(&mut buffer[..piece]);
                let count = soon("bytes arrive", read).await.expect("connected");
                let position = self.heard_bytes;
                assert!(count > 0, "the stream ended after {position} of {end} bytes");
                assert!(
                    is_pattern(&self.hears, position, &buffer[..count]),
                    "wrong bytes at {position} +{count}"
                );
                self.heard_bytes += count as u64;
                maybe_pauses(&mut read_random).await;
            }
        };
        tokio::join!(write, read);
    }

    async fn ends(&mut self) {
        self.writer.shutdown().await.expect("connected");
    }

    async fn hears_the_end(&mut self) {
        let read = soon("the end", self.reader.read(&mut [0])).await;
        assert_eq!(read.expect("a clean end"), 0, "more came than was sent");
    }

    /// Reads the bytes that still come, which must be those that were sent. Then the connection must end by
    /// an error.
    async fn hears_that_it_was_cut(&mut self) {
        let mut buffer = vec![0; 65_536];
        loop {
            match soon("the other side is gone", self.reader.read(&mut buffer)).await {
                Ok(0) => panic!("a clean end after {} bytes of a session that was reset", self.heard_bytes),
                Ok(count) => {
                    assert!(is_pattern(&self.hears, self.heard_bytes, &buffer[..count]));
                    self.heard_bytes += count as u64;
                }
                Err(_) => return,
            }
        }
    }

    fn resets(self) {
        self.reader.unsplit(self.writer).reset();
    }
}

/// A random size of a write or a read: sometimes one byte, sometimes more than any buffer holds.
fn piece_bytes(random: &mut Rng) -> u64 {
    match random.u8(..10) {
        0 => 1,
        1..4 => random.u64(1..2_000),
        4..7 => random.u64(2_000..65_537),
        _ => random.u64(65_537..260_000),
    }
}

/// Pauses at random, in most cases not at all.
async fn maybe_pauses(random: &mut Rng) {
    match random.u8(..40) {
        0 => sleep(Duration::from_micros(random.u64(..3_000))).await,
        1..8 => tokio::task::yield_now().await,
        _ => {}
    }
}

fn is_pattern(pattern: &Pattern, position: u64, bytes: &[u8]) -> bool {
    let mut compared = 0;
    while compared < bytes.len() {
        let expected = pattern.from(position + compared as u64, (bytes.len() - compared) as u64);
        if bytes[compared..compared + expected.len()] != *expected {
            return false;
        }
        compared += expected.len();
    }
    true
}

/// Runs one random session to its end.
async fn session(kind: Kind, client: Peer, backend: Peer, seed: u64) {
    let mut random = Rng::with_seed(seed);
    if kind == Kind::Tcp && random.bool() {
        // Small buffers: the proxy cannot write more often, and after odd numbers of bytes.
        client.shrink_buffers();
        backend.shrink_buffers();
    }
    let pattern = |direction: u64| Pattern::new(seed ^ direction);
    let mut client = Side::new(client, pattern(1), pattern(2), random.fork());
    let mut backend = Side::new(backend, pattern(2), pattern(1), random.fork());
    for _ in 0..random.u8(1..8) {
        let Phase { to_backend_bytes, to_client_bytes } = Phase::any(&mut random);
        tokio::join!(
            client.plays(to_backend_bytes, to_client_bytes),
            backend.plays(to_client_bytes, to_backend_bytes),
        );
    }
    let last = random.u64(1..2_000_000);
    match random.u8(..6) {
        0..2 => {
            client.ends().await;
            backend.hears_the_end().await;
            tokio::join!(backend.plays(last, 0), client.plays(0, last));
            backend.ends().await;
            client.hears_the_end().await;
        }
        2..4 => {
            // The end comes directly after the bytes.
            let answer = async {
                backend.plays(last, 0).await;
                backend.ends().await;
            };
            tokio::join!(answer, client.plays(0, last));
            client.hears_the_end().await;
            tokio::join!(client.plays(last, 0), backend.plays(0, last));
            client.ends().await;
            backend.hears_the_end().await;
        }
        // Both sides end at once.
        4 => {
            tokio::try_join!(client.writer.shutdown(), backend.writer.shutdown()).expect("connected");
            tokio::join!(client.hears_the_end(), backend.hears_the_end());
        }
        // The client resets in the middle of its bytes. A unix socket cannot be reset.
        _ if kind == Kind::Unix => {}
        _ => {
            let read = random.u64(..=last);
            tokio::join!(client.plays(last.min(10_000), 0), backend.plays(0, read.min(10_000)));
            client.resets();
            backend.hears_that_it_was_cut().await;
        }
    }
}

/// Runs random sessions with that kind of backend for some time, each with its own seed.
async fn random_sessions(kind: Kind) {
    let long = std::env::var_os("STATERA_LONG").is_some();
    let deadline = Instant::now() + Duration::from_secs(if long { 200 } else { 2 });
    let pair = Pair::new(kind, "").await;
    let mut seeds = Rng::with_seed(seed());
    while Instant::now() < deadline {
        let mut sessions = tokio::task::JoinSet::new();
        for _ in 0..AT_ONCE {
            let (client, backend) = pair.session().await;
            sessions.spawn(session(kind, client, backend, seeds.u64(..)));
        }
        while let Some(ended) = sessions.join_next().await {
            ended.expect("each session behaves as it should");
        }
    }
}

#[tokio::test]
async fn random_sessions_that_begin_by_copying_lose_nothing() {
    random_sessions(Kind::Tcp).await;
}

#[tokio::test]
async fn random_sessions_that_begin_by_splicing_lose_nothing() {
    random_sessions(Kind::Spliced).await;
}

#[tokio::test]
async fn random_sessions_with_a_unix_socket_lose_nothing() {
    random_sessions(Kind::Unix).await;
}
