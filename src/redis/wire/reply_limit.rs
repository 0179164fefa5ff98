//! Bounds what a server's replies may take of our memory, before the redis crate has taken it: between the socket and its
//! parser.
//!
//! The crate keeps a text until its last byte is there, and a member of a sorted set may have 512 MB. [`Framing`] follows the
//! protocol as far as it says where a reply begins and ends and how large it will be; the connection fails as soon as a
//! reply is too large or is none. What a reply means is not looked at.

mod framing;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::Trouble;
use framing::{Framing, Refused};

/// Of one reply or pushed message: [`MAX_MEMBERS`](crate::redis::follow::sync::MAX_MEMBERS) names of 130 bytes. Also of all replies that no
/// command asked for, over the life of a connection.
pub(in crate::redis) const LARGEST_REPLY_BYTES: u64 = 16 << 20;
/// Values in it, each of which takes some 60 bytes of memory: a member of a table is three.
pub(in crate::redis) const MOST_VALUES: u64 = 500_000;

/// A stream to a server whose replies have a largest size.
pub(in crate::redis) struct Limited<S> {
    stream: S,
    replies: Framing,
    /// Commands are arrays of texts, so the same reader counts them.
    commands: Framing,
    refused: Option<Refused>,
}

impl<S> Limited<S> {
    pub(in crate::redis) fn new(stream: S) -> Self {
        Self { stream, replies: Framing::default(), commands: Framing::default(), refused: None }
    }
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::other(match refused {
            Refused::TooLarge => Trouble::Oversized,
            Refused::NotUnderstood => Trouble::Garbled,
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
            return Poll::Ready(Err(refused.into()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let asked = self.commands.replies();
        if let Err(refused) = self.replies.pass(&buffer.filled()[before..], asked) {
            self.refused = Some(refused);
            buffer.set_filled(before);
            return Poll::Ready(Err(refused.into()));
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
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        // What we write ourselves is no larger than a reply may be; a command that were would end its connection here.
        self.commands.pass(&bytes[..written], u64::MAX)?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    /// How many bytes are taken of `start` and then `piece` for ever, and why no more.
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
