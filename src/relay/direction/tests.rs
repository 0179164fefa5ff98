//! One direction between two sockets, in every state in which a socket returns EAGAIN or no pipe is free.
//!
//! Only these sockets wake the direction's task. So a direction that does not register for its next wake-up
//! hangs, and its test fails after [`PATIENCE`]. The behaviour of whole sessions is tested in
//! `tests/relay.rs`, `relay_bulk.rs`, `relay_cuts.rs` and `relay_random.rs`.

use std::future::poll_fn;
use std::time::Duration;

use socket2::{SockRef, Socket};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::reactor::beside_tokio;

const PATIENCE: Duration = Duration::from_secs(20);
const SMALL_BUFFER_BYTES: u32 = 4096;
/// Far more than socket buffers of that size hold.
const BULK_BYTES: usize = 600_000;

/// A direction between two sockets, and the worker's buffers.
struct Flow {
    source: Stream,
    direction: Direction,
    target: Stream,
    /// A second handle of the target, for its options.
    target_socket: Socket,
    buffers: Buffers,
    moved_bytes: usize,
}

/// A flow that splices from the first byte on, the socket that writes to it, and the one that reads from it.
async fn spliced() -> (Flow, TcpStream, TcpStream) {
    let (mut flow, writer, reader) = copied().await;
    flow.direction.path = Path::Splice;
    (flow, writer, reader)
}

async fn copied() -> (Flow, TcpStream, TcpStream) {
    let ((writer, source), (reader, target)) = (connection().await, connection().await);
    let target = target.into_std().expect("a socket");
    let target_socket = Socket::from(target.try_clone().expect("a descriptor"));
    let flow = Flow {
        source: watched(source),
        direction: Direction::default(),
        target: Stream::accepted(target.into()).expect("a reactor"),
        target_socket,
        buffers: Buffers::default(),
        moved_bytes: 0,
    };
    (flow, writer, reader)
}

fn watched(socket: TcpStream) -> Stream {
    Stream::accepted(socket.into_std().expect("a socket").into()).expect("a reactor")
}

/// Both ends of a connection. The buffers towards the first end are small, so that writes to it are often
/// refused.
async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let outer = TcpSocket::new_v4().expect("a descriptor");
    outer.set_recv_buffer_size(SMALL_BUFFER_BYTES).expect("tcp");
    let (outer, inner) =
        tokio::join!(outer.connect(listener.local_addr().expect("bound")), listener.accept());
    let (outer, (inner, _)) = (outer.expect("it listens"), inner.expect("a connection"));
    SockRef::from(&inner).set_send_buffer_size(SMALL_BUFFER_BYTES as usize).expect("tcp");
    outer.set_nodelay(true).expect("tcp");
    inner.set_nodelay(true).expect("tcp");
    (outer, inner)
}

/// The byte at `offset` of the stream.
fn byte(offset: usize) -> u8 {
    (offset % 251) as u8 ^ (offset >> 12) as u8
}

fn bytes(start: usize, end: usize) -> Vec<u8> {
    (start..end).map(byte).collect()
}

/// Reads up to `end` in a task: the first thousand bytes one at a time, then in large reads.
fn slowly_reads(mut reader: TcpStream, end: usize) -> tokio::task::JoinHandle<TcpStream> {
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        let mut offset = 0;
        while offset < end {
            let limit = if offset < 1_000 { 1 } else { buffer.len() };
            let count = reader.read(&mut buffer[..limit]).await.expect("connected");
            assert!(count > 0, "it ended after {offset} of {end} bytes");
            assert!(buffer[..count] == bytes(offset, offset + count), "between {offset} and +{count}");
            offset += count;
            if offset == 1_000 {
                // With the smallest buffer, each read would wait for a delayed acknowledgement.
                SockRef::from(&reader).set_recv_buffer_size(1 << 20).expect("tcp");
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(offset, end, "more came than was sent");
        reader
    })
}

