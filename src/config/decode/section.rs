//! A map of the config: the keys that it may have, and the keys that are written.
//!
//! Duplicate, unknown, unsupported, empty and wrongly indented keys are reported once, when the section
//! is opened. `value.rs` reads the values.

use std::collections::{HashMap, HashSet};

use super::{Field, Found, Message, Node, path_of_key, suggest};

/// The keys that a section may have.
#[derive(Clone, Copy)]
pub(in crate::config) struct Keys {
    /// The keys that this version reads.
    pub(in crate::config) now: &'static [&'static str],
    /// Keys of the contract that no code reads yet. They are refused, because a setting that is ignored
    /// would be worse.
    pub(in crate::config) later: &'static [&'static str],
    /// The section as it may be written, for a message: `{timeout: 10m}`.
    pub(in crate::config) example: &'static str,
    /// The key that a value of this kind was meant for, where that value was written instead of the section.
    pub(in crate::config) meant: &'static [(Kind, &'static str)],
}

/// What a single value reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum Kind {
    /// `true` or `false`
    Flag,
    /// `10`
    Number,
    /// `10m`
    Duration,
    /// Anything else.
    Text,
}

/// A map whose keys have been checked. Its values are read by the caller.
pub(in crate::config) struct Section<'a> {
    field: Field<'a>,
    entries: &'a [(String, Node)],
    /// Positions of entries that belong one level deeper, and of the names that they belong under:
    /// reported already.
    misplaced: HashSet<usize>,
}

impl<'a> Section<'a> {
    /// Opens a map whose keys are names that the operator chose, each of them a section with the keys
    /// `inner`.
    pub(in crate::config) fn open_named(field: Field<'a>, inner: Keys, example: &str) -> Self {
        let mut section = Self::open_map(field, example);
        section.report_misplaced(inner);
        section.report_duplicates();
        section.report_empty();
        section
    }

    /// Opens a map whose keys are names with single values.
    pub(in crate::config) fn open_values(field: Field<'a>, example: &str) -> Self {
        let section = Self::open_map(field, example);
        section.report_duplicates();
        section.report_empty();
        section
    }

    /// Opens a map that may have only `keys`.
    pub(in crate::config) fn open(field: Field<'a>, keys: Keys) -> Self {
        if let Some(cure) = field.meant_for(keys) {
            field.refuse(cure);
            return Self { field, entries: &[], misplaced: HashSet::new() };
        }
        let mut section = Self::open_map(field, keys.example);
        let entries = section.entries;
        let misplaced = section.misplaced_below(keys);
        section.misplaced = misplaced.iter().flat_map(|(key, empty)| [*key, *empty]).collect();
        section.report_duplicates();
        for (position, (key, node)) in entries.iter().enumerate() {
            let entry = section.field.entry(position, key, node);
            if keys.later.contains(&key.as_str()) {
                entry.refuse_unshown("not supported yet: remove it");
            } else if let Some(&empty) = misplaced.get(&position) {
                let under = path_of_key(&section.field.path, &entries[empty].0);
                entry.refuse_unshown(format!("unknown key here: if it belongs under {under}, indent it"));
            } else if !keys.now.contains(&key.as_str()) {
                entry.refuse_unshown(unknown_key(key, keys));
            }
        }
        section.report_empty();
        section
    }

    fn open_map(field: Field<'a>, example: &str) -> Self {
        let entries = match field.node {
            Node::Map(entries) => entries.as_slice(),
            Node::Broken => &[],
            _ => {
                field.refuse(format_args!("a map is needed, like {example}"));
                &[]
            }
        };
        Self { field, entries, misplaced: HashSet::new() }
    }

    /// Positions of unknown keys that follow a key without a value, with the position of that key: they
    /// probably belong under it, and their indentation is missing.
    fn misplaced_below(&self, keys: Keys) -> HashMap<usize, usize> {
        let mut misplaced = HashMap::new();
        let mut empty = None;
        for (position, (key, node)) in self.entries.iter().enumerate() {
            if keys.now.contains(&key.as_str()) {
                empty = matches!(node, Node::Null).then_some(position);
            } else if let Some(empty) = empty
                && !keys.later.contains(&key.as_str())
                && suggest::misspelt(key, keys.now).is_none()
            {
                misplaced.insert(position, empty);
            }
        }
        misplaced
    }

    /// Reports keys without a value.
    fn report_empty(&self) {
        for (position, (key, node)) in self.entries.iter().enumerate() {
            if matches!(node, Node::Null) && !self.misplaced.contains(&position) {
                let empty = self.field.entry(position, key, node);
                empty.refuse_unshown("nothing is written under it: write a value, or remove the key");
            }
        }
    }

