//! A stream socket that this thread's reactor watches: how it is read, written and spliced.
//!
//! A read that did not fill the buffer is the last one until the next event, which saves a system call each time. But a read also
//! ends short before an urgent byte (MSG_OOB: telnet, FTP, Oracle's break), and what came behind it would wait for ever. So
//! urgent bytes are watched for too, which costs nothing where there are none.
//!
//! It decides nothing: when to read, peek or splice is `direction.rs`'s, how a socket is closed `stream.rs`'s.

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

/// Pages are moved, not copied, where they can be.
const SPLICE_FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);
const EVENTS: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::PRI).union(EventFlags::RDHUP);

/// A TCP or unix socket that is connected, or about to be.
#[derive(Debug)]
pub struct StreamSocket {
    watched: Watched<Socket>,
    is_tcp: bool,
}

impl StreamSocket {
    /// Begins to watch `socket`, which must not block.
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    ///
    /// # Panics
    /// On a thread without a reactor.
    pub fn tcp(socket: Socket) -> io::Result<Self> {
        Ok(Self { watched: watch(socket)?, is_tcp: true })
    }

    /// Like [`StreamSocket::tcp`].
    ///
    /// # Errors
    /// The kernel can watch no more sockets.
    ///
    /// # Panics
    /// On a thread without a reactor.
    pub fn unix(socket: Socket) -> io::Result<Self> {
        Ok(Self { watched: watch(socket)?, is_tcp: false })
    }

    /// For options.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        self.watched.socket()
    }

    /// What can be done by TCP alone: it can be peeked, spliced and reset.
    pub(super) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// Waits until a connect that is under way has ended.
    ///
    /// The event itself says whether it went well: to ask for the socket's error after each success would be one system call
    /// a session for nothing.
    ///
    /// # Errors
    /// Why there is no connection.
    ///
    /// # Cancel safety
    /// It only waits.
    pub async fn connected(&self) -> io::Result<()> {
        let ready = std::future::poll_fn(|cx| self.watched.poll_ready(cx, Ready::WRITE)).await;
        if ready.has(Ready::BROKEN)
            && let Some(error) = self.socket().take_error()?
        {
            return Err(error);
        }
        Ok(())
    }

    /// Ready once an event has said that there is something to be read: bytes, the end or an error.
    pub(super) fn poll_input(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watched.poll_ready(cx, Ready::READ).map(drop)
    }

    /// True where an event has said that the connection is broken.
    pub(super) fn is_known_broken(&self) -> bool {
        self.watched.ready().has(Ready::BROKEN)
    }

    /// Ready once an event has said that the connection is broken.
    pub(super) fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watched.poll_ready(cx, Ready::BROKEN).map(drop)
    }

    /// Ready once the peer has gone away: see [`super::Stream::poll_left`].
    pub(super) fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        let ready = ready!(self.watched.poll_ready(cx, Ready::ENDED));
        let sent_nothing = || matches!(recv(self, &mut [0; 1], RecvFlags::PEEK), Ok((0, _)));
        if ready.has(Ready::BROKEN) || (!ready.has(Ready::URGENT) && sent_nothing()) {
            return Poll::Ready(());
        }
        self.poll_broken(cx)
    }

    /// Reads into `buffer`; 0 is the end.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let ready = ready!(self.watched.poll_ready(cx, Ready::READ));
            match recv(self, &mut *buffer, RecvFlags::empty()) {
                Ok((read, _)) => {
                    // A unix socket's reads end short at each descriptor that is sent along.
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

    /// Like [`StreamSocket::poll_read`], but what it reads stays in the socket. 0: the end, or an urgent byte behind which there is
    /// nothing, and which only a read takes away: left there, it would turn the close into a reset.
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

    /// Takes what was peeked out of the socket, without copying it. `is_all`: nothing more was there.
    pub(super) fn discard(&self, peeked: &mut [u8], is_all: bool) -> io::Result<()> {
        let mut left = peeked.len();
        while left > 0 {
            match recv(self, &mut peeked[..left], RecvFlags::TRUNC) {
                // What was there cannot be gone.
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

    /// Ready when the socket may take bytes again.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watched.poll_ready(cx, Ready::WRITE).map(drop)
    }

    /// Lets the next write try, though no event has said that there is room.
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

    /// Moves what the socket has into `pipe`, which is empty. 0: the socket is at its end, or at an urgent byte, which no
    /// splice gets past; a read tells which.
    pub(super) fn poll_fill(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        // Only an empty pipe is filled: with bytes inside, EAGAIN might mean "pipe full", and clearing the readiness to
        // read for that would lose the wake-up for good.
        debug_assert_eq!(pipe.held_bytes, 0);
        loop {
            let ready = ready!(self.watched.poll_ready(cx, Ready::READ));
            match splice(self, None, &pipe.writer, None, pipe.capacity_bytes, SPLICE_FLAGS) {
                Ok(read) => {
                    pipe.held_bytes = read;
                    return Poll::Ready(Ok(read));
                }
                // There the kernel says the same as where nothing is: for ever.
                Err(Errno::AGAIN) if may_end_short(ready) => return Poll::Ready(Ok(0)),
                Err(Errno::AGAIN) => self.watched.clear(Ready::READ),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Moves what the socket takes out of `pipe`, which is not empty.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.watched.poll_ready(cx, Ready::WRITE));
            match splice(&pipe.reader, None, self, None, pipe.held_bytes, SPLICE_FLAGS) {
                Ok(written) => {
                    pipe.held_bytes -= written;
                    return Poll::Ready(Ok(written));
                }
                // The pipe has bytes, so it can only mean that the socket is full.
                Err(Errno::AGAIN) => self.watched.clear(Ready::WRITE),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Ends the half that we write.
    pub(super) fn shutdown(&self) -> io::Result<()> {
        Ok(shutdown(self, Shutdown::Write)?)
    }

    /// A read got all that there was: what comes next comes with an event of its own. Not so where it may have ended at an
    /// urgent byte, and where the end has been told already.
    fn drained(&self) {
        if !may_end_short(self.watched.ready()) {
            self.watched.clear(Ready::READ);
        }
    }
}

/// True where a read may end before all that there is: from the event that told of an urgent byte until a read has found nothing
/// more, and once the end was told, after which there is no other event.
fn may_end_short(ready: Ready) -> bool {
    ready.has(Ready::URGENT | Ready::ENDED)
}

fn watch(socket: Socket) -> io::Result<Watched<Socket>> {
    Watched::new(socket, EVENTS).map_err(|(socket, error)| {
        // Nobody may take it for a session that was complete. A failure means that it is gone already, or no TCP.
        let _ = socket.set_linger(Some(Duration::ZERO));
        error
    })
}

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}
