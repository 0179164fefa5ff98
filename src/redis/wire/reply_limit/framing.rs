//! Finds where each reply of a server begins and ends, and refuses what is too large or is not valid
//! RESP.
//!
//! The redis crate's parser (`redis::parser`, 1.8) reads the same bytes afterwards. Both must agree on
//! where a reply ends. Otherwise `Framing` would count the bytes of a new reply while the crate still
//! waits for the rest of an old one and keeps all of it. Whether the crate refuses wrong bytes also
//! depends on the pieces in which they arrive: after an `x` that arrives alone, it forgets the error. So
//! `Framing` refuses everything that the crate does not accept, with the same functions of the standard
//! library. The test `both_parsers_agree_on_every_end` compares the two.

use super::{LARGEST_REPLY_BYTES, MOST_VALUES};

/// The longest number. A length of the protocol is an `i64`, which has 20 characters at most; the crate
/// also accepts white space around it.
const LONGEST_NUMBER: usize = 64;
/// The longest first part of a pushed message (`message`, `invalidate`), which the crate needs as a text.
const LONGEST_PUSH_KIND: u64 = 64;
/// The deepest nesting of aggregates. Replies of Redis have far fewer levels (HELLO and CLUSTER SLOTS have
/// four). The crate refuses more than 100, but recurses for each level.
const MOST_DEPTH: usize = 32;
/// Bytes of a line that are kept. A longer line is checked piece by piece, so that it takes no memory
/// here beside the crate's.
const LONGEST_KEPT_LINE: usize = 4 << 10;

/// Why the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::redis::wire) enum Refused {
    /// The reply is too large, or the replies that no command asked for are too large together.
    TooLarge,
    /// The reply is not valid RESP, or has a form that the crate does not accept.
    NotUnderstood,
}

/// The position in a stream of replies.
#[derive(Debug, Default)]
pub(in crate::redis) struct Framing {
    within: Within,
    /// The open aggregates, the outermost first.
    open: Vec<Aggregate>,
    /// The values that all open aggregates together still announce.
    announced: u64,
    /// The line that is read, or the text that names the kind of a pushed message.
    line: Vec<u8>,
    /// The beginning of the line was checked and dropped.
    line_is_cut: bool,
    /// The size of the reply so far. `bytes` includes the bytes of a text that is announced and still to
    /// come.
    values: u64,
    bytes: u64,
    is_push: bool,
    /// Replies that have ended, without pushed messages.
    replies: u64,
    /// Bytes of replies that no command asked for.
    unasked_bytes: u64,
}

#[derive(Debug)]
struct Aggregate {
    left: u64,
    /// The next part names the kind of a pushed message.
    names_push: bool,
}

#[derive(Clone, Copy, Debug, Default)]
enum Within {
    /// The next byte names the kind of the value.
    #[default]
    Before,
    /// A line up to its `\r\n`. A line feed or a return alone is a part of it.
    Line { kind: u8, after_return: bool },
    /// The bytes of a text that are still to come, without its `\r\n`.
    Text { left: u64, content: Content },
    /// The `\r\n` after a text.
    TextEnd { after_return: bool, content: Content },
}

/// What a text must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Any,
    /// A colon is still to come. It separates the format of a verbatim text from the text.
    Colon,
    /// UTF-8, since the text names the kind of a pushed message.
    PushKind,
}

impl Framing {
    /// The number of replies that have ended, without pushed messages.
    pub(in crate::redis) fn replies(&self) -> u64 {
        self.replies
    }

    /// Moves over `bytes`. `asked` is the number of commands that were sent.
    ///
    /// # Errors
    /// The connection has to be closed: the position in the stream is lost.
    pub(in crate::redis) fn pass(&mut self, mut bytes: &[u8], asked: u64) -> Result<(), Refused> {
        while let Some((&byte, rest)) = bytes.split_first() {
            if let Within::Text { left, content } = self.within {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                self.passes_text(&bytes[..here], left - here as u64, content);
                bytes = &bytes[here..];
                continue;
            }
            bytes = rest;
            if self.take(byte)? {
                self.ends_value(asked)?;
            }
        }
        Ok(())
    }

    /// Skips bytes of a text, which were counted when the text was announced.
    fn passes_text(&mut self, text: &[u8], left: u64, content: Content) {
        let content = match content {
            Content::Colon if text.contains(&b':') => Content::Any,
            content => content,
        };
        if content == Content::PushKind {
            self.line.extend_from_slice(text);
        }
        self.within = match left {
            0 => Within::TextEnd { after_return: false, content },
            _ => Within::Text { left, content },
        };
    }

    /// Takes one byte outside of a text. Returns true where it ends a value without parts.
    fn take(&mut self, byte: u8) -> Result<bool, Refused> {
        match self.within {
            Within::Before => {
                self.count(1)?;
                self.begins_value(byte)?;
            }
            Within::Line { kind, after_return } => {
                self.count(1)?;
                if after_return && byte == b'\n' {
                    return self.ends_line(kind);
                }
                self.within = Within::Line { kind, after_return: byte == b'\r' };
                self.line.push(byte);
                if has_number(kind) && self.line.len() > LONGEST_NUMBER {
                    return Err(Refused::NotUnderstood);
                }
                if self.line.len() >= LONGEST_KEPT_LINE {
                    self.cuts_line(kind)?;
                }
            }
            Within::TextEnd { after_return: false, content } if byte == b'\r' => {
                self.within = Within::TextEnd { after_return: true, content };
            }
            Within::TextEnd { after_return: true, content } if byte == b'\n' => {
                let is_whole = match content {
                    Content::Any => true,
                    Content::Colon => false,
                    Content::PushKind => std::str::from_utf8(&self.line).is_ok(),
                };
                return if is_whole { Ok(true) } else { Err(Refused::NotUnderstood) };
            }
            Within::TextEnd { .. } => return Err(Refused::NotUnderstood),
            Within::Text { .. } => {}
        }
        Ok(false)
    }

