//! Texts from Redis as a terminal may show them.

use std::fmt::Write as _;

use serde_json::Value;

/// Characters: a host name has 253 at most, and what is longer is no backend.
const LONGEST_WORD: usize = 300;

/// What does not print as itself is written as its escape.
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

/// The same on one line.
pub(super) fn word(text: &str) -> String {
    let mut word = printable(text).replace('\n', "\\n");
    if let Some((end, _)) = word.char_indices().nth(LONGEST_WORD) {
        word.truncate(end);
        let _ = write!(word, "… ({} bytes)", text.len());
    }
    word
}

/// JSON, with \u escapes for what a terminal might act on (C1 controls, text that runs backwards): those characters stand
/// in texts only.
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
    fn nothing_that_stands_in_redis_reaches_a_terminal_raw() {
        let hostile = "a\x1b[2J\u{9b}31m\u{202e}\x7f\n\t";
        for text in [word(hostile), json_text(&json!({ hostile: hostile }))] {
            let raw = text.trim_end().chars().find(|c| c.is_control() || *c == '\u{202e}');
            assert_eq!(raw, None, "{text:?}");
        }
        let back: Value = serde_json::from_str(&json_text(&json!([hostile, "ü\u{1f600}"]))).expect("JSON");
        assert_eq!(back, json!([hostile, "ü\u{1f600}"]), "it still says the same");
    }
}
