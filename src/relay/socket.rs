//! The system calls of a stream socket that this thread's reactor watches: read, peek, write, splice.
//!
//! A read from a TCP socket that does not fill the buffer has emptied the socket, so the readiness to read
//! is cleared without a last read that returns EAGAIN. That saves a system call each time. Readiness is
//! kept in two cases. A read also ends before an urgent byte (MSG_OOB, as telnet, FTP and Oracle's break
//! use it), and no event follows for the bytes behind it; so urgent bytes are watched for, too. And no
//! event follows after the one that reports the end.
//!
//! When to read, peek or splice is decided in `direction.rs`, and how a socket is closed in `stream.rs`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::pipe::{SpliceFlags, splice};
use socket2::Socket;

use super::pipe::Pipe;
use crate::reactor::{Ready, Watched};

/// SPLICE_F_MOVE moves pages instead of copying them, where the kernel can.
const SPLICE_FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);
const EVENTS: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::PRI).union(EventFlags::RDHUP);

/// A TCP or unix socket that is connected or connecting.
#[derive(Debug)]
pub struct StreamSocket {
    watched: Watched<Socket>,
    is_tcp: bool,
}

impl StreamSocket {
    /// Starts to watch a TCP socket, which must be non-blocking. On an error it is closed with a reset.
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    ///
    /// # Panics
    /// On a thread without a reactor.
    pub fn tcp(socket: Socket) -> io::Result<Self> {
        Ok(Self { watched: watch(socket)?, is_tcp: true })
    }

    /// Starts to watch a unix socket, like [`StreamSocket::tcp`].
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    ///
    /// # Panics
    /// On a thread without a reactor.
    pub fn unix(socket: Socket) -> io::Result<Self> {
        Ok(Self { watched: watch(socket)?, is_tcp: false })
    }

