//! Takes values out of the tree, and collects every problem on the way, so that one run shows all of
//! them.
//!
//! A reader that finds a wrong value reports it and returns the default, so that the caller can look for
//! more problems. The config is refused at the end where there is any problem. This file knows kinds of
//! values; the keys are in `check.rs` and below `check/`. Messages shorten values and escape control
//! characters. Secrets are never shown.

mod section;
mod suggest;
mod value;

pub(super) use section::{Keys, Kind, Section};

use std::cell::{Cell, RefCell};
use std::fmt;

use super::file::{ConfigFile, Location, Node};

/// More problems are counted, not listed: finding the line of each costs one more parse of the file.
const PROBLEMS_SHOWN: usize = 50;
/// More problems are counted, not kept. More than `PROBLEMS_SHOWN`, since problems are not found in the
/// order of the file, and the first ones of the file are to be shown.
const PROBLEMS_KEPT: usize = 1000;
/// How many bytes may be parsed again to find lines. That is enough for all 50 problems in a file of 400
/// kB, and for the first 20 in the largest file; it takes a second or two.
const REPARSED_MAX_BYTES: usize = 20 * 1024 * 1024;
const VALUE_MAX_CHARS: usize = 60;
/// Stands for a value that may hold a password.
const HIDDEN: &str = "…";

/// One thing that is wrong with a config. Displays as `path: value: cure (line N)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path of the key, like `pools.web.connect.attempts` or `listeners.web.bind[1]`.
    pub path: String,
    /// The line, counted from 1. `None` where a key of the top level is missing, and in very large files.
    pub line: Option<usize>,
    /// The value, if it may be shown, and the cure.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)?;
        self.line.map_or(Ok(()), |line| write!(f, " (line {line})"))
    }
}

/// Collects problems while the tree is read.
#[derive(Default)]
pub(super) struct Problems {
    found: RefCell<Vec<Found>>,
    uncounted: Cell<usize>,
    /// Settings that are valid but most likely a mistake.
    warnings: RefCell<Vec<Found>>,
}

struct Found {
    path: String,
    location: Location,
    message: Message,
}

enum Message {
    Plain(String),
    /// A key that is written twice. The message names the line of the first one.
    Twice {
        first: Location,
    },
}

impl Problems {
    /// Reports `message` (value and cure) for `path`.
    pub(super) fn add(&self, path: String, location: Location, message: impl Into<String>) {
        self.push(Found { path, location, message: Message::Plain(message.into()) });
    }

    fn push(&self, found: Found) {
        let mut kept = self.found.borrow_mut();
        if kept.len() < PROBLEMS_KEPT {
            kept.push(found);
        } else {
            self.uncounted.set(self.uncounted.get() + 1);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.borrow().is_empty()
    }

    /// Returns the first 50 problems in the order of the file, with their lines, and how many more there are.
    pub(super) fn finish(self, file: &ConfigFile) -> (Vec<Problem>, usize) {
        let (problems, more) = Self::locate(self.found.into_inner(), file);
        (problems, more + self.uncounted.get())
    }

    /// Returns the first 50 warnings in the order of the file, with their lines, and how many more there are.
    pub(super) fn finish_warnings(self, file: &ConfigFile) -> (Vec<Problem>, usize) {
        Self::locate(self.warnings.into_inner(), file)
    }

    fn locate(mut found: Vec<Found>, file: &ConfigFile) -> (Vec<Problem>, usize) {
        found.sort_by(|a, b| a.location.cmp(&b.location));
        let more = found.len().saturating_sub(PROBLEMS_SHOWN);
        found.truncate(PROBLEMS_SHOWN);
        let mut lookups = REPARSED_MAX_BYTES / file.len().max(1);
        let mut line_of = |location: &Location| {
            lookups = lookups.checked_sub(1)?;
            file.line_of(location)
        };
        let located = found.into_iter().map(|Found { path, location, message }| {
            let line = line_of(&location);
            let message = match message {
                Message::Plain(text) => text,
                Message::Twice { first } => match line_of(&first) {
                    Some(line) => format!("written twice, first on line {line}: keep one of them"),
                    None => "written twice: keep one of them".to_owned(),
                },
            };
            Problem { path, line, message }
        });
        (located.collect(), more)
    }
}

/// One value, with its path and its location in the file.
#[derive(Clone)]
pub(super) struct Field<'a> {
    node: &'a Node,
    path: String,
    location: Location,
    problems: &'a Problems,
}

