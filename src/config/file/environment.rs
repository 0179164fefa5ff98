//! Fills in `${NAME}` and `${NAME:-default}` from the environment. This is done after parsing, so that a
//! variable can never add a key.
//!
//! `$$` is a dollar sign. A dollar before any other character than `{` stays as it is. The caller passes
//! the function that looks up a variable.

use super::{Location, Node};
use crate::config::decode::{Problems, escaped, path_of_item, path_of_key};

/// Longer names and defaults are shortened in messages.
const SHOWN_MAX_CHARS: usize = 60;

/// Fills in every key and text below `root`. A value that cannot be filled in becomes [`Node::Broken`],
/// and is reported.
pub(in crate::config) fn fill_in(
    root: &mut Node,
    lookup: &dyn Fn(&str) -> Option<String>,
    problems: &Problems,
) {
    visit(root, String::new(), &mut Vec::new(), &|path, location, text| {
        replaced(text, lookup).map_err(|cure| problems.add(path.to_owned(), location.clone(), cure)).ok()
    });
}

fn visit(
    node: &mut Node,
    path: String,
    location: &mut Location,
    replace: &dyn Fn(&str, &Location, &str) -> Option<String>,
) {
    match node {
        Node::Text(text) if text.contains('$') => {
            *node = replace(&path, location, text).map_or(Node::Broken, Node::Text);
        }
        Node::List(items) => {
            for (position, item) in items.iter_mut().enumerate() {
                location.push(position);
                visit(item, path_of_item(&path, position), location, replace);
                location.pop();
            }
        }
        Node::Map(entries) => {
            for (position, (key, value)) in entries.iter_mut().enumerate() {
                location.push(position);
                if key.contains('$') {
                    match replace(&path_of_key(&path, key), location, key) {
                        Some(filled) => *key = filled,
                        None => *value = Node::Broken,
                    }
                }
                visit(value, path_of_key(&path, key), location, replace);
                location.pop();
            }
        }
        _ => {}
    }
}

fn replaced(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        filled.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            filled.push('$');
            rest = after;
        } else if let Some(after) = after.strip_prefix('{') {
            let (inside, after) = after
                .split_once('}')
                .ok_or("${ without its }: close it, or write $${ for the characters themselves")?;
            filled.push_str(&value_of(inside, lookup)?);
            rest = after;
        } else {
            filled.push('$');
            rest = after;
        }
    }
    filled.push_str(rest);
    Ok(filled)
}

/// The value for the text between the braces. As in a shell, `:-` gives its default also where the
/// variable is empty.
fn value_of(inside: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.bytes().next().is_some_and(|first| !first.is_ascii_digit());
    if !is_name {
        // Only the part before a default is shown: a default may be a password.
        let name = escaped(name, SHOWN_MAX_CHARS);
        return Err(format!("${{{name}}}: only ${{NAME}} and ${{NAME:-default}} are understood"));
    }
    match (lookup(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => {
            let name = escaped(name, SHOWN_MAX_CHARS);
            Err(format!("${{{name}}}: not set in the environment: set it, or write ${{{name}:-default}}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("10.0.0.1".into()),
            "EMPTY" => Some(String::new()),
            "NESTED" => Some("${HOST}".into()),
            _ => None,
        }
    }

    #[test]
    fn variables_are_filled_in_once() {
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("${HOST}:80", "10.0.0.1:80"),
            ("${HOST}${HOST}", "10.0.0.110.0.0.1"),
            ("${NONE:-x}", "x"),
            ("${NONE:-}", ""),
            ("${NONE:-a:-b}", "a:-b"),
            ("${EMPTY:-x}", "x"),
            ("${EMPTY}", ""),
            ("${HOST:-x}", "10.0.0.1"),
            ("${NESTED}", "${HOST}"),
            ("$${HOST}", "${HOST}"),
            ("$$$$", "$$"),
            ("pa$word$", "pa$word$"),
        ] {
            assert_eq!(replaced(text, &environment).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_filled_in_says_what_to_write() {
        for (text, expected) in [
            ("${NONE}", "${NONE}: not set in the environment: set it, or write ${NONE:-default}"),
            ("${HOST", "${ without its }: close it, or write $${ for the characters themselves"),
            ("${}", "${}: only ${NAME} and ${NAME:-default} are understood"),
            ("${1A}", "${1A}: only ${NAME} and ${NAME:-default} are understood"),
            ("${A?}", "${A?}: only ${NAME} and ${NAME:-default} are understood"),
            ("${A B:-secret}", "${A B}: only ${NAME} and ${NAME:-default} are understood"),
            ("${\u{1b}[31m}", "${\\u{1b}[31m}: only ${NAME} and ${NAME:-default} are understood"),
        ] {
            assert_eq!(replaced(text, &environment), Err(expected.to_owned()), "{text}");
        }
    }
}