impl Flow {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let moved = |bytes| self.moved_bytes += usize::try_from(bytes).expect("small");
        self.direction.poll_move(cx, &mut self.source, &mut self.target, &self.buffers, moved)
    }

    /// Polls the direction once, as after a spurious wake-up.
    async fn poll_once(&mut self) -> Poll<Result<(), Broken>> {
        poll_fn(|cx| Poll::Ready(self.poll(cx))).await
    }

    /// Polls the direction whenever it is woken, until `enough` is true or the direction is done.
    async fn moves_until(&mut self, what: &str, enough: impl Fn(&Self) -> bool) -> Poll<()> {
        let moves = poll_fn(|cx| match self.poll(cx) {
            Poll::Ready(Ok(())) => Poll::Ready(Poll::Ready(())),
            Poll::Ready(Err(broken)) => panic!("{broken:?} failed: {what}"),
            Poll::Pending if enough(self) => Poll::Ready(Poll::Pending),
            Poll::Pending => Poll::Pending,
        });
        timeout(PATIENCE, moves)
            .await
            .unwrap_or_else(|_| panic!("it was not woken: {what}; {} bytes have moved", self.moved_bytes))
    }

    /// Writes up to [`BULK_BYTES`] until the target refuses, so that bytes wait. Returns the number of bytes
    /// written.
    async fn stall(&mut self, writer: &TcpStream) -> usize {
        let (mut written, mut quiet_rounds) = (0, 0);
        while quiet_rounds < 20 {
            let before = (written, self.moved_bytes, self.piped_bytes());
            if let Ok(count) = writer.try_write(&bytes(written, BULK_BYTES)) {
                written += count;
            }
            assert!(self.poll_once().await.is_pending());
            assert!(self.moved_bytes < BULK_BYTES, "all of it is taken, though the reader does not read");
            let is_quiet = before == (written, self.moved_bytes, self.piped_bytes());
            quiet_rounds = if is_quiet && self.direction.holds_bytes() { quiet_rounds + 1 } else { 0 };
            // The runtime learns of readiness only between two polls.
            tokio::task::yield_now().await;
        }
        written
    }

    fn piped_bytes(&self) -> usize {
        if let Some(Waiting::Piped(pipe)) = self.direction.waiting.as_deref() { pipe.held_bytes } else { 0 }
    }

    fn takes_all_pipes(&self) -> Vec<Pipe> {
        std::iter::from_fn(|| self.buffers.pipes.take()).collect()
    }

    /// The number of pipes that could be taken now.
    fn free_pipes(&self) -> usize {
        let pipes = self.takes_all_pipes();
        let count = pipes.len();
        pipes.into_iter().for_each(|pipe| self.buffers.pipes.put_back(pipe));
        count
    }
}

#[tokio::test]
async fn an_empty_source_keeps_no_pipe_and_its_next_byte_wakes() {
    let _reactor = beside_tokio::install();
    let (mut flow, mut writer, reader) = spliced().await;
    let (pipes, mut offset) = (flow.free_pipes(), 0);
    for length in [1, 500, 1] {
        for _ in 0..10 {
            assert!(flow.poll_once().await.is_pending());
            assert!(!flow.direction.holds_bytes() && flow.free_pipes() == pipes, "it keeps a pipe");
        }
        let end = offset + length;
        let chunk = bytes(offset, end);
        let (moves, write) = tokio::join!(
            flow.moves_until("bytes have come", |flow| flow.moved_bytes == end),
            writer.write_all(&chunk),
        );
        assert!(moves.is_pending() && write.is_ok());
        offset = end;
    }
    // A fourth small move in a row would end the splicing.
    assert!(flow.direction.path == Path::Splice);
    slowly_reads(reader, offset).await.expect("every byte has come");
}

#[tokio::test]
async fn a_full_target_leaves_bytes_in_the_pipe_and_nothing_more_is_read() {
    let _reactor = beside_tokio::install();
    let (mut flow, writer, reader) = spliced().await;
    let written = flow.stall(&writer).await;
    let held = (flow.piped_bytes(), flow.moved_bytes);
    assert!(held.0 > 0, "it does not splice");
    for _ in 0..10 {
        assert!(flow.poll_once().await.is_pending());
        assert_eq!((flow.piped_bytes(), flow.moved_bytes), held);
    }
    let reads = slowly_reads(reader, written);
    let moves = flow.moves_until("the target takes bytes", |flow| flow.moved_bytes == written).await;
    assert!(moves.is_pending() && !flow.direction.holds_bytes());
    reads.await.expect("every byte has come");
}

#[tokio::test]
async fn a_parked_buffer_is_freed_once_the_target_has_taken_it() {
    let _reactor = beside_tokio::install();
    let (mut flow, writer, reader) = copied().await;
    // No pipe is left to splice through.
    let _pipes = flow.takes_all_pipes();
    let written = flow.stall(&writer).await;
    let Some(Waiting::Parked { bytes, start }) = flow.direction.waiting.as_deref() else {
        panic!("it does not copy")
    };
    assert!((1..=FIRST_READ_BYTES).contains(&bytes.len()) && *start < bytes.len());
    let reads = slowly_reads(reader, written);
    let moves = flow.moves_until("the target takes bytes", |flow| flow.moved_bytes == written).await;
    assert!(moves.is_pending() && flow.direction.waiting.is_none(), "it keeps the buffer");
    reads.await.expect("every byte has come");
}