    /// The socket itself, for its options.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        self.watched.socket()
    }

    /// True for TCP, which alone can be peeked, spliced and reset.
    pub(super) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Waits for the end of a connect.
    ///
    /// The error is read only if the event reports a failure, which saves a system call per session.
    ///
    /// # Errors
    /// Why the connect failed.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn connected(&self) -> io::Result<()> {
        let ready = std::future::poll_fn(|cx| self.watched.poll_ready(cx, Ready::WRITE)).await;
        if ready.has(Ready::BROKEN)
            && let Some(error) = self.socket().take_error()?
        {
            return Err(error);
        }
        Ok(())
    }

    /// Ready once an event has reported something to read: bytes, the end or an error. Makes no system call.
    pub(super) fn poll_input(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watched.poll_ready(cx, Ready::READ).map(drop)
    }

    /// True if an event has reported that the connection is broken. Makes no system call.
    pub(super) fn is_known_broken(&self) -> bool {
        self.watched.ready().has(Ready::BROKEN)
    }

    /// Ready once an event has reported that the connection is broken.
    pub(super) fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watched.poll_ready(cx, Ready::BROKEN).map(drop)
    }

    /// Ready once the peer has left: see [`super::Stream::poll_left`].
    pub(super) fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        let ready = ready!(self.watched.poll_ready(cx, Ready::ENDED));
        let sent_nothing = || matches!(recv(self, &mut [0; 1], RecvFlags::PEEK), Ok((0, _)));
        if ready.has(Ready::BROKEN) || (!ready.has(Ready::URGENT) && sent_nothing()) {
            return Poll::Ready(());
        }
        self.poll_broken(cx)
    }

    /// Reads into `buffer`. 0 is the end.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let ready = ready!(self.watched.poll_ready(cx, Ready::READ));
            match recv(self, &mut *buffer, RecvFlags::empty()) {
                Ok((read, _)) => {
                    // A read from a unix socket also ends at each message with ancillary data, such as
                    // descriptors.
                    if read > 0 && read < buffer.len() && self.is_tcp && !may_end_short(ready) {
                        self.watched.clear(Ready::READ);
                    }
                    return Poll::Ready(Ok(read));
                }
                Err(Errno::AGAIN) => self.watched.clear(Ready::READ | Ready::URGENT),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Reads into `buffer` and leaves the bytes in the socket. 0 stands for the end, or for an urgent byte
    /// with nothing behind it. Only a plain read removes such a byte; left in the socket, it would turn the
    /// close into a reset.
    pub(super) fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let ready = ready!(self.watched.poll_ready(cx, Ready::READ));
            match recv(self, &mut *buffer, RecvFlags::PEEK) {
                Ok((there, _)) => return Poll::Ready(Ok(there)),
                Err(Errno::AGAIN) if may_end_short(ready) => return Poll::Ready(Ok(0)),
                Err(Errno::AGAIN) => self.watched.clear(Ready::READ),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Removes peeked bytes from the socket without copying them (MSG_TRUNC). `is_all`: the peek saw all
    /// that there was.
    pub(super) fn discard(&self, peeked: &mut [u8], is_all: bool) -> io::Result<()> {
        let mut left = peeked.len();
        while left > 0 {
            match recv(self, &mut peeked[..left], RecvFlags::TRUNC) {
                // Peeked bytes cannot disappear.
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, gone)) => left -= gone,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if is_all {
            self.drained();
        }
        Ok(())
    }

    /// Ready when the socket takes bytes again.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watched.poll_ready(cx, Ready::WRITE).map(drop)
    }

    /// Makes the next write try, although no event has reported room.
    pub(super) fn retry_write(&self) {
        self.watched.assume(Ready::WRITE);
    }

    /// Writes what the socket takes of `bytes`.
    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.watched.poll_ready(cx, Ready::WRITE));
            match send(self, bytes, SendFlags::NOSIGNAL) {
                Ok(written) => {
                    if written < bytes.len() {
                        self.watched.clear(Ready::WRITE);
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(Errno::AGAIN) => self.watched.clear(Ready::WRITE),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Splices what is in the socket into `pipe`, which is empty. 0 stands for the end or for an urgent
    /// byte, which splice cannot pass; a plain read tells which.
    pub(super) fn poll_fill(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        // EAGAIN means "socket empty" only while the pipe is empty. With bytes in the pipe it may mean "pipe
        // full". Clearing the readiness to read then would lose the wake-up for the bytes in the socket.
        debug_assert_eq!(pipe.held_bytes, 0);
        loop {
            let ready = ready!(self.watched.poll_ready(cx, Ready::READ));
            match splice(self, None, &pipe.writer, None, pipe.capacity_bytes, SPLICE_FLAGS) {
                Ok(read) => {
                    pipe.held_bytes = read;
                    return Poll::Ready(Ok(read));
                }
                // At an urgent byte, and after the event of the end, no further event follows. 0 makes the
                // caller read, which tells what there is.
                Err(Errno::AGAIN) if may_end_short(ready) => return Poll::Ready(Ok(0)),
                Err(Errno::AGAIN) => self.watched.clear(Ready::READ),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Splices from `pipe`, which is not empty, what the socket takes.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.watched.poll_ready(cx, Ready::WRITE));
            match splice(&pipe.reader, None, self, None, pipe.held_bytes, SPLICE_FLAGS) {
                Ok(written) => {
                    pipe.held_bytes -= written;
                    return Poll::Ready(Ok(written));
                }
                // The pipe has bytes, so EAGAIN can only mean that the socket is full.
                Err(Errno::AGAIN) => self.watched.clear(Ready::WRITE),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Ends the half that we write (FIN).
    pub(super) fn shutdown(&self) -> io::Result<()> {
        Ok(shutdown(self, Shutdown::Write)?)
    }

    /// Clears the readiness to read after a read that emptied the socket, because further bytes come with an
    /// event. Keeps it if the read may have stopped short.
    fn drained(&self) {
        if !may_end_short(self.watched.ready()) {
            self.watched.clear(Ready::READ);
        }
    }
}

/// True if a read may end before all bytes that are there: from the event of an urgent byte until a read has
/// returned EAGAIN, and after the event of the end, which is the last one.
fn may_end_short(ready: Ready) -> bool {
    ready.has(Ready::URGENT | Ready::ENDED)
}

fn watch(socket: Socket) -> io::Result<Watched<Socket>> {
    Watched::new(socket, EVENTS).map_err(|(socket, error)| {
        // A reset, so that the peer does not take the connection for a complete session. On a unix socket
        // the option has no effect.
        let _ = socket.set_linger(Some(Duration::ZERO));
        error
    })
}

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}
