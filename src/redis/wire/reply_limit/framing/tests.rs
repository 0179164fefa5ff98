//! Compares [`Framing`] with the parser of the redis crate, and checks its bounds.

use std::io::{self, Read};

use fastrand::Rng;
use redis::{ErrorKind, Parser};

use super::*;

/// The number of commands, in tests in which every reply was asked for.
const ALL: u64 = u64::MAX;

/// Passes `replies` in pieces of several lengths, checks that the result is the same, and returns it.
fn pass(replies: &[u8]) -> Result<Framing, Refused> {
    let mut framings = Vec::new();
    for piece in [1, 2, 3, 7, replies.len().max(1)] {
        let mut framing = Framing::default();
        let passed: Result<(), Refused> =
            replies.chunks(piece).try_for_each(|bytes| framing.pass(bytes, ALL));
        framings.push(passed.map(|()| framing));
    }
    let first = format!("{:?}", framings[0]);
    assert!(framings.iter().all(|framing| format!("{framing:?}") == first), "{framings:?}");
    framings.swap_remove(0)
}

#[test]
fn every_kind_of_reply_is_followed_to_its_end() {
    for reply in [
        "+OK\r\n",
        "+O\nK\r\r\n",
        "-ERR no -1 such 77 thing\r\n",
        ":-1234567890123456789\r\n",
        "$0\r\n\r\n",
        "$-1\r\n",
        "$ +5\t\n\r\n*9\r\n!\r\n",
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
        let state = pass(reply.repeat(3).as_bytes()).unwrap_or_else(|_| panic!("{reply:?}"));
        assert!(state.open.is_empty() && state.bytes == 0 && state.values == 0, "{reply:?}: {state:?}");
        assert!(matches!(state.within, Within::Before), "{reply:?}: {state:?}");
        assert_eq!(state.replies, if reply.starts_with('>') { 0 } else { 3 }, "{reply:?}");
        let cut = pass(&reply.as_bytes()[..reply.len() - 1]).expect("it is small");
        assert!(cut.values > 0, "{reply:?} without its last byte: {cut:?}");
    }
}

/// The beginning of a long line is dropped, and a character may lie across the cut.
#[test]
fn a_long_line_ends_where_it_ends_and_must_be_text_to_its_end() {
    for pad in 0..4 {
        let line = format!("+{}{}\r\n", "x".repeat(pad), "é€".repeat(3_000));
        assert!(pass(line.as_bytes()).is_ok_and(|framing| framing.replies() == 1), "{pad}");
        let mut broken = line.into_bytes();
        let at = broken.len() - 3;
        broken[at] = 0xff;
        assert_eq!(pass(&broken).err(), Some(Refused::NotUnderstood), "{pad}");
    }
    let number = format!(",{}\r\n", "1".repeat(5_000));
    assert_eq!(pass(number.as_bytes()).err(), Some(Refused::NotUnderstood));
}

#[test]
fn what_the_crate_would_wait_for_or_cannot_read_is_refused() {
    for reply in [
        "=-1\r\n",
        "!-1\r\n",
        "%-1\r\n",
        "|-1\r\n",
        "$\r\n",
        "*1 2\r\n",
        ":9223372036854775808\r\n",
        "$1\r\nab\r\n",
        "$1\r\na\n",
        "\r\n",
        "HTTP/1.1 400 Bad Request\r\n",
        "*\u{a0}1a\r\n",
        "#x\r\n",
        ",x\r\n",
        "=3\r\nabc\r\n",
        ">1\r\n:1\r\n",
        ">1\r\n+OK\r\n",
        ">1\r\n$-1\r\n",
    ] {
        assert_eq!(pass(reply.as_bytes()).err(), Some(Refused::NotUnderstood), "{reply:?}");
    }
    let padded = format!("*{}1\r\n", "0".repeat(LONGEST_NUMBER));
    assert_eq!(pass(padded.as_bytes()).err(), Some(Refused::NotUnderstood));
    assert_eq!(pass(b"+\xff\r\n").err(), Some(Refused::NotUnderstood));
    assert_eq!(pass(b">1\r\n$1\r\n\xff\r\n").err(), Some(Refused::NotUnderstood));
    let deep = "*1\r\n".repeat(MOST_DEPTH + 1);
    assert_eq!(pass(deep.as_bytes()).err(), Some(Refused::TooLarge));
    assert!(pass(&deep.as_bytes()[4..]).is_ok());
}

