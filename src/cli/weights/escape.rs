//! Makes texts from Redis safe for a terminal.

use std::fmt::Write as _;

use serde_json::Value;

/// In characters. A host name has 253 at most, so a longer text is no backend.
const LONGEST_WORD: usize = 300;

/// Returns `text` with every character escaped that does not print as itself. Line ends stay.
pub(super) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '"' | '\'' | '\\' | '\n') {
            safe.push(character);
        } else {
            safe.extend(character.escape_debug());
        }
    }
    safe
}

/// `text` escaped, shortened, and on one line.
pub(super) fn word(text: &str) -> String {
    let mut word = printable(text).replace('\n', "\\n");
    if let Some((end, _)) = word.char_indices().nth(LONGEST_WORD) {
        word.truncate(end);
        let _ = write!(word, "… ({} bytes)", text.len());
    }
    word
}

/// `value` as JSON, with `\u` escapes for characters that a terminal may act on (C1 controls, marks that
/// change the reading direction). In JSON such characters occur only in strings.
pub(super) fn json_text(value: &Value) -> String {
    let mut safe = String::new();
    for character in value.to_string().chars() {
        if character.is_ascii() && character != '\x7f' || character.escape_debug().count() == 1 {
            safe.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                safe += &format!("\\u{unit:04x}");
            }
        }
    }
    safe + "\n"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_text_from_redis_reaches_a_terminal_unescaped() {
        let hostile = "a\x1b[2J\u{9b}31m\u{202e}\x7f\n\t";
        for text in [word(hostile), json_text(&json!({ hostile: hostile }))] {
            let raw = text.trim_end().chars().find(|c| c.is_control() || *c == '\u{202e}');
            assert_eq!(raw, None, "{text:?}");
        }
        let back: Value = serde_json::from_str(&json_text(&json!([hostile, "ü\u{1f600}"]))).expect("JSON");
        assert_eq!(back, json!([hostile, "ü\u{1f600}"]), "the text is the same");
    }
}