    /// Reports keys of `inner` that are written beside the name they belong under: their indentation is
    /// missing.
    fn report_misplaced(&mut self, inner: Keys) {
        let mut name: Option<(usize, &str)> = None;
        for (position, (key, node)) in self.entries.iter().enumerate() {
            let follows_empty = name.is_some_and(|(name, _)| matches!(self.entries[name].1, Node::Null));
            let is_inner = inner.now.contains(&key.as_str()) || inner.later.contains(&key.as_str());
            // A pool may be called `backends`. Its value is a map then, and no name without a value is
            // before it.
            if !is_inner || (matches!(node, Node::Map(_)) && !follows_empty) {
                name = Some((position, key));
                continue;
            }
            let entry = self.field.entry(position, key, node);
            self.misplaced.insert(position);
            match name {
                Some((name, key)) => {
                    self.misplaced.insert(name);
                    let under = path_of_key(&self.field.path, key);
                    entry.refuse_unshown(format!("indent it: it belongs under {under}"));
                }
                None => entry.refuse_unshown(
                    "a name is missing above it: write one, like web, and indent this key under it",
                ),
            }
        }
    }

    /// Opens the section under `key`. A section that is left out is opened as an empty one, so that its
    /// defaults are written once.
    pub(in crate::config) fn section(&self, key: &str, keys: Keys) -> Self {
        match self.field(key) {
            Some(field) => Self::open(field, keys),
            None => Self {
                field: self.field.child(path_of_key(&self.field.path, key), 0, self.field.node),
                entries: &[],
                misplaced: HashSet::new(),
            },
        }
    }

    /// The value under `key`. `None` where it is left out, or was reported already.
    pub(in crate::config) fn field(&self, key: &str) -> Option<Field<'a>> {
        let position = self.entries.iter().position(|(name, _)| name == key)?;
        let field = self.field.entry(position, key, &self.entries[position].1);
        field.is_usable().then_some(field)
    }

    /// Whether `key` is written, with a right or a wrong value.
    pub(in crate::config) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(name, _)| name == key)
    }

    /// Every entry with a value, in the order of the file. Of duplicate keys only the first is returned.
    pub(in crate::config) fn entries(&self) -> impl Iterator<Item = (&'a str, Field<'a>)> {
        let mut seen = HashSet::new();
        let entries = self.entries.iter().enumerate();
        entries.filter(|(position, _)| !self.misplaced.contains(position)).filter_map(
            move |(position, (key, node))| {
                let field = self.field.entry(position, key, node);
                (seen.insert(key.as_str()) && field.is_usable()).then_some((key.as_str(), field))
            },
        )
    }

    /// Whether the section has no key at all.
    pub(in crate::config) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The section itself as a value.
    pub(in crate::config) fn whole(&self) -> &Field<'a> {
        &self.field
    }

    fn report_duplicates(&self) {
        let mut first_positions = HashMap::new();
        for (position, (key, node)) in self.entries.iter().enumerate() {
            if self.misplaced.contains(&position) {
                continue;
            }
            let Some(&first) = first_positions.get(key.as_str()) else {
                first_positions.insert(key.as_str(), position);
                continue;
            };
            let Field { path, location, problems, .. } = self.field.entry(position, key, node);
            let first = self.field.entry(first, key, node).location;
            problems.push(Found { path, location, message: Message::Twice { first } });
        }
    }
}

impl<'a> Field<'a> {
    /// Whether the value is a map.
    pub(in crate::config) fn is_map(&self) -> bool {
        matches!(self.node, Node::Map(_))
    }

    /// The first item of a list, or the value itself, where that is a text.
    pub(in crate::config) fn first_text(&self) -> Option<&'a str> {
        match self.node {
            Node::List(items) => items.first(),
            node => Some(node),
        }
        .and_then(|node| if let Node::Text(text) = node { Some(text.as_str()) } else { None })
    }

    /// The keys of a map, also those with wrong values.
    pub(in crate::config) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let entries = if let Node::Map(entries) = self.node { entries.as_slice() } else { &[] };
        entries.iter().map(|(key, _)| key.as_str())
    }

    /// The cure where a single value was written instead of the section: the section with the key that
    /// was meant.
    fn meant_for(&self, keys: Keys) -> Option<String> {
        let (_, key) = keys.meant.iter().find(|(kind, _)| Some(*kind) == self.kind())?;
        let section = self.path.rsplit('.').next().unwrap_or_default();
        Some(format!("a map is needed: write {section}: {{{key}: {}}}", self.quoted()))
    }

    fn is_usable(&self) -> bool {
        !matches!(self.node, Node::Null | Node::Broken)
    }
}

fn unknown_key(key: &str, keys: Keys) -> String {
    if key == "<<" {
        return "merge keys are not understood: write the values out".to_owned();
    }
    match suggest::misspelt(key, keys.now).or_else(|| suggest::foreign(key, keys.now)) {
        Some(known) => format!("unknown key: did you mean {known}?"),
        None => format!("unknown key: known here are {}", keys.now.join(", ")),
    }
}
