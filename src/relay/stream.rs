//! One side of a session: a TCP or a unix stream socket, reset unless it was finished.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connected socket.
///
/// Dropped before [`Stream::finish`], it sends a reset (TCP) instead of a clean end, so that a session which was cut
/// (a timeout with bytes waiting, shutdown, a reset of the other side) is never taken for a complete one.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    finished: bool,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        Self { socket: Socket::Tcp(socket), finished: false }
    }
}

impl From<UnixStream> for Stream {
    fn from(socket: UnixStream) -> Self {
        Self { socket: Socket::Unix(socket), finished: false }
    }
}

impl Stream {
    /// Reads into `buffer`; 0 is the end.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut target = ReadBuf::new(buffer);
        ready!(match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_read(cx, &mut target),
            Socket::Unix(socket) => Pin::new(socket).poll_read(cx, &mut target),
        })?;
        Poll::Ready(Ok(target.filled().len()))
    }

    /// Writes what the socket takes of `bytes`.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Socket::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    /// Ends the half that we write.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Socket::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }

    /// From now on a drop closes cleanly.
    pub fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A failure means that the socket is already gone, and with it the peer's chance to mistake a cut for an end.
        if let (false, Socket::Tcp(socket)) = (self.finished, &self.socket) {
            let _ = socket.set_zero_linger();
        }
    }
}
