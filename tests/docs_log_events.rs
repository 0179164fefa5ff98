//! `docs/reference/log-events.md` against the log lines in `src/`: each line of level error, warn and info is
//! on the page, and no other.
//!
//! With `STATERA_ACCEPT=1` the page is brought up to date: what is gone is removed, fields are corrected, and
//! what is new is appended, to be described by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const PAGE: &str = "docs/reference/log-events.md";
const UNDESCRIBED: &str = "to be described.";

/// Level and message.
type Event = (String, String);
type Fields = BTreeSet<String>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join("src")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    found
}

/// The arguments of a macro's call, whose opening bracket was read: split at the commas that are in no other
/// bracket.
fn arguments(text: &str) -> Vec<String> {
    let (mut parts, mut depth, mut in_text) = (vec![String::new()], 0_u32, false);
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        let part = parts.last_mut().expect("there is one");
        if in_text {
            part.push(c);
            if c == '\\' {
                part.extend(characters.next());
            }
            in_text = c != '"';
            continue;
        }
        match c {
            ')' if depth == 0 => break,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            '"' => in_text = true,
            _ => {}
        }
        part.push(c);
    }
    parts.iter().map(|part| part.trim().to_owned()).collect()
}

/// The text of a string literal, without its quotes and the escapes that messages have.
fn literal(argument: &str) -> Option<String> {
    let inside = argument.strip_prefix('"')?.strip_suffix('"')?;
    let mut lines = inside.split("\\\n");
    let first = lines.next()?.to_owned();
    Some(lines.fold(first, |text, line| text + line.trim_start()).replace("\\\"", "\""))
}

/// The events of a source, outside of comments and tests.
fn events_of(text: &str, found: &mut BTreeMap<Event, Fields>) {
    let text = text.split("#[cfg(test)]\nmod tests").next().expect("a first part");
    for level in ["error", "warn", "info"] {
        let call = format!("{level}!(");
        for (at, _) in text.match_indices(&call) {
            let line = &text[text[..at].rfind('\n').map_or(0, |end| end + 1)..at];
            let is_name = line.chars().next_back().is_some_and(|c| c.is_alphanumeric() || "_:".contains(c));
            if line.trim_start().starts_with("//") || is_name {
                continue;
            }
            let arguments = arguments(&text[at + call.len()..]);
            let Some(message) = arguments.iter().position(|argument| argument.starts_with('"')) else {
                continue;
            };
            let fields = arguments[..message].iter().map(|field| {
                let name = field.split('=').next().expect("a first part").trim();
                name.trim_start_matches(['%', '?']).to_owned()
            });
            let event = (level.to_owned(), literal(&arguments[message]).expect("a literal"));
            found.entry(event).or_default().extend(fields);
        }
    }
}

/// One bullet of the page: what it is about, and the text behind that.
struct Described {
    event: Event,
    fields: Fields,
    meaning: String,
}

fn described(bullet: &str) -> Option<Described> {
    let words = bullet.split_whitespace().collect::<Vec<_>>().join(" ");
    let (level, rest) = words.strip_prefix("- ")?.split_once(" ``")?;
    let (message, rest) = rest.rsplit_once("``")?;
    let (fields, meaning) = rest.split_once(':')?;
    let fields = fields.trim().trim_matches(['(', ')']);
    let fields = fields.split(", ").filter(|field| !field.is_empty()).map(str::to_owned);
    Some(Described {
        event: (level.to_owned(), message.trim().to_owned()),
        fields: fields.collect(),
        meaning: meaning.trim().to_owned(),
    })
}

fn bullet((level, message): &Event, fields: &Fields, meaning: &str) -> String {
    let pad = if message.starts_with('`') || message.ends_with('`') { " " } else { "" };
    let fields = fields.iter().cloned().collect::<Vec<_>>().join(", ");
    let fields = if fields.is_empty() { fields } else { format!(" ({fields})") };
    let (mut lines, whole) =
        (vec![String::new()], format!("- {level} ``{pad}{message}{pad}``{fields}: {meaning}"));
    for word in whole.split(' ') {
        let line = lines.last_mut().expect("there is one");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= 110 {
            line.extend([" ", word]);
        } else {
            lines.push(format!("  {word}"));
        }
    }
    lines.join("\n")
}

/// The page's blocks: bullets with the lines that go on with them, and all other lines.
fn blocks(page: &str) -> Vec<String> {
    let mut blocks: Vec<String> = Vec::new();
    for line in page.lines() {
        match blocks.last_mut() {
            Some(last) if line.starts_with("  ") && last.starts_with("- ") => last.extend(["\n", line]),
            _ => blocks.push(line.to_owned()),
        }
    }
    blocks
}

fn accept(page: &str, events: &BTreeMap<Event, Fields>) {
    let mut rest = events.clone();
    let kept = blocks(page).into_iter().filter_map(|block| match described(&block) {
        Some(known) => rest.remove(&known.event).map(|fields| bullet(&known.event, &fields, &known.meaning)),
        None => Some(block),
    });
    let mut lines: Vec<String> = kept.collect();
    if !rest.is_empty() {
        lines.extend([String::new(), "## New".to_owned(), String::new()]);
        lines.extend(rest.iter().map(|(event, fields)| bullet(event, fields, UNDESCRIBED)));
    }
    fs::write(root().join(PAGE), lines.join("\n") + "\n").expect("the page can be written");
}

#[test]
fn the_page_of_log_events_has_every_line_that_the_source_writes() {
    let mut events = BTreeMap::new();
    for path in sources() {
        events_of(&fs::read_to_string(path).expect("a source"), &mut events);
    }
    assert!(events.len() > 50, "{events:?}");
    let page = fs::read_to_string(root().join(PAGE)).expect("the page");
    if std::env::var_os("STATERA_ACCEPT").is_some() {
        accept(&page, &events);
        return;
    }
    let on_page: Vec<Described> = blocks(&page).iter().filter_map(|block| described(block)).collect();
    let undescribed: Vec<&Event> =
        on_page.iter().filter(|d| d.meaning == UNDESCRIBED).map(|d| &d.event).collect();
    let on_page: BTreeMap<Event, Fields> =
        on_page.iter().map(|d| (d.event.clone(), d.fields.clone())).collect();
    let missing: Vec<_> =
        events.iter().filter(|(event, fields)| on_page.get(event) != Some(fields)).collect();
    let gone: Vec<_> = on_page.keys().filter(|event| !events.contains_key(event)).collect();
    assert!(
        missing.is_empty() && gone.is_empty() && undescribed.is_empty(),
        "{PAGE} (STATERA_ACCEPT=1 brings it up to date)\n  lacks {missing:#?}\n  has what is gone: {gone:#?}\n  \
         does not describe {undescribed:#?}"
    );
}
