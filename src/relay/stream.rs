//! One side of a session: a TCP or unix stream socket that is reset when it is dropped, unless it was
//! finished.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Socket, TcpKeepalive};
use tokio::time::Instant;

use super::opening::Opening;
use super::pipe::Pipe;
use super::sock_diag::SockDiag;
use super::socket::StreamSocket;
use super::wire::Wire;
use crate::reactor::sleep;

/// The longest pause between two checks whether written bytes were acknowledged.
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The time between two checks whether the peer has vanished, while a stream waits for acknowledgements.
const LOSS_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// A connected or connecting socket.
///
/// If a TCP stream is dropped before [`Stream::finish`], it sends a reset instead of a FIN. So the peer
/// never takes a session that was cut (a timeout with bytes waiting, shutdown, a reset of the other side)
/// for a complete one.
#[derive(Debug)]
pub struct Stream {
    socket: StreamSocket,
    finished: bool,
    opening: Opening,
}

impl Stream {
    /// Watches a connection that was accepted. It has inherited TCP_NODELAY from the listening socket.
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    pub fn accepted(socket: Socket) -> io::Result<Self> {
        Ok(Self { socket: StreamSocket::tcp(socket)?, finished: false, opening: Opening::Over })
    }

    /// The stream of a connection to a backend, whose connect may be under way.
    #[must_use]
    pub fn opened(socket: StreamSocket, opening: Opening) -> Self {
        Self { socket, finished: false, opening }
    }

    #[cfg(test)]
    pub(super) fn opening(&self) -> Opening {
        self.opening
    }

    /// Completes a held handshake if it was held long enough. Call it when there was nothing to write.
    pub(super) fn poll_opening(&mut self, cx: &mut Context<'_>) {
        self.opening.release_if_late(self.socket.socket(), cx);
    }

