//! Bounds the memory that a server's replies may take in this process. It sits between the socket and the
//! redis crate's parser.
//!
//! The crate keeps a bulk string until its last byte is there, and a member of a sorted set may have 512 MB.
//! [`Framing`] follows the protocol only to find where a reply begins and ends and how large it will be.
//! The connection fails as soon as a reply is too large or is not valid RESP. The content of a reply is
//! not looked at.

mod framing;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use framing::{Framing, Refused};

/// The largest reply or pushed message: [`MAX_MEMBERS`](crate::redis::schema::MAX_MEMBERS) names of 130
/// bytes. Also the most bytes of replies that no command asked for, over the life of a connection.
pub(in crate::redis) const LARGEST_REPLY_BYTES: u64 = 16 << 20;
/// Values in one reply, each of which takes some 60 bytes of memory: a member of a table is three.
pub(super) const MOST_VALUES: u64 = 500_000;

/// Why a stream failed, where the redis crate's own error cannot say it.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error("the reply is too large")]
    TooLarge,
    #[error("the reply is not valid RESP")]
    NotResp,
    #[error(transparent)]
    Tls(rustls::Error),
}

impl From<Refused> for StreamError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::TooLarge => Self::TooLarge,
            Refused::NotUnderstood => Self::NotResp,
        }
    }
}

/// The first [`StreamError`] of a stream, shared by the stream and its connection.
///
/// The stream is owned by the redis crate's driver, which passes on an `io::Error` alone. So the connection
/// looks here when a command fails.
#[derive(Clone, Debug, Default)]
pub(super) struct FirstError(Arc<OnceLock<StreamError>>);

impl FirstError {
    pub(super) fn get(&self) -> Option<&StreamError> {
        self.0.get()
    }

    fn set(&self, error: StreamError) {
        self.0.get_or_init(|| error);
    }
}

/// The TLS error in an I/O error, which is where tokio-rustls puts it.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// A stream to a server whose replies have a largest size.
pub(super) struct Limited<S> {
    stream: S,
    replies: Framing,
    /// Counts the commands that were sent: they are arrays of bulk strings, so [`Framing`] can read them.
    commands: Framing,
    refused: Option<Refused>,
    first_error: FirstError,
}

impl<S> Limited<S> {
    pub(super) fn new(stream: S) -> Self {
        let (replies, commands) = (Framing::default(), Framing::default());
        Self { stream, replies, commands, refused: None, first_error: FirstError::default() }
    }

    pub(super) fn first_error(&self) -> FirstError {
        self.first_error.clone()
    }

    fn refuse(&self, refused: Refused) -> io::Error {
        let error = StreamError::from(refused);
        self.first_error.set(error.clone());
        io::Error::other(error)
    }

    /// Keeps a TLS error in `first_error`. Any other error reaches the caller through the redis crate.
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| {
            if let Some(tls) = tls_error(error) {
                self.first_error.set(StreamError::Tls(tls.clone()));
            }
        })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Limited<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Nothing more is read after the first refusal: the position in the stream is lost.
        if let Some(refused) = self.refused {
            return Poll::Ready(Err(self.refuse(refused)));
        }
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        self.note(read)?;
        let asked = self.commands.replies();
        if let Err(refused) = self.replies.pass(&buffer.filled()[before..], asked) {
            self.refused = Some(refused);
            buffer.set_filled(before);
            return Poll::Ready(Err(self.refuse(refused)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Limited<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        let written = self.note(written)?;
        // No command is as large as a reply may be. A larger command would end its connection here.
        if let Err(refused) = self.commands.pass(&bytes[..written], u64::MAX) {
            return Poll::Ready(Err(self.refuse(refused)));
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(context));
        Poll::Ready(self.note(flushed))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    /// Returns how many bytes of `start` and of endlessly repeated `piece`s are taken, and the error after
    /// them.
    async fn taken(commands: usize, start: &str, piece: &[u8]) -> (u64, String) {
        let (ours, mut theirs) = duplex(64 << 10);
        let mut limited = Limited::new(ours);
        for _ in 0..commands {
            limited.write_all(b"*1\r\n$4\r\nPING\r\n").await.expect("there is room");
        }
        let (first, piece) = (start.as_bytes().to_vec(), piece.to_vec());
        let flood = tokio::spawn(async move {
            let _ = theirs.write_all(&first).await;
            while theirs.write_all(&piece).await.is_ok() {}
        });
        let (mut taken, mut buffer) = (0, vec![0; 8 << 10]);
        let error = loop {
            match limited.read(&mut buffer).await {
                Ok(0) => panic!("the server does not end"),
                Ok(count) => taken += count as u64,
                Err(error) => break error,
            }
            assert!(taken <= 2 * LARGEST_REPLY_BYTES, "{start:?}: it takes all");
        };
        let again = limited.read(&mut buffer).await.expect_err("it was refused").to_string();
        assert_eq!(again, error.to_string());
        drop(limited);
        flood.await.expect("it ends with the stream");
        (taken, again)
    }

    #[tokio::test]
    async fn whatever_floods_a_connection_ends_it_within_16_mib() {
        let (letters, lines) = (vec![b'x'; 4 << 10], b"x\n".repeat(2 << 10));
        for (start, piece) in [
            ("=-1\r\n", &letters[..]),
            ("!-1\r\n", &letters),
            ("+OK\n", &letters),
            ("$\n", &letters),
            ("+OK\n", &lines),
            ("$5\n", b"$5\n"),
            ("+", b"x\r"),
            ("*1\r\n", b"*1\r\n"),
            ("", b"*-1\r\n$-1\r\n"),
            ("", b"=-1\r\n"),
            ("", b"\r\n"),
            ("", b"+OK\r\n"),
            ("", b"-ERR unknown command\r\n"),
            ("*3\r\n$1\r\na\r\n$+16777216\r\n", &letters),
            ("*2\r\n$ 16777216\r\n", &letters),
        ] {
            let (bytes, error) = taken(1, start, piece).await;
            assert!(bytes <= LARGEST_REPLY_BYTES, "{start:?}, {bytes} bytes: {error}");
        }
    }

    #[tokio::test]
    async fn replies_that_were_asked_for_and_pushed_messages_may_be_more_than_16_mib_together() {
        let (ours, mut theirs) = duplex(64 << 10);
        let mut limited = Limited::new(ours);
        let text = "x".repeat(1 << 20);
        let reply = format!("*2\r\n${}\r\n{text}\r\n:1\r\n", text.len());
        let push = format!(">2\r\n+message\r\n${}\r\n{text}\r\n", text.len());
        let mut taken = vec![0; reply.len() + push.len()];
        for _ in 0..20 {
            limited.write_all(b"*2\r\n$6\r\nZRANGE\r\n$1\r\na\r\n").await.expect("there is room");
            let mut asked = [0; 23];
            theirs.read_exact(&mut asked).await.expect("a command");
            let send = async {
                theirs.write_all(push.as_bytes()).await.expect("it is read");
                theirs.write_all(reply.as_bytes()).await.expect("it is read");
            };
            let (_, read) = tokio::join!(send, limited.read_exact(&mut taken));
            read.expect("each is small");
        }
    }
}
