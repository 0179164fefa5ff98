//! One side of a session: a TCP or a unix stream socket, reset unless it was finished.

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

/// Between two looks at a socket whose bytes are under way.
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Between two questions whether the peer of such a socket has vanished.
const LOSS_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// A connected socket.
///
/// Dropped before [`Stream::finish`], it sends a reset (TCP) instead of a clean end, so that a session which was cut
/// (a timeout with bytes waiting, shutdown, a reset of the other side) is never taken for a complete one.
#[derive(Debug)]
pub struct Stream {
    socket: StreamSocket,
    finished: bool,
    opening: Opening,
}

impl Stream {
    /// A connection that was accepted, and has inherited TCP_NODELAY from the listening socket.
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    pub fn accepted(socket: Socket) -> io::Result<Self> {
        Ok(Self { socket: StreamSocket::tcp(socket)?, finished: false, opening: Opening::Over })
    }

    /// A connection that was just opened.
    #[must_use]
    pub fn opened(socket: StreamSocket, opening: Opening) -> Self {
        Self { socket, finished: false, opening }
    }

    #[cfg(test)]
    pub(super) fn opening(&self) -> Opening {
        self.opening
    }

    /// To be called while nothing is there to be written.
    pub(super) fn poll_opening(&mut self, cx: &mut Context<'_>) {
        self.opening.release_if_late(self.socket.socket(), cx);
    }

    /// Waits until a connect that is under way has ended.
    ///
    /// # Errors
    /// Why there is no connection.
    ///
    /// # Cancel safety
    /// It only waits.
    pub async fn connected(&self) -> io::Result<()> {
        self.socket.connected().await
    }

    /// Our end of a TCP connection.
    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.socket.socket().local_addr().ok()?.as_socket()
    }

    /// Ready once the peer has sent or ended anything, as far as an event has said so: it makes no system call.
    pub fn poll_input(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_input(cx)
    }

    /// True for a connection that is reset or broken, as far as an event has said so: it makes no system call.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.socket.is_known_broken()
    }

    /// The same, to be waited for.
    pub fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_broken(cx)
    }

    /// Ready once the peer has gone away: its connection is broken, or it has ended its half without having sent a byte. One that
    /// ended it after a request may wait for the answer. To be called before anything is read.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_left(cx)
    }

    /// Reads into `buffer`; 0 is the end.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_read(cx, buffer)
    }

    /// Writes what the socket takes of `bytes`.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // What is spliced has passed here before: bulk begins with large writes.
        self.opening.before_write(self.socket.socket(), bytes.len());
        self.socket.poll_write(cx, bytes)
    }

    /// True where [`Stream::poll_peek`] can be used.
    pub(super) fn can_peek(&self) -> bool {
        self.socket.is_tcp()
    }

    /// Like [`Stream::poll_read`], but what it reads stays in the socket.
    pub(super) fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_peek(cx, buffer)
    }

    /// Takes what was peeked out of the socket: as much as `peeked` is long, which may be overwritten. `is_all`: nothing
    /// more was there.
    pub(super) fn discard(&self, peeked: &mut [u8], is_all: bool) -> io::Result<()> {
        self.socket.discard(peeked, is_all)
    }

    /// Ready when the socket may take bytes again.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_writable(cx)
    }

    /// True if the connection was reset or broke, however much it still has to be read.
    pub(super) fn is_broken(&self) -> bool {
        let mut watched = [PollFd::new(&self.socket, PollFlags::empty())];
        self.socket.is_tcp()
            && poll(&mut watched, Some(&Timespec::default())).is_ok()
            && watched[0].revents().contains(PollFlags::ERR)
    }

    /// What broke the connection, where nothing has read that yet.
    pub(super) fn error(&self) -> Option<io::Error> {
        self.socket.socket().take_error().ok().flatten()
    }

    /// What the kernel says of the connection; `None` for a unix socket, and where it does not say.
    pub(super) fn wire(&self, diag: &SockDiag) -> Option<Wire> {
        if self.socket.is_tcp() { diag.wire(self.socket.socket()) } else { None }
    }

    /// Lets the next write try, though no event has said that there is room. True where that may succeed: a unix socket takes
    /// bytes as soon as its reader has taken some, but is called writable only when three quarters of its buffer are free.
    pub(super) fn retry_write(&self) -> bool {
        let is_unix = !self.socket.is_tcp();
        if is_unix {
            self.socket.retry_write();
        }
        is_unix
    }

    /// Lets the kernel find out whether the peer still lives.
    pub(super) fn keep_alive(&self, keepalive: &TcpKeepalive) {
        if self.socket.is_tcp() {
            // A socket that takes no option is dead already, and the next read says so.
            let _ = self.socket.socket().set_tcp_keepalive(keepalive);
        }
    }

    /// True where the kernel can move pages in and out of a pipe.
    pub(super) fn can_splice(&self) -> bool {
        self.socket.is_tcp()
    }

    /// Moves what the socket has into `pipe`, which is empty. 0: the socket is at its end, or at a byte that was sent as
    /// urgent, which no splice gets past; a read tells which.
    pub(super) fn poll_fill(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        self.socket.poll_fill(cx, pipe)
    }

    /// Moves what the socket takes out of `pipe`, which is not empty.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        self.socket.poll_empty(cx, pipe)
    }

    /// Ends the half that we write.
    pub(super) fn shutdown(&self) -> io::Result<()> {
        self.socket.shutdown()
    }

    /// Waits until the peer's kernel has what was written, at most `limit`: a reset discards what is still under way,
    /// and with it the end of an answer that said why. Ends as soon as `is_lost`, which is asked now and then, says that the peer
    /// has vanished.
    ///
    /// # Cancel safety
    /// It only looks.
    pub(super) async fn delivered(&self, limit: Duration, is_lost: impl Fn() -> bool) {
        if !self.socket.is_tcp() {
            return;
        }
        // The kernel says how much is under way only by an unsafe call. So the buffer, which nobody fills any more, is
        // made so small that the socket counts as writable only when nothing is unsent and at most two packets of a
        // few bytes are not acknowledged. An acknowledgement wakes nobody then: it is looked for.
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

    /// From now on a drop closes cleanly.
    pub fn finish(&mut self) {
        self.finished = true;
    }
}

/// True as well where the connection is gone.
fn is_writable(socket: &impl AsFd) -> rustix::io::Result<bool> {
    let mut watched = [PollFd::new(socket, PollFlags::OUT)];
    Ok(poll(&mut watched, Some(&Timespec::default()))? > 0)
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A failure means that the socket is already gone, and with it the peer's chance to mistake a cut for an end.
        if !self.finished && self.socket.is_tcp() {
            let _ = self.socket.socket().set_linger(Some(Duration::ZERO));
        }
    }
}
