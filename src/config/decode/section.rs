//! A map of the config: which keys it may have, and which of them are there.
//!
//! Duplicate, unknown, unsupported and empty keys are reported when the section is opened, once. Values are read by
//! `value.rs`.

use super::{Field, Found, Message, Node, escaped, path_of_key};

/// A typing mistake is rarely more than two letters.
const TYPO_MAX_EDITS: usize = 2;
const KEY_MAX_CHARS: usize = 60;

/// The keys a section may have.
#[derive(Clone, Copy)]
pub(in crate::config) struct Keys {
    /// Read by this version.
    pub(in crate::config) now: &'static [&'static str],
    /// In the contract, but in no code yet: refused, because a setting that is ignored would be worse.
    pub(in crate::config) later: &'static [&'static str],
}

/// A map that was opened: its keys are reported on, its values are not read yet.
pub(in crate::config) struct Section<'a> {
    field: Field<'a>,
    entries: &'a [(String, Node)],
}

impl<'a> Section<'a> {
    /// Opens a map whose keys are names that the operator chose.
    pub(in crate::config) fn open_named(field: Field<'a>) -> Self {
        let entries = match field.node {
            Node::Map(entries) => entries.as_slice(),
            Node::Broken => &[],
            _ => {
                field.refuse("a map is needed, like key: value");
                &[]
            }
        };
        let section = Self { field, entries };
        section.report_duplicates();
        for (position, (key, node)) in entries.iter().enumerate() {
            if matches!(node, Node::Null) {
                let empty = section.field.entry(position, key, node);
                empty.refuse_unshown("nothing is written under it: write a value, or remove the key");
            }
        }
        section
    }

    /// Opens a map that may have only `keys`.
    pub(in crate::config) fn open(field: Field<'a>, keys: Keys) -> Self {
        let section = Self::open_named(field);
        for (position, (key, node)) in section.entries.iter().enumerate() {
            let entry = section.field.entry(position, key, node);
            if keys.later.contains(&key.as_str()) {
                entry.refuse_unshown("not supported yet: remove it");
            } else if !keys.now.contains(&key.as_str()) {
                entry.refuse_unshown(unknown_key(key, keys));
            }
        }
        section
    }

    /// Opens the section under `key`; where it is left out, one without entries, so that every default is in one place.
    pub(in crate::config) fn section(&self, key: &str, keys: Keys) -> Self {
        match self.field(key) {
            Some(field) => Self::open(field, keys),
            None => Self {
                field: self.field.child(path_of_key(&self.field.path, key), 0, self.field.node),
                entries: &[],
            },
        }
    }

    /// The value under `key`, unless it is left out or was reported already.
    pub(in crate::config) fn field(&self, key: &str) -> Option<Field<'a>> {
        let position = self.entries.iter().position(|(name, _)| name == key)?;
        let field = self.field.entry(position, key, &self.entries[position].1);
        field.is_usable().then_some(field)
    }

    /// Is `key` written, be it right or wrong?
    pub(in crate::config) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(name, _)| name == key)
    }

    /// Every entry with a value, in the order of the file; of duplicates the first.
    pub(in crate::config) fn entries(&self) -> impl Iterator<Item = (&'a str, Field<'a>)> {
        let mut seen = std::collections::HashSet::new();
        let entries = self.entries.iter().enumerate();
        entries.filter_map(move |(position, (key, node))| {
            let field = self.field.entry(position, key, node);
            (seen.insert(key.as_str()) && field.is_usable()).then_some((key.as_str(), field))
        })
    }

    /// No key at all.
    pub(in crate::config) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where the section itself stands.
    pub(in crate::config) fn whole(&self) -> &Field<'a> {
        &self.field
    }

    fn report_duplicates(&self) {
        let mut first_positions = std::collections::HashMap::new();
        for (position, (key, node)) in self.entries.iter().enumerate() {
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
    /// A value of the right kind for [`Section`].
    pub(in crate::config) fn is_map(&self) -> bool {
        matches!(self.node, Node::Map(_))
    }

    /// The keys of a map, however wrong their values.
    pub(in crate::config) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let entries = if let Node::Map(entries) = self.node { entries.as_slice() } else { &[] };
        entries.iter().map(|(key, _)| key.as_str())
    }

    fn is_usable(&self) -> bool {
        !matches!(self.node, Node::Null | Node::Broken)
    }
}

fn unknown_key(key: &str, keys: Keys) -> String {
    if key == "<<" {
        return "merge keys are not understood: write the values out".to_owned();
    }
    let near = |known: &&&str| edits(key, known) <= TYPO_MAX_EDITS.min(known.len() / 2);
    match keys.now.iter().filter(near).min_by_key(|known| edits(key, known)) {
        Some(known) => format!("unknown key: did you mean {}?", escaped(known, KEY_MAX_CHARS)),
        None => format!("unknown key: known here are {}", keys.now.join(", ")),
    }
}

/// Levenshtein's distance. A key far longer than any known one is not compared, so the cost stays small.
fn edits(a: &str, b: &str) -> usize {
    if a.len() > KEY_MAX_CHARS {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a_char) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b_char) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a_char != b_char);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_key_is_recognised() {
        let keys = Keys { now: &["bind", "pool"], later: &[] };
        assert_eq!(unknown_key("bnid", keys), "unknown key: did you mean bind?");
        assert_eq!(unknown_key("pools", keys), "unknown key: did you mean pool?");
        assert_eq!(unknown_key("weights", keys), "unknown key: known here are bind, pool");
        assert_eq!(unknown_key(&"x".repeat(100_000), keys), "unknown key: known here are bind, pool");
        assert_eq!((edits("", "abc"), edits("kitten", "sitting"), edits("same", "same")), (3, 3, 0));
    }
}
