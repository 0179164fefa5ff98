//! The format of a saved table: lines of text, and a checksum over all of them.
//!
//! ```text
//! statera table 1
//! pool web
//! weights_key servers
//! time 2026-01-02T03:04:05.678Z
//! members 2
//! 100.0 10.0.0.1:80
//! 0.5 unix:/run/web.sock
//! crc32 714dce45
//! ```
//!
//! A member in drain or maint has that word before its weight: `drain 100.0 10.0.0.1:80`.
//!
//! The format is text, so that an operator can read it. A file may be cut off, damaged or written by
//! another program, so everything in it is checked, and a file with any mistake is refused as a whole.
//! This module uses no file and no clock.

use std::fmt::Write as _;
use std::str::SplitTerminator;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Unusable;
use crate::balance::snapshot::Member;
use crate::balance::{AdminState, BackendId, Table, Weight};

const MAGIC: &str = "statera table ";
/// The version of the format. It is read first, even before the checksum is checked, so any change of the
/// format needs a new one.
pub(super) const VERSION: &str = "1";
const CHECKSUM: &str = "crc32 ";
/// The length of the last line: `crc32 `, eight digits and the end of the line.
const CHECKSUM_LINE_BYTES: usize = CHECKSUM.len() + 8 + 1;
/// How many characters of a file's content a log line shows.
const SHOWN_CHARS: usize = 80;

/// The content of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Saved {
    pub(super) table: Table,
    /// When the table was read from Redis.
    pub(super) time: SystemTime,
}

/// Returns the text of a file.
pub(super) fn encode(pool: &str, key: &str, time: SystemTime, members: &[Member]) -> String {
    // The formatter panics on times before 1970, which only a wrong clock gives.
    let time = humantime::format_rfc3339_millis(time.max(UNIX_EPOCH));
    let (pool, key, count) = (pool.escape_debug(), key.escape_debug(), members.len());
    let mut text =
        format!("{MAGIC}{VERSION}\npool {pool}\nweights_key {key}\ntime {time}\nmembers {count}\n");
    for member in members {
        if member.state != AdminState::Ready {
            write!(text, "{} ", member.state).expect("memory takes all");
        }
        // `{:?}` writes the shortest text that is read as the same number, with an exponent if the number
        // is very large or very small.
        writeln!(text, "{:?} {}", member.weight.get(), member.backend.id()).expect("memory takes all");
    }
    let checksum = crc32fast::hash(text.as_bytes());
    writeln!(text, "{CHECKSUM}{checksum:08x}").expect("memory takes all");
    text
}

/// Reads the text of a file of `pool`, whose weights are in the Redis key `key`.
pub(super) fn decode(bytes: &[u8], pool: &str, key: &str) -> Result<Saved, Unusable> {
    let Some(rest) = bytes.strip_prefix(MAGIC.as_bytes()) else {
        return Err(if MAGIC.as_bytes().starts_with(bytes) { Unusable::CutShort } else { Unusable::Foreign });
    };
    let end = rest.iter().position(|byte| *byte == b'\n').ok_or(Unusable::CutShort)?;
    if &rest[..end] != VERSION.as_bytes() {
        return Err(Unusable::UnknownVersion(shown(&String::from_utf8_lossy(&rest[..end.min(SHOWN_CHARS)]))));
    }
    let text = std::str::from_utf8(checked(bytes)?)
        .map_err(|_| Unusable::Impossible { line: 1, reason: "it is not UTF-8".to_owned() })?;

    let mut lines = Lines { lines: text.split_terminator('\n'), line: 0 };
    lines.field(MAGIC)?;
    let (of_pool, of_key) = (lines.field("pool ")?, lines.field("weights_key ")?);
    if !pool.escape_debug().eq(of_pool.chars()) {
        return Err(Unusable::OtherPool(shown(of_pool)));
    }
    if !key.escape_debug().eq(of_key.chars()) {
        return Err(Unusable::OtherKey(shown(of_key)));
    }
    let time = lines.field("time ")?;
    let time = humantime::parse_rfc3339(time).map_err(|_| lines.impossible("this is not a time"))?;
    let count = lines.field("members ")?;
    let count: usize = count.parse().map_err(|_| lines.impossible("this is not a number"))?;
    let (mut members, mut states) = (Vec::new(), Vec::new());
    while let Some(line) = lines.next() {
        let (state, member) = member(line).map_err(|reason| lines.impossible(&reason))?;
        states.push((member.0.clone(), state));
        members.push(member);
    }
    let table = Table::new(members).with_states(states);
    if table.members().len() != count {
        return Err(lines.impossible(&format!("the file should have {count} different members")));
    }
    Ok(Saved { table, time })
}

/// Returns the content without the line of the checksum, if the checksum is right.
fn checked(bytes: &[u8]) -> Result<&[u8], Unusable> {
    let at = bytes.len().checked_sub(CHECKSUM_LINE_BYTES).ok_or(Unusable::CutShort)?;
    let (content, last) = bytes.split_at(at);
    let digits = last.strip_prefix(CHECKSUM.as_bytes()).and_then(|last| last.strip_suffix(b"\n"));
    let digits = digits.filter(|_| content.ends_with(b"\n")).ok_or(Unusable::CutShort)?;
    // Compared as text, because a parser would accept other spellings of the same number.
    if format!("{:08x}", crc32fast::hash(content)).as_bytes() != digits {
        return Err(Unusable::Damaged);
    }
    Ok(content)
}

struct Lines<'a> {
    lines: SplitTerminator<'a, char>,
    line: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<&'a str> {
        self.line += 1;
        self.lines.next()
    }

    fn field(&mut self, name: &str) -> Result<&'a str, Unusable> {
        let value = self.next().and_then(|line| line.strip_prefix(name));
        value.ok_or_else(|| self.impossible(&format!("\"{}\" is missing", name.trim_end())))
    }

    fn impossible(&self, reason: &str) -> Unusable {
        Unusable::Impossible { line: self.line, reason: reason.to_owned() }
    }
}

fn member(line: &str) -> Result<(AdminState, (BackendId, Weight)), String> {
    let first = line.split_once(' ').and_then(|(word, rest)| Some((AdminState::named(word)?, rest)));
    let (state, line) = first.unwrap_or((AdminState::Ready, line));
    let (weight, name) = line.split_once(' ').ok_or("a weight and a member are needed")?;
    let number: f64 = weight.parse().map_err(|_| "the weight is not a number")?;
    let weight = Weight::new(number).map_err(|error| error.to_string())?;
    let id = name.parse().map_err(|error| format!("{error}"))?;
    Ok((state, (id, weight)))
}

/// Returns the beginning of `text`, with control characters escaped for the log. Quotes and backslashes
/// stay, because the text in the file is escaped already.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars().take(SHOWN_CHARS) {
        match character {
            '"' | '\'' | '\\' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    shown
}

#[cfg(test)]
mod tests;