#[test]
fn a_reply_that_announces_too_much_is_refused_before_it_comes() {
    let text = |bytes: u64| format!("*2\r\n$3\r\na:1\r\n${bytes}\r\n");
    assert!(pass(text(LARGEST_REPLY_BYTES / 2).as_bytes()).is_ok());
    for reply in [
        text(LARGEST_REPLY_BYTES),
        text(i64::MAX as u64),
        text(u64::MAX),
        "$99999999999999999999999999\r\n".into(),
        format!("*{}\r\n", MOST_VALUES + 1),
        format!("*2\r\n:1\r\n%{}\r\n", MOST_VALUES / 2),
        format!("|{}\r\n", i64::MAX),
        format!("|{}\r\n", u64::MAX),
        format!("*1\r\n*1\r\n>{}\r\n", MOST_VALUES - 1),
    ] {
        assert!(pass(reply.as_bytes()).is_err(), "{reply:?}");
    }
    assert!(pass(format!("*{}\r\n", MOST_VALUES - 1).as_bytes()).is_ok());
}

#[test]
fn the_bound_is_that_of_one_reply_and_not_of_all_together() {
    let half = LARGEST_REPLY_BYTES as usize / 2;
    let reply = [format!("${half}\r\n").as_bytes(), &vec![b'x'; half], b"\r\n"].concat();
    let mut framing = Framing::default();
    for _ in 0..5 {
        assert_eq!(framing.pass(&reply, ALL), Ok(()));
    }
    assert_eq!(framing.pass(b"*3\r\n", ALL), Ok(()));
    assert_eq!(framing.pass(&reply, ALL), Ok(()));
    assert_eq!(framing.pass(&reply, ALL), Err(Refused::TooLarge));
}

#[test]
fn replies_that_no_command_asked_for_are_bounded_all_together() {
    let half = LARGEST_REPLY_BYTES as usize / 2;
    let reply = [format!("${half}\r\n").as_bytes(), &vec![b'x'; half], b"\r\n"].concat();
    let mut framing = Framing::default();
    for asked in 1..=3 {
        assert_eq!(framing.pass(&reply, asked), Ok(()));
    }
    assert_eq!(framing.pass(&reply, 3), Ok(()), "a server that is full says so before it is asked");
    assert_eq!(framing.pass(&reply, 3), Err(Refused::TooLarge));
}

#[test]
fn a_line_without_an_end_has_one_too() {
    let mut framing = Framing::default();
    assert_eq!(framing.pass(b"+", ALL), Ok(()));
    let flood = vec![b'x'; 1 << 20];
    let passed = (0..17).find(|_| framing.pass(&flood, ALL).is_err());
    assert_eq!(passed, Some(15));
}

/// Gives `bytes` in pieces of at most `longest`.
struct Pieces<'a> {
    bytes: &'a [u8],
    given: usize,
    longest: usize,
    rng: Rng,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = &self.bytes[self.given..];
        let piece = self.rng.usize(1..=self.longest).min(left.len()).min(buffer.len());
        buffer[..piece].copy_from_slice(&left[..piece]);
        self.given += piece;
        Ok(piece)
    }
}

/// What was read from a stream, by the crate or by [`Framing`].
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    /// Where each value ended, also of pushed messages; exact where the pieces have one byte.
    ends: Vec<usize>,
    /// The reading ended in an error, and not at the end of the bytes.
    failed: bool,
}