/// The target is full and the source ends: with either path, the end is passed on after the bytes.
#[tokio::test]
async fn the_end_of_a_source_is_passed_on_after_the_waiting_bytes() {
    let _reactor = beside_tokio::install();
    for (mut flow, mut writer, reader) in [spliced().await, copied().await] {
        let written = flow.stall(&writer).await;
        writer.shutdown().await.expect("connected");
        for _ in 0..10 {
            assert!(flow.poll_once().await.is_pending(), "it ends although bytes wait");
        }
        let reads = slowly_reads(reader, written);
        assert!(flow.moves_until("the end has come", |_| false).await.is_ready());
        assert_eq!(flow.moved_bytes, written);
        assert!(flow.direction.is_done() && !flow.direction.holds_bytes());
        reads.await.expect("every byte has come");
    }
}

#[tokio::test]
async fn a_target_that_goes_away_while_a_pipe_holds_its_bytes_breaks_the_direction() {
    let _reactor = beside_tokio::install();
    let (mut flow, writer, reader) = spliced().await;
    flow.stall(&writer).await;
    reader.set_zero_linger().expect("tcp");
    drop(reader);
    let broken = timeout(PATIENCE, poll_fn(|cx| flow.poll(cx))).await.expect("the reset wakes it");
    assert!(matches!(broken, Err(Broken::Target(_))), "{broken:?}");
    flow.direction.abandon();
    // The pipe was not empty, so it was closed, and another may be opened.
    assert_eq!(flow.free_pipes(), Flow::free_pipes(&spliced().await.0));
}

#[tokio::test]
async fn a_source_that_is_reset_breaks_the_direction() {
    let _reactor = beside_tokio::install();
    let (mut flow, writer, _reader) = spliced().await;
    let pipes = flow.free_pipes();
    assert!(flow.poll_once().await.is_pending());
    writer.set_zero_linger().expect("tcp");
    drop(writer);
    let broken = timeout(PATIENCE, poll_fn(|cx| flow.poll(cx))).await.expect("the reset wakes it");
    assert!(matches!(broken, Err(Broken::Source(_))), "{broken:?}");
    assert_eq!(flow.free_pipes(), pipes, "it keeps a pipe");
}

#[tokio::test]
async fn without_a_pipe_bulk_is_peeked_and_with_one_it_is_spliced_again() {
    let _reactor = beside_tokio::install();
    let (mut flow, writer, reader) = spliced().await;
    let pipes = flow.takes_all_pipes();
    let written = flow.stall(&writer).await;
    assert!(flow.direction.path == Path::Peek && flow.piped_bytes() == 0);
    let reads = slowly_reads(reader, written);
    let moves = flow.moves_until("the target takes bytes", |flow| flow.moved_bytes == written).await;
    assert!(moves.is_pending());
    let reader = reads.await.expect("every byte has come");

    drop(pipes);
    assert!(flow.direction.path == Path::Peek, "nothing has arrived since");
    // With the smallest buffer the target takes too little at a time for bulk.
    flow.target_socket.set_send_buffer_size(1 << 20).expect("tcp");
    let write = tokio::spawn(async move {
        let mut writer = writer;
        writer.write_all(&vec![7; 8 << 20]).await.expect("connected");
        writer
    });
    let read = tokio::spawn(async move {
        let (mut reader, mut buffer) = (reader, vec![0; 1 << 20]);
        while reader.read(&mut buffer).await.expect("connected") > 0 {}
    });
    let moves = flow.moves_until("it splices", |flow| flow.direction.path == Path::Splice).await;
    assert!(moves.is_pending());
    write.abort();
    read.abort();
}

/// The urgent byte itself is not passed on, as in other proxies. A splice stops at it and returns EAGAIN, or
/// 0 if the source has ended.
#[tokio::test]
async fn no_byte_behind_an_urgent_one_is_lost_or_waits() {
    let _reactor = beside_tokio::install();
    for ended in [false, true] {
        let (mut flow, mut writer, reader) = spliced().await;
        writer.write_all(&bytes(0, 400)).await.expect("connected");
        SockRef::from(&writer).send_out_of_band(b"!").expect("tcp");
        writer.write_all(&bytes(400, 800)).await.expect("connected");
        if ended {
            writer.shutdown().await.expect("connected");
        }
        let moves = flow.moves_until("all bytes have come", |flow| !ended && flow.moved_bytes == 800).await;
        assert_eq!((moves.is_ready(), flow.moved_bytes), (ended, 800));
        slowly_reads(reader, 800).await.expect("every byte has come");
    }
}

/// A direction without bytes owns no buffer and no pipe, only a few words.
#[test]
fn a_direction_without_bytes_is_small() {
    assert!(size_of::<Direction>() <= 64, "{} bytes", size_of::<Direction>());
    assert!(!Direction::default().holds_bytes());
}