    fn begins_value(&mut self, kind: u8) -> Result<(), Refused> {
        let is_known = b"+-:$*%|~>!=,#_(".contains(&kind);
        if !is_known || self.names_push() && kind != b'+' && kind != b'$' {
            return Err(Refused::NotUnderstood);
        }
        if self.open.is_empty() {
            self.is_push = kind == b'>';
        }
        self.values += 1;
        self.line.clear();
        self.line_is_cut = false;
        self.within = Within::Line { kind, after_return: false };
        Ok(())
    }

    /// True where the value names the kind of a pushed message.
    fn names_push(&self) -> bool {
        self.open.last().is_some_and(|aggregate| aggregate.names_push)
    }

    /// Drops the beginning of a long line, except the bytes of a character that is not complete.
    fn cuts_line(&mut self, kind: u8) -> Result<(), Refused> {
        // Only simple strings and errors may be long.
        if kind != b'+' && kind != b'-' {
            return Err(Refused::NotUnderstood);
        }
        let valid = match std::str::from_utf8(&self.line) {
            Ok(line) => line.len(),
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => return Err(Refused::NotUnderstood),
        };
        self.line.drain(..valid);
        self.line_is_cut = true;
        Ok(())
    }

    /// Ends the line of a value of this `kind`. Returns true where no part of the value follows.
    fn ends_line(&mut self, kind: u8) -> Result<bool, Refused> {
        // The last byte is the carriage return.
        self.line.pop();
        let line = std::str::from_utf8(&self.line).map_err(|_| Refused::NotUnderstood)?;
        let is_read = match kind {
            b'#' => line == "t" || line == "f",
            b',' => line.trim().parse::<f64>().is_ok(),
            // The crate reads `+OK` as another kind of value, which cannot name a pushed message.
            b'+' => self.line_is_cut || line != "OK" || !self.names_push(),
            _ => true,
        };
        if !is_read {
            return Err(Refused::NotUnderstood);
        }
        if !has_number(kind) {
            return Ok(true);
        }
        let number = line.trim().parse().map_err(|_| Refused::NotUnderstood)?;
        self.announces(kind, number)
    }

    /// Handles the number at the beginning of a value. Returns true where no part of the value follows.
    fn announces(&mut self, kind: u8, number: i64) -> Result<bool, Refused> {
        let names_push = self.names_push();
        let parts = match (kind, u64::try_from(number)) {
            (b'$', Err(_)) if names_push => return Err(Refused::NotUnderstood),
            // A negative length means null.
            (b':', _) | (b'$' | b'*' | b'~' | b'>', Err(_)) => return Ok(true),
            // For a negative length the crate would wait for some 2^64 bytes (`!`, `=`) or fail (`%`,
            // `|`).
            (_, Err(_)) => return Err(Refused::NotUnderstood),
            (b'$' | b'!' | b'=', Ok(bytes)) => {
                if names_push && bytes > LONGEST_PUSH_KIND {
                    return Err(Refused::NotUnderstood);
                }
                self.count(bytes.saturating_add(2))?;
                self.line.clear();
                let content = match kind {
                    b'=' => Content::Colon,
                    _ if names_push => Content::PushKind,
                    _ => Content::Any,
                };
                self.passes_text(&[], bytes, content);
                return Ok(false);
            }
            (b'%', Ok(pairs)) => pairs.saturating_mul(2),
            // An attribute counts as an aggregate of its pairs and the value that they describe.
            (b'|', Ok(pairs)) => pairs.saturating_mul(2).saturating_add(1),
            (_, Ok(parts)) => parts,
        };
        if parts == 0 {
            return Ok(true);
        }
        self.announced = self.announced.saturating_add(parts);
        if self.values.saturating_add(self.announced) > MOST_VALUES || self.open.len() == MOST_DEPTH {
            return Err(Refused::TooLarge);
        }
        self.open.push(Aggregate { left: parts, names_push: kind == b'>' });
        self.within = Within::Before;
        Ok(false)
    }

    /// Ends a value, and each aggregate whose last part it was.
    fn ends_value(&mut self, asked: u64) -> Result<(), Refused> {
        self.within = Within::Before;
        while let Some(aggregate) = self.open.last_mut() {
            aggregate.names_push = false;
            aggregate.left -= 1;
            self.announced -= 1;
            if aggregate.left > 0 {
                return Ok(());
            }
            self.open.pop();
        }
        if !self.is_push {
            self.replies += 1;
            if self.replies > asked {
                self.unasked_bytes = self.unasked_bytes.saturating_add(self.bytes);
            }
        }
        (self.values, self.bytes) = (0, 0);
        if self.unasked_bytes > LARGEST_REPLY_BYTES { Err(Refused::TooLarge) } else { Ok(()) }
    }

    fn count(&mut self, bytes: u64) -> Result<(), Refused> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > LARGEST_REPLY_BYTES { Err(Refused::TooLarge) } else { Ok(()) }
    }
}

/// True where a value of this kind begins with an integer: its length, or the value itself.
fn has_number(kind: u8) -> bool {
    !b"+-_,#(".contains(&kind)
}

#[cfg(test)]
mod tests;
