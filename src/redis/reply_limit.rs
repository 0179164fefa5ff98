//! Bounds what an answer may take of our memory, before the library has taken it: between the socket and its decoder.
//!
//! The library keeps a text until its last byte is there, and a member of a sorted set may be 512 MB long. This reads along
//! no more of the protocol than where an answer begins and ends, and fails the connection as soon as an answer says how
//! large it will be. What an answer means, and whether it is one at all, is the library's business.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::trouble::Trouble;

/// Of one answer or pushed message: [`MAX_MEMBERS`](super::sync::MAX_MEMBERS) names of 130 bytes.
pub(super) const LARGEST_REPLY_BYTES: u64 = 16 << 20;
/// Values in it, each of which takes some 60 bytes of memory: a member of a table is three.
pub(super) const MOST_VALUES: u64 = 500_000;

/// A stream whose answers have a largest size.
pub(super) struct Limited<S> {
    stream: S,
    place: Place,
}

impl<S> Limited<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, place: Place::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Limited<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if self.place.pass(&buffer.filled()[before..]).is_err() {
            buffer.set_filled(before);
            return Poll::Ready(Err(io::Error::other(Trouble::Oversized)));
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
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The answer is larger than it may be.
#[derive(Debug, PartialEq, Eq)]
struct TooLarge;

/// Where in an answer the stream stands.
#[derive(Debug, Default)]
struct Place {
    within: Within,
    /// Values of the answer that are still to come. 0: the next byte begins an answer.
    open: u64,
    /// Of the answer so far: values, and bytes with those of a text that is announced.
    values: u64,
    bytes: u64,
}

#[derive(Debug, Default)]
enum Within {
    /// The next byte says what kind of value follows.
    #[default]
    Before,
    /// A line, and the number that it gives where its kind has one.
    Line { kind: u8, number: u64, is_negative: bool },
    /// A text of so many bytes more, its line end among them.
    Text(u64),
}

impl Place {
    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), TooLarge> {
        while let Some((&byte, rest)) = bytes.split_first() {
            if let Within::Text(left) = &mut self.within {
                // Already counted, and jumped over whole.
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= here as u64;
                bytes = &bytes[here..];
                if *left == 0 {
                    self.ends_value();
                }
                continue;
            }
            bytes = rest;
            self.count(1)?;
            match &mut self.within {
                Within::Before => {
                    self.open = self.open.max(1);
                    self.values += 1;
                    self.within = Within::Line { kind: byte, number: 0, is_negative: false };
                }
                Within::Line { number, is_negative, .. } => match byte {
                    b'0'..=b'9' => *number = number.saturating_mul(10).saturating_add(u64::from(byte - b'0')),
                    b'-' => *is_negative = true,
                    b'\n' => self.ends_line()?,
                    _ => {}
                },
                Within::Text(_) => {}
            }
        }
        Ok(())
    }

