//! Reads config.yaml into a tree that still has every key, and finds the line of any value in it.
//!
//! A file that is too large, or is no YAML document, is refused here; `check.rs` judges keys and values.
//! Duplicate keys are kept in order, so that they can be reported: a typed map would keep the last one
//! without a message. Next: `environment.rs` fills in `${NAME}`, and `decode.rs` takes values out of the
//! tree.

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

/// Enough for about 20,000 pools. The parser keeps every event of the whole file in memory at once.
const FILE_MAX_BYTES: usize = 1024 * 1024;
/// More than any config needs. The parser looks at every open bracket again for each token: 200,000 of
/// them took 5.7 s.
const OPEN_BRACKETS_MAX: usize = 300;
/// A message of the parser is one sentence, but it may quote a key of any length.
const PARSER_MESSAGE_MAX_CHARS: usize = 200;

/// The config as it was written, not yet checked.
#[derive(Debug)]
pub(super) struct ConfigFile {
    /// The text, kept for [`ConfigFile::line_of`].
    text: String,
    /// Always a [`Node::Map`] with at least one key.
    pub(super) root: Node,
}

/// The location of a value in the tree: at each level its position among its siblings, so that duplicate
/// keys have different locations. Locations compare in the order of the file.
pub(super) type Location = Vec<usize>;

/// The file cannot be read, or is no YAML document. The message names the file and the cure.
#[derive(Debug, thiserror::Error)]
#[error("{}{reason}", .path.as_deref().map(shown_before).unwrap_or_default())]
pub struct Unreadable {
    path: Option<PathBuf>,
    reason: String,
}

fn shown_before(path: &Path) -> String {
    format!("{}: ", escaped(&path.to_string_lossy(), 4096))
}

impl Unreadable {
    fn because(reason: impl Into<String>) -> Self {
        Self { path: None, reason: reason.into() }
    }
}

impl ConfigFile {
    /// Reads and parses the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is too large, or is no YAML document with keys.
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

    /// Parses the text of a config.
    ///
    /// # Errors
    /// The text is too large, is no YAML document, or has no keys.
    pub(super) fn parse(text: impl Into<String>) -> Result<Self, Unreadable> {
        let mut text = text.into();
        // Some editors write a byte order mark first, which the parser takes for a document of its own.
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

    /// Returns the length of the text in bytes. Each call of [`ConfigFile::line_of`] may parse all of it.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    /// The line of the key or list item at `location`, counted from 1. This parses the file once more:
    /// serde_yaml reports lines only in its errors, so an error is provoked at the location.
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
    // One byte more than allowed shows that the file is too large, also where its length is unknown (a
    // pipe).
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
    // These two can happen without a typing mistake, and the parser's message has no cure.
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

/// The cure for a frequent syntax error. The parser's message says only where it stopped. The line itself
/// is not shown, since it may contain a password.
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

/// Returns the line where too many brackets are open. Brackets in quotes and comments count, too, since they
/// are most often closed there.
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
    fn every_location_has_its_line() {
        let text = "# comment\na: 1\nb:\n  c: [x,\n    y]\n  d: &d {e: 2}\na: 3\nf:\n  - *d\n  - - z\n\
                    \"k\\n\": |\n  x\n  y\nl: 4\n";
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