fn parsed(bytes: &[u8], longest: usize, rng: &mut Rng) -> Parsed {
    let mut pieces = Pieces { bytes, given: 0, longest, rng: rng.fork() };
    let (mut parser, mut ends) = (Parser::new(), Vec::new());
    loop {
        match parser.parse_value(&mut pieces) {
            Ok(_) => ends.push(pieces.given),
            Err(error) => return Parsed { ends, failed: error.kind() == ErrorKind::Parse },
        }
    }
}

/// Reads `bytes` with [`Framing`], byte by byte and in random pieces.
fn framed(bytes: &[u8], rng: &mut Rng) -> Parsed {
    let (mut framing, mut ends) = (Framing::default(), Vec::new());
    for (at, byte) in bytes.iter().enumerate() {
        if framing.pass(std::slice::from_ref(byte), ALL).is_err() {
            return Parsed { ends, failed: true };
        }
        if matches!(framing.within, Within::Before) && framing.open.is_empty() {
            ends.push(at + 1);
        }
    }
    // The pieces in which bytes arrive make no difference.
    let (mut whole, mut rest) = (Framing::default(), bytes);
    while !rest.is_empty() {
        let (piece, others) = rest.split_at(rng.usize(1..=rest.len()));
        whole.pass(piece, ALL).expect("it has passed byte by byte");
        rest = others;
    }
    assert_eq!(format!("{whole:?}"), format!("{framing:?}"), "{:?}", bytes.escape_ascii().to_string());
    Parsed { ends, failed: false }
}

/// Appends one well-formed value.
fn push_value(bytes: &mut Vec<u8>, depth: usize, rng: &mut Rng) {
    let line = |bytes: &mut Vec<u8>, text: &str| bytes.extend_from_slice(format!("{text}\r\n").as_bytes());
    let kinds = if depth == 0 { 10 } else { 15 };
    let parts = rng.usize(0..4);
    match rng.usize(0..kinds) {
        0 => line(bytes, "+OK"),
        1 => line(bytes, "-ERR a \n b \r c"),
        2 => line(bytes, &format!(":{}", rng.i64(..))),
        3 => line(bytes, ",-1.5e3"),
        4 => line(bytes, "#t"),
        5 => line(bytes, "_"),
        6 => line(bytes, "(123456789012345678901234567890"),
        7 => line(bytes, rng.choice(["$-1", "*-1", "~-1", ":  +7\t", "*0", "%0"]).expect("there are some")),
        8 => {
            let text: Vec<u8> = (0..rng.usize(0..12)).map(|_| rng.u8(..)).collect();
            line(bytes, &format!("${}", text.len()));
            bytes.extend_from_slice(&text);
            bytes.extend_from_slice(b"\r\n");
        }
        9 => line(bytes, rng.choice(["=7\r\ntxt:abc", "!5\r\nERR a", "=4\r\ntxt:"]).expect("there are some")),
        10 => push_parts(bytes, '*', parts, parts, depth, rng),
        11 => push_parts(bytes, '~', parts, parts, depth, rng),
        12 => push_parts(bytes, '%', parts, 2 * parts, depth, rng),
        13 => push_parts(bytes, '|', parts, 2 * parts + 1, depth, rng),
        _ => {
            line(bytes, &format!(">{}\r\n+message", parts + 1));
            (0..parts).for_each(|_| push_value(bytes, depth - 1, rng));
        }
    }
}

fn push_parts(bytes: &mut Vec<u8>, kind: char, length: usize, parts: usize, depth: usize, rng: &mut Rng) {
    bytes.extend_from_slice(format!("{kind}{length}\r\n").as_bytes());
    (0..parts).for_each(|_| push_value(bytes, depth - 1, rng));
}