    fn count(&mut self, bytes: u64) -> Result<(), TooLarge> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > LARGEST_REPLY_BYTES { Err(TooLarge) } else { Ok(()) }
    }

    fn ends_line(&mut self) -> Result<(), TooLarge> {
        let Within::Line { kind, number, is_negative } = self.within else { return Ok(()) };
        // A length of -1 is RESP2's way to say that there is nothing.
        let number = if is_negative { 0 } else { number };
        let parts = match kind {
            b'$' | b'!' | b'=' if !is_negative => {
                let text = number.saturating_add(2);
                self.count(text)?;
                self.within = Within::Text(text);
                return Ok(());
            }
            b'*' | b'~' | b'>' => number,
            b'%' => number.saturating_mul(2),
            // Attributes stand before the value that they are of.
            b'|' => number.saturating_mul(2).saturating_add(1),
            _ => 0,
        };
        self.open = self.open.saturating_add(parts);
        if self.values.saturating_add(self.open - 1) > MOST_VALUES {
            return Err(TooLarge);
        }
        self.ends_value();
        Ok(())
    }

    fn ends_value(&mut self) {
        self.within = Within::Before;
        self.open -= 1;
        if self.open == 0 {
            (self.values, self.bytes) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the pieces are that it comes in.
    fn pass(answers: &[u8]) -> Result<Place, TooLarge> {
        let mut places = Vec::new();
        for piece in [1, 2, 3, 7, answers.len().max(1)] {
            let mut place = Place::default();
            let passed: Result<(), TooLarge> = answers.chunks(piece).try_for_each(|bytes| place.pass(bytes));
            places.push(passed.map(|()| place));
        }
        let first = format!("{:?}", places[0]);
        assert!(places.iter().all(|place| format!("{place:?}") == first), "{places:?}");
        places.swap_remove(0)
    }

    #[test]
    fn every_kind_of_answer_is_followed_to_its_end() {
        for answer in [
            "+OK\r\n",
            "-ERR no -1 such 77 thing\r\n",
            ":-12345678901234567890\r\n",
            "$0\r\n\r\n",
            "$-1\r\n",
            "$5\r\n*9\r\n!\r\n",
            "!9\r\nSYNTAX no\r\n",
            "=7\r\ntxt:abc\r\n",
            "*0\r\n",
            "*-1\r\n",
            "*2\r\n*2\r\n$3\r\na:1\r\n,0.5\r\n*2\r\n$3\r\nb:2\r\n,inf\r\n",
            "%2\r\n+role\r\n$6\r\nmaster\r\n+modules\r\n*0\r\n",
            "~1\r\n#t\r\n",
            ">3\r\n+message\r\n$1\r\nc\r\n$1\r\nm\r\n",
            "|1\r\n+ttl\r\n:3600\r\n*1\r\n_\r\n",
            "(3492890328409238509324850943850943825024385\r\n",
        ] {
            let place = pass(answer.repeat(3).as_bytes()).unwrap_or_else(|_| panic!("{answer:?}"));
            assert!(place.open == 0 && place.bytes == 0 && place.values == 0, "{answer:?}: {place:?}");
            assert!(matches!(place.within, Within::Before), "{answer:?}: {place:?}");
            let cut = pass(&answer.as_bytes()[..answer.len() - 1]).expect("it is small");
            assert!(cut.open > 0, "{answer:?} without its last byte: {cut:?}");
        }
    }

    #[test]
    fn an_answer_that_announces_too_much_is_refused_before_it_comes() {
        let text = |bytes: u64| format!("*2\r\n$3\r\na:1\r\n${bytes}\r\n");
        assert!(pass(text(LARGEST_REPLY_BYTES / 2).as_bytes()).is_ok());
        for answer in [
            text(LARGEST_REPLY_BYTES),
            text(u64::MAX),
            "$99999999999999999999999999\r\n".into(),
            format!("*{}\r\n", MOST_VALUES + 1),
            format!("*2\r\n:1\r\n%{}\r\n", MOST_VALUES / 2),
            format!("|{}\r\n", u64::MAX),
            format!("*1\r\n*1\r\n>{}\r\n", MOST_VALUES - 1),
        ] {
            assert_eq!(pass(answer.as_bytes()).err(), Some(TooLarge), "{answer:?}");
        }
        assert!(pass(format!("*{}\r\n", MOST_VALUES - 1).as_bytes()).is_ok());
    }

    #[test]
    fn the_bound_is_that_of_one_answer_and_not_of_all_together() {
        let half = LARGEST_REPLY_BYTES as usize / 2;
        let answer = [format!("${half}\r\n").as_bytes(), &vec![b'x'; half], b"\r\n"].concat();
        let mut place = Place::default();
        for _ in 0..5 {
            assert_eq!(place.pass(&answer), Ok(()));
        }
        assert_eq!(place.pass(b"*3\r\n"), Ok(()));
        assert_eq!(place.pass(&answer), Ok(()));
        assert_eq!(place.pass(&answer), Err(TooLarge));
    }

    #[test]
    fn a_line_without_an_end_has_one_too() {
        let mut place = Place::default();
        let flood = vec![b'x'; 1 << 20];
        let passed = (0..17).find(|_| place.pass(&flood).is_err());
        assert_eq!(passed, Some(16));
    }
}
