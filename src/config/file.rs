//! Reads config.yaml into a tree that still knows every key, and finds the line of any place in it.
//!
//! Refuses what is no YAML document of a sane size; whether a key or a value makes sense is for `check.rs`. Duplicate
//! keys are kept, in order, so that they can be reported: a typed map would silently keep the last one.
//! Next: `environment.rs` fills in `${NAME}`, `decode.rs` takes values out of the tree.

pub(super) mod environment;
mod line;
mod node;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeSeed;

use line::FailAt;
pub(super) use node::Node;

use super::decode::escaped;

/// About 20,000 pools. The parser needs memory for every event of the whole file at once.
const FILE_MAX_BYTES: usize = 1024 * 1024;
/// Deeper than any key of the contract, shallower than the parser's own 128 levels would ever matter.
/// The parser looks at every open bracket again for each token: 200,000 of them took 5.7 s.
const OPEN_BRACKETS_MAX: usize = 300;
/// A message of the parser is one sentence; a key it quotes may be of any length.
const PARSER_MESSAGE_MAX_CHARS: usize = 200;

/// What was written, before anybody asked what it means.
#[derive(Debug)]
pub(super) struct ConfigFile {
    /// Kept to find lines in, see [`ConfigFile::line_of`].
    text: String,
    /// Always a [`Node::Map`] with at least one key.
    pub(super) root: Node,
}

/// A place in the tree: at each level the position among the siblings, so that duplicate keys stay apart. Places compare
/// in the order of the file.
pub(super) type Location = Vec<usize>;

/// No YAML document could be had. The message names the file and the cure.
#[derive(Debug, thiserror::Error)]
#[error("{}{reason}", .path.as_ref().map(|path| format!("{}: ", escaped(&path.to_string_lossy(), 4096))).unwrap_or_default())]
pub struct Unreadable {
    path: Option<PathBuf>,
    reason: String,
}

impl Unreadable {
    fn because(reason: impl Into<String>) -> Self {
        Self { path: None, reason: reason.into() }
    }
}

impl ConfigFile {
    /// # Errors
    /// A file that cannot be read or is no YAML document of a sane size.
    pub(super) fn read(path: &Path) -> Result<Self, Unreadable> {
        let named = |error: Unreadable| Unreadable { path: Some(path.to_owned()), ..error };
        let bytes = read_bytes(path).map_err(|error| named(Unreadable::because(cure_for(&error))))?;
        if bytes.len() > FILE_MAX_BYTES {
            return Err(named(too_large()));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = 1 + error.as_bytes()[..valid].iter().filter(|&&byte| byte == b'\n').count();
            named(Unreadable::because(format!("line {line} is not UTF-8: save the file as UTF-8")))
        })?;
        Self::parse(text).map_err(named)
    }

    /// # Errors
    /// A text that is no YAML document of a sane size, or one without keys.
    pub(super) fn parse(text: impl Into<String>) -> Result<Self, Unreadable> {
        let mut text = text.into();
        // Some editors put a byte order mark in front, which the parser takes for a document of its own.
        if text.starts_with('\u{feff}') {
            text.remove(0);
        }
        if text.len() > FILE_MAX_BYTES {
            return Err(too_large());
        }
        if let Some(line) = line_nested_too_deeply(&text) {
            return Err(Unreadable::because(format!(
                "line {line}: more than {OPEN_BRACKETS_MAX} brackets are open: close them"
            )));
        }
        let parsed = Node::from_document(serde_yaml::Deserializer::from_str(&text));
        let root = parsed.map_err(|error| Unreadable::because(parser_message(&error, &text)))?;
        let kind = match &root {
            Node::Map(entries) if !entries.is_empty() => return Ok(Self { text, root }),
            Node::Null | Node::Map(_) => "it is empty",
            Node::List(_) => "it is a list",
            _ => "it is a single value",
        };
        Err(Unreadable::because(format!("{kind}: write at least the keys listeners and pools")))
    }

    /// In bytes: what one [`ConfigFile::line_of`] parses.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    /// The line of the key or list item at `place`, counted from 1. Costs one more parse of the file: serde_yaml tells
    /// lines only in its errors, so one is provoked there.
    pub(super) fn line_of(&self, location: &[usize]) -> Option<usize> {
        if location.is_empty() {
            return None;
        }
        let error = FailAt(location).deserialize(serde_yaml::Deserializer::from_str(&self.text)).err()?;
        error.location().map(|location| location.line())
    }
}

fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than allowed shows that there are more, also where no length is known (a pipe).
    let limit = FILE_MAX_BYTES as u64 + 1;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn cure_for(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file: name the config with -c FILE".into(),
        io::ErrorKind::IsADirectory => "it is a directory: name the file in it".into(),
        io::ErrorKind::PermissionDenied => "no permission to read it: let this user read the file".into(),
        _ => format!("it cannot be read: {error}"),
    }
}

fn too_large() -> Unreadable {
    Unreadable::because("it is larger than 1 MiB: is this the config?")
}

fn parser_message(error: &serde_yaml::Error, text: &str) -> String {
    let message = error.to_string();
    // The two that an operator can meet without a typing mistake, and that carry no cure.
    if message.starts_with("deserializing from YAML containing more than one document") {
        return "it holds more than one YAML document: keep one, without a second ---".into();
    }
    if message.starts_with("repetition limit exceeded") {
        return "its aliases repeat too much: write the values out".into();
    }
    // The parser quotes the value, which may be a password: `password: !!int …`.
    if message.contains("invalid value: ") {
        let line = error.location().map_or(1, |location| location.line());
        return format!("line {line}: the tag does not fit its value: remove the tag");
    }
    let said = escaped(&message, PARSER_MESSAGE_MAX_CHARS);
    match syntax_cure(&message, error, text) {
        Some(cure) => format!("not valid YAML: {said}: {cure}"),
        None => format!("not valid YAML: {said}"),
    }
}

/// The parser says where it gave up, not what people get wrong. The line itself is not shown: it may hold a password.
fn syntax_cure(message: &str, error: &serde_yaml::Error, text: &str) -> Option<&'static str> {
    if message.starts_with("unknown anchor") {
        return Some("put a text that begins with * in quotes");
    }
    let of_scanner = ["did not find", "could not find", "not allowed", "cannot start any token"];
    if !of_scanner.iter().any(|words| message.contains(words)) {
        return None;
    }
    let number = error.location().map_or(0, |location| location.line());
    let line = text.lines().nth(number.saturating_sub(1)).unwrap_or_default();
    Some(if line.chars().take_while(|c| c.is_whitespace()).any(|c| c == '\t') {
        "indent with spaces, not with a tab"
    } else if line.contains(": [:") {
        "put an IPv6 address in quotes"
    } else {
        "look at the indentation, quotes and colons there and just before"
    })
}

/// Counts brackets without knowing of quotes and comments, where people close what they open, too.
fn line_nested_too_deeply(text: &str) -> Option<usize> {
    let (mut line, mut open) = (1, 0usize);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            b'\n' => line += 1,
            _ => {}
        }
        if open > OPEN_BRACKETS_MAX {
            return Some(line);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_its_line() {
        let text = "# comment\na: 1\nb:\n  c: [x,\n    y]\n  d: &d {e: 2}\na: 3\nf:\n  - *d\n  - - z\n\"k\\n\": |\n  x\n  y\nl: 4\n";
        let file = ConfigFile::parse(text).unwrap();
        for (location, line) in [
            (vec![0], 2),
            (vec![1], 3),
            (vec![1, 0], 4),
            (vec![1, 0, 0], 4),
            (vec![1, 0, 1], 5),
            (vec![1, 1, 0], 6),
            // The second `a`.
            (vec![2], 7),
            // Behind an alias, the line is where the value was written.
            (vec![3, 0, 0], 6),
            (vec![3, 1, 0], 10),
            (vec![4], 11),
            (vec![5], 14),
        ] {
            assert_eq!(file.line_of(&location), Some(line), "{location:?}");
        }
        assert_eq!(file.line_of(&[]), None);
    }

    #[test]
    fn duplicate_keys_are_kept_and_keys_are_texts() {
        let file = ConfigFile::parse("on: yes\n80: 0x10\n~: ~\non: .inf\nbig: 1e3").unwrap();
        let entries = [
            ("on", Node::Text("yes".into())),
            ("80", Node::Integer(16)),
            ("~", Node::Null),
            ("on", Node::Float(f64::INFINITY)),
            ("big", Node::Float(1000.0)),
        ];
        assert_eq!(file.root, Node::Map(entries.map(|(key, node)| (key.to_owned(), node)).into()));
    }
}