impl<'a> Field<'a> {
    /// The top of the tree.
    pub(super) fn root(node: &'a Node, problems: &'a Problems) -> Self {
        Self { node, path: String::new(), location: Location::new(), problems }
    }

    /// The path as messages show it.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Reports this value with its cure.
    pub(super) fn refuse(&self, cure: impl fmt::Display) {
        self.refuse_unshown(format!("{}: {cure}", self.shown()));
    }

    /// Reports a problem without showing the value: for secrets, and for missing keys.
    pub(super) fn refuse_unshown(&self, message: impl Into<String>) {
        self.problems.add(self.path.clone(), self.location.clone(), message);
    }

    /// Warns of this value: it is valid, but most likely a mistake.
    pub(super) fn warn(&self, cure: impl fmt::Display) {
        self.warn_unshown(format!("{}: {cure}", self.shown()));
    }

    /// Warns without showing the value.
    pub(super) fn warn_unshown(&self, message: impl Into<String>) {
        let (path, location) = (self.path.clone(), self.location.clone());
        let message = Message::Plain(message.into());
        self.problems.warnings.borrow_mut().push(Found { path, location, message });
    }

    /// Reports that `key` is missing below this value.
    pub(super) fn miss(&self, key: &str, cure: impl Into<String>) {
        self.problems.add(path_of_key(&self.path, key), self.location.clone(), cure);
    }

    fn shown(&self) -> String {
        match self.node {
            Node::Null | Node::Broken => "nothing".to_owned(),
            Node::Bool(value) => value.to_string(),
            Node::Integer(value) => value.to_string(),
            Node::Float(value) => value.to_string(),
            Node::Text(text) if text.is_empty() => "\"\"".to_owned(),
            // A URL with credentials, which may have been written under any key.
            Node::Text(text) if text.contains("://") && text.contains('@') => HIDDEN.to_owned(),
            Node::Text(text) => escaped(text, VALUE_MAX_CHARS),
            Node::List(_) => "a list".to_owned(),
            Node::Map(_) => "a map".to_owned(),
        }
    }

    fn item(&self, position: usize, node: &'a Node) -> Self {
        self.child(path_of_item(&self.path, position), position, node)
    }

    fn entry(&self, position: usize, key: &str, node: &'a Node) -> Self {
        self.child(path_of_key(&self.path, key), position, node)
    }

    fn child(&self, path: String, position: usize, node: &'a Node) -> Self {
        let mut location = self.location.clone();
        location.push(position);
        Self { node, path, location, problems: self.problems }
    }
}

pub(super) fn path_of_item(parent: &str, position: usize) -> String {
    format!("{parent}[{position}]")
}

/// The path of `key` below `parent`. Keys that would make it ambiguous, like addresses, are put in
/// brackets and quotes.
pub(super) fn path_of_key(parent: &str, key: &str) -> String {
    let is_plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if !is_plain || key.len() > VALUE_MAX_CHARS {
        return format!("{parent}[\"{}\"]", escaped(key, VALUE_MAX_CHARS));
    }
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

/// `text` as it may be written to a terminal or a log: at most `max_chars` of it, with characters escaped
/// that move the cursor or change the reading direction.
pub(super) fn escaped(text: &str, max_chars: usize) -> String {
    let mut shown = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == max_chars {
            shown.push('…');
            break;
        }
        match character {
            '"' | '\'' | '\\' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    shown
}