    /// Waits for the end of a connect.
    ///
    /// # Errors
    /// Why the connect failed.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn connected(&self) -> io::Result<()> {
        self.socket.connected().await
    }

    /// The local address of a TCP connection.
    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.socket.socket().local_addr().ok()?.as_socket()
    }

    /// Ready once an event has reported that the peer sent bytes or ended. Makes no system call.
    pub fn poll_input(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_input(cx)
    }

    /// True if an event has reported that the connection was reset or broke. Makes no system call.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.socket.is_known_broken()
    }

    /// Ready once an event has reported that the connection was reset or broke. Makes no system call.
    pub fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_broken(cx)
    }

    /// Ready once the peer has left: the connection is broken, or the peer has ended its half without
    /// sending a byte. A peer that ended its half after a request may wait for the answer. To be called
    /// before anything is read.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_left(cx)
    }

    /// Reads into `buffer`. 0 is the end.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_read(cx, buffer)
    }

    /// Writes what the socket takes of `bytes`.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // Splicing begins after large writes, so `opening` has seen the first write here.
        self.opening.before_write(self.socket.socket(), bytes.len());
        self.socket.poll_write(cx, bytes)
    }

    /// True if [`Stream::poll_peek`] can be used.
    pub(super) fn can_peek(&self) -> bool {
        self.socket.is_tcp()
    }

    /// Reads into `buffer` and leaves the bytes in the socket. 0: only a plain read tells what there is.
    pub(super) fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_peek(cx, buffer)
    }

    /// Removes `peeked.len()` peeked bytes from the socket; the buffer may be overwritten. `is_all`: the
    /// peek saw all that there was.
    pub(super) fn discard(&self, peeked: &mut [u8], is_all: bool) -> io::Result<()> {
        self.socket.discard(peeked, is_all)
    }

    /// Ready when the socket takes bytes again.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_writable(cx)
    }

    /// True if a TCP connection was reset or broke, even if bytes are still to be read; always false for a
    /// unix socket. Makes a system call.
    pub(super) fn is_broken(&self) -> bool {
        let mut watched = [PollFd::new(&self.socket, PollFlags::empty())];
        self.socket.is_tcp()
            && poll(&mut watched, Some(&Timespec::default())).is_ok()
            && watched[0].revents().contains(PollFlags::ERR)
    }

    /// The error that broke the connection, if no call has returned it yet.
    pub(super) fn error(&self) -> Option<io::Error> {
        self.socket.socket().take_error().ok().flatten()
    }

    /// What the kernel reports about the connection. `None` for a unix socket, or if the kernel does not
    /// answer.
    pub(super) fn wire(&self, diag: &SockDiag) -> Option<Wire> {
        if self.socket.is_tcp() { diag.wire(self.socket.socket()) } else { None }
    }

    /// Makes the next write try, although no event has reported room. True if that may succeed: a unix
    /// socket takes bytes as soon as its reader has taken some, but epoll calls it writable only when three
    /// quarters of its buffer are free.
    pub(super) fn retry_write(&self) -> bool {
        let is_unix = !self.socket.is_tcp();
        if is_unix {
            self.socket.retry_write();
        }
        is_unix
    }

    /// Switches keepalive on, so that the kernel finds out whether the peer still lives.
    pub(super) fn keep_alive(&self, keepalive: &TcpKeepalive) {
        if self.socket.is_tcp() {
            // If the call fails, the connection is broken, and the next read reports it.
            let _ = self.socket.socket().set_tcp_keepalive(keepalive);
        }
    }

    /// True if the kernel can splice between the socket and a pipe.
    pub(super) fn can_splice(&self) -> bool {
        self.socket.is_tcp()
    }

    /// Splices what is in the socket into `pipe`, which is empty. 0 stands for the end or for an urgent
    /// byte, which splice cannot pass; a plain read tells which.
    pub(super) fn poll_fill(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        self.socket.poll_fill(cx, pipe)
    }

    /// Splices from `pipe`, which is not empty, what the socket takes.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        self.socket.poll_empty(cx, pipe)
    }

    /// Ends the half that we write (FIN).
    pub(super) fn shutdown(&self) -> io::Result<()> {
        self.socket.shutdown()
    }

    /// Waits until the peer's kernel has acknowledged what was written (but for two small packets), for up
    /// to `limit`. Without this wait, the reset of the connection would discard bytes that are still under
    /// way, such as an error message at the end of an answer. Returns early when `is_lost`, which is called
    /// now and then, says that the peer has vanished. Returns at once for a unix socket.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect on what was written.
    pub(super) async fn delivered(&self, limit: Duration, is_lost: impl Fn() -> bool) {
        if !self.socket.is_tcp() {
            return;
        }
        // SIOCOUTQ would report the number of unacknowledged bytes, but no safe call for it exists, and
        // `sock_diag.rs` may be unavailable. So the send buffer, which gets no more bytes, is made as small
        // as possible. Then the socket is writable only when nothing is unsent and at most two small
        // packets are unacknowledged. No event reports that, so the socket is polled.
        let watched = self.socket.socket();
        if watched.set_tcp_notsent_lowat(1).and(watched.set_send_buffer_size(0)).is_err() {
            return;
        }
        let began = Instant::now();
        let (mut pause, mut next_loss_check) = (Duration::from_millis(1), LOSS_CHECK_INTERVAL);
        while is_writable(&self.socket).is_ok_and(|writable| !writable) && began.elapsed() < limit {
            if began.elapsed() >= next_loss_check {
                if is_lost() {
                    return;
                }
                next_loss_check += LOSS_CHECK_INTERVAL;
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_POLL_INTERVAL);
        }
    }

    /// Lets the drop close the stream cleanly.
    pub fn finish(&mut self) {
        self.finished = true;
    }
}

/// True if the socket is writable, or if the connection is gone.
fn is_writable(socket: &impl AsFd) -> rustix::io::Result<bool> {
    let mut watched = [PollFd::new(socket, PollFlags::OUT)];
    Ok(poll(&mut watched, Some(&Timespec::default()))? > 0)
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The call fails only if the connection is gone already. Then the peer cannot mistake a cut for an
        // end either.
        if !self.finished && self.socket.is_tcp() {
            let _ = self.socket.socket().set_linger(Some(Duration::ZERO));
        }
    }
}
