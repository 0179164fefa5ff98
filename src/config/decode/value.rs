//! Reads one value: a number, a text, a duration, or one of a few words.
//!
//! A text is accepted where it reads as the kind that is needed, since `attempts: ${ATTEMPTS}` is a text
//! after the variables are filled in. A number is not accepted as a text, since YAML reads `0x10` and
//! `1_000` in its own way.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::section::Kind;
use super::{Field, HIDDEN, Node, Section, suggest};

/// Longer than any use needs, and far too short to overflow `Instant + Duration`.
const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

impl<'a> Field<'a> {
    /// Reads a text, which may be empty.
    pub(in crate::config) fn text(&self) -> Option<&'a str> {
        self.text_or(|| self.refuse("a text is needed: put it in quotes"))
    }

    /// Reads a text that messages do not show. It may be empty.
    pub(in crate::config) fn secret(&self) -> Option<&'a str> {
        self.text_or(|| self.refuse_unshown("a text is needed: put it in quotes"))
    }

    fn text_or(&self, refuse: impl FnOnce()) -> Option<&'a str> {
        match self.node {
            Node::Text(text) => Some(text),
            Node::Broken => None,
            _ => {
                refuse();
                None
            }
        }
    }

    /// Whether the value is exactly this text.
    pub(in crate::config) fn is_text(&self, text: &str) -> bool {
        matches!(self.node, Node::Text(found) if found == text)
    }

    /// Whether the value is the boolean `flag`.
    pub(in crate::config) fn is_flag(&self, flag: bool) -> bool {
        matches!(self.node, Node::Bool(found) if *found == flag)
    }

    /// Whether the value is a text that contains `part`.
    pub(in crate::config) fn text_contains(&self, part: &str) -> bool {
        matches!(self.node, Node::Text(found) if found.contains(part))
    }

    /// Whether the value is a whole number, of any size.
    pub(in crate::config) fn reads_as_integer(&self) -> bool {
        match self.node {
            Node::Integer(_) => true,
            Node::Text(text) => !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()),
            _ => false,
        }
    }

    /// What the value reads as; `None` for lists and maps.
    pub(super) fn kind(&self) -> Option<Kind> {
        Some(match self.node {
            Node::Bool(_) => Kind::Flag,
            Node::Integer(_) | Node::Float(_) => Kind::Number,
            Node::Text(text) if parse_duration(text).is_ok() => Kind::Duration,
            Node::Text(_) => Kind::Text,
            Node::Null | Node::Broken | Node::List(_) | Node::Map(_) => return None,
        })
    }

    /// The value as it may be written in YAML, in quotes where it might need them.
    pub(super) fn quoted(&self) -> String {
        let shown = self.shown();
        let is_plain = shown.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-/".contains(&b));
        if is_plain || shown.starts_with('"') || shown == HIDDEN { shown } else { format!("\"{shown}\"") }
    }

    /// The number before a percent sign: `10` of `10%`.
    pub(in crate::config) fn percentage(&self) -> Option<&'a str> {
        let Node::Text(text) = self.node else { return None };
        let number = text.strip_suffix('%')?.trim_end();
        (number.len() <= 20 && number.parse::<f64>().is_ok()).then_some(number)
    }

    /// Reads a whole number in `range`.
    pub(in crate::config) fn integer(&self, range: &RangeInclusive<u64>) -> Option<u64> {
        let value = match self.node {
            Node::Integer(value) => u64::try_from(*value).ok(),
            Node::Text(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
            Node::Broken => return None,
            _ => None,
        };
        if let Some(value) = value.filter(|value| range.contains(value)) {
            return Some(value);
        }
        let (least, most) = (range.start(), range.end());
        match (value, self.node) {
            (None, _) if self.percentage().is_some() => {
                let number = self.percentage().unwrap_or_default();
                self.refuse(format_args!("a number without % is needed: write {number}"));
            }
            (Some(value), _) if value < *least => self.refuse(format_args!("at least {least} is needed")),
            (Some(_), _) => self.refuse(format_args!("at most {most} is possible")),
            (None, Node::Integer(value)) if *value < 0 => {
                self.refuse(format_args!("at least {least} is needed"));
            }
            _ => self.refuse(format_args!("a whole number from {least} to {most} is needed")),
        }
        None
    }

    /// Reads any number, also `.inf` and `.nan`.
    pub(in crate::config) fn number(&self) -> Option<f64> {
        let value = match self.node {
            // Redis keeps weights as floats, too.
            Node::Integer(value) => Some(*value as f64),
            Node::Float(value) => Some(*value),
            Node::Text(text) => text.parse().ok(),
            Node::Broken => return None,
            _ => None,
        };
        if value.is_none() {
            self.refuse("a number is needed");
        }
        value
    }

    /// Reads `true` or `false`.
    pub(in crate::config) fn flag(&self) -> Option<bool> {
        match self.node {
            Node::Bool(value) => return Some(*value),
            Node::Text(text) if text == "true" => return Some(true),
            Node::Text(text) if text == "false" => return Some(false),
            Node::Broken => {}
            _ => self.refuse("true or false is needed"),
        }
        None
    }

    /// Reads a duration in `range`: `150ms`, `5s`, `1h`.
    pub(in crate::config) fn duration(&self, range: &RangeInclusive<Duration>) -> Option<Duration> {
        let text = match self.node {
            Node::Text(text) => text,
            Node::Broken => return None,
            Node::Integer(value) if *value >= 0 => {
                self.refuse(format_args!("a duration needs its unit: write {value}s or {value}ms"));
                return None;
            }
            _ => {
                self.refuse("a duration is needed, like 150ms, 5s or 1h");
                return None;
            }
        };
        match parse_duration(text) {
            Err(cure) => self.refuse(cure),
            Ok(value) if value < *range.start() => {
                let least = humantime::format_duration(*range.start());
                self.refuse(format_args!("at least {least} is needed"));
            }
            Ok(value) if value > DURATION_MAX => self.refuse("at most 365 days are possible"),
            Ok(value) if value > *range.end() => {
                let most = humantime::format_duration(*range.end());
                self.refuse(format_args!("at most {most} is possible"));
            }
            Ok(value) => return Some(value),
        }
        None
    }

    /// Reads one of a few words. `later` has the words of the contract that no code reads yet.
    pub(in crate::config) fn choice<T: Copy>(
        &self,
        choices: &[(&'static str, T)],
        later: &[&str],
    ) -> Option<T> {
        let words: Vec<&'static str> = choices.iter().map(|(word, _)| *word).collect();
        let text = match self.node {
            Node::Text(text) => text.as_str(),
            Node::Broken => return None,
            _ => "",
        };
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let all = words.join(" or ");
        if later.contains(&text) {
            self.refuse(format_args!("not supported yet: write {all}"));
        } else if let Some(meant) = suggest::misspelt(text, &words).or_else(|| suggest::foreign(text, &words))
        {
            self.refuse(format_args!("write {all}: did you mean {meant}?"));
        } else {
            self.refuse(format_args!("write {all}"));
        }
        None
    }

    /// The items of a list; a single value counts as a list of one.
    pub(in crate::config) fn one_or_many(&self) -> Vec<Self> {
        match self.node {
            Node::List(items) => {
                items.iter().enumerate().map(|(position, item)| self.item(position, item)).collect()
            }
            _ => vec![self.clone()],
        }
    }

    /// Reads what `FromStr` accepts. The message of a refusal is `cure`.
    pub(in crate::config) fn parsed<T: std::str::FromStr>(&self, cure: impl Display) -> Option<T> {
        let parsed = self.text_or(|| self.refuse(&cure))?.parse();
        parsed.inspect_err(|_| self.refuse(&cure)).ok()
    }
}

/// Readers for keys that may be left out.
impl Section<'_> {
    /// Reads `true` or `false` under `key`.
    pub(in crate::config) fn flag(&self, key: &str, default: bool) -> bool {
        self.field(key).and_then(|field| field.flag()).unwrap_or(default)
    }

    /// Reads a whole number in `range` under `key`.
    pub(in crate::config) fn integer(&self, key: &str, range: RangeInclusive<u64>, default: u64) -> u64 {
        self.field(key).and_then(|field| field.integer(&range)).unwrap_or(default)
    }

    /// Reads a duration of at least 1 ms.
    pub(in crate::config) fn interval(&self, key: &str, default: Duration) -> Duration {
        self.interval_up_to(DURATION_MAX, key, default)
    }

    /// Reads a duration from 1 ms to `most`.
    pub(in crate::config) fn interval_up_to(&self, most: Duration, key: &str, default: Duration) -> Duration {
        let range = Duration::from_millis(1)..=most;
        self.field(key).and_then(|field| field.duration(&range)).unwrap_or(default)
    }

    /// Reads a duration, which may be zero.
    pub(in crate::config) fn duration(&self, key: &str, default: Duration) -> Duration {
        let range = Duration::ZERO..=DURATION_MAX;
        self.field(key).and_then(|field| field.duration(&range)).unwrap_or(default)
    }

    /// Reads a duration and returns it as a limit. Zero is no limit: `None`.
    pub(in crate::config) fn limit(&self, key: &str, default: Duration) -> Option<Duration> {
        Some(self.duration(key, default)).filter(|limit| !limit.is_zero())
    }

    /// Reads one of a few words under `key`.
    pub(in crate::config) fn choice<T: Copy>(
        &self,
        key: &str,
        choices: &[(&'static str, T)],
        later: &[&str],
        default: T,
    ) -> T {
        self.field(key).and_then(|field| field.choice(choices, later)).unwrap_or(default)
    }
}

fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    // humantime reads `5M` as five months. In this config it means minutes, or is a mistake.
    if text.contains('M') {
        return Err("write minutes as m, like 5m");
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Err("a duration needs its unit: write it like 150ms, 5s or 1h");
    }
    humantime::parse_duration(text).map_err(|_| "a duration is needed, like 150ms, 5s or 1h")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, millis) in [
            ("0s", 0),
            ("150ms", 150),
            ("5s", 5_000),
            ("1.5s", 1_500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("1h 30m", 5_400_000),
            ("365d", 31_536_000_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in [
            "",
            " ",
            "s",
            "-5s",
            "5",
            "0",
            "5.",
            ".5s",
            "1,5s",
            "5x",
            "5M",
            "5s!",
            "99999999999999999999s",
            "∞",
        ] {
            assert!(parse_duration(text).is_err(), "{text} was taken");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_duration_reader_panic(text in ".{0,40}|[0-9.smhdy ]{0,40}") {
            let _ = parse_duration(&text);
        }
    }
}