/// Changes some bytes as a broken or hostile server would.
fn spoil(bytes: &mut Vec<u8>, rng: &mut Rng) {
    const HOSTILE: [&[u8]; 16] = [
        b"=-1\r\n",
        b"!-1\r\n",
        b"%-1\r\n",
        b"|-1\r\n",
        b">-1\r\n",
        b">0\r\n",
        b"\n",
        b"\r",
        b"\r\n",
        b"-1",
        b"$4294967296\r\n",
        b"*9223372036854775807\r\n",
        b"%9223372036854775807\r\n",
        b"+",
        b"\xc2\xa01",
        b"\xff",
    ];
    const OTHERS: &[u8] = b"+-:$*%|~>!=,#_(0123456789 \r\ntx\xff";
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(0..=bytes.len());
        match rng.usize(0..4) {
            0 => drop(bytes.splice(at..at, HOSTILE[rng.usize(0..HOSTILE.len())].iter().copied())),
            1 => bytes.truncate(at),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 if at < bytes.len() => bytes[at] = OTHERS[rng.usize(0..OTHERS.len())],
            _ => {}
        }
    }
}

/// Checks that the crate reads what [`Framing`] does not refuse, and finds the same ends.
#[track_caller]
fn compare(bytes: &[u8], rng: &mut Rng) {
    let shown = || bytes.escape_ascii().to_string();
    let (theirs, ours) = (parsed(bytes, 1, rng), framed(bytes, rng));
    if ours.failed {
        // The bytes after a refusal do not reach the crate.
        let same = ours.ends.len().min(theirs.ends.len());
        assert_eq!(ours.ends[..same], theirs.ends[..same], "{}", shown());
        return;
    }
    assert_eq!(ours, theirs, "{}", shown());
    for longest in [3, bytes.len().max(1)] {
        let in_pieces = parsed(bytes, longest, rng);
        assert_eq!((in_pieces.ends.len(), in_pieces.failed), (ours.ends.len(), false), "{}", shown());
    }
}

#[test]
fn both_parsers_agree_on_what_was_found_to_divide_them() {
    let mut rng = Rng::with_seed(1);
    for bytes in [
        "=-1\r\n+OK\r\n",
        "!-1\r\n+OK\r\n",
        "+OK\n+OK\r\n",
        "$5\n*9\r\n!\r\n",
        "$-1\n+OK\r\n",
        "*1\r\n=-1\r\n",
        "$1-\r\na\r\n",
        "$--1\r\n",
        "*1-\r\n",
        ">-1\r\n+OK\r\n",
        "|0\r\n+OK\r\n+OK\r\n",
        "%-1\r\n",
        "x\r\n+OK\r\n",
        "#x\r\n+OK\r\n",
        ",x\r\n+OK\r\n",
        "$5\r\r\nabcde\r\n",
        "$2\r\nabc\r\n+OK\r\n",
        ">1\r\n:1\r\n+OK\r\n",
        ">1\r\n+OK\r\n+OK\r\n",
        ">1\r\n$-1\r\n+OK\r\n",
        ">2\r\n$7\r\nmessage\r\n:1\r\n+OK\r\n",
        "=3\r\nabc\r\n+OK\r\n",
    ] {
        compare(bytes.as_bytes(), &mut rng);
    }
}

/// Replays the seed in STATERA_SEED, if there is one. STATERA_LONG=1 makes twenty times as many rounds.
#[test]
fn both_parsers_agree_on_every_end() {
    let given = std::env::var("STATERA_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| fastrand::u64(..));
    println!("STATERA_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let rounds = if std::env::var_os("STATERA_LONG").is_some() { 100_000 } else { 5_000 };
    for _ in 0..rounds {
        let mut bytes = Vec::new();
        for _ in 0..rng.usize(1..4) {
            push_value(&mut bytes, 4, &mut rng);
        }
        let ours = framed(&bytes, &mut rng);
        assert!(!ours.failed, "well-formed and refused: {:?}", bytes.escape_ascii().to_string());
        compare(&bytes, &mut rng);
        spoil(&mut bytes, &mut rng);
        compare(&bytes, &mut rng);
    }
}
