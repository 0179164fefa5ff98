//! Who may know whom: the arrows between the modules of `src/`, read off its paths.
//!
//! A small reader of Rust's tokens, not a compiler: it sees `crate::…`, `super::…` and the names of crates, outside of
//! comments, texts and `#[cfg(test)]`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// What each top folder of `src/` may name of this crate besides itself: a whole folder (`config`), one file of it
/// (`observe::counters`) or one type.
///
/// The rows stand from the leaves to the top. Each arrow points to a row above its own, so the graph has no circle.
///
/// The data plane knows nothing of Redis. What Redis says reaches it as snapshots, which `redis` publishes through `balance`'s
/// plain types; where both need an answer at once (the Lua pick), `balance` owns the channel.
const ARROWS: [(&str, &[&str]); 19] = [
    ("control", &[]),
    ("drain", &[]),
    ("net", &[]),
    ("observe", &[]),
    ("reactor", &[]),
    ("balance", &["observe::counters", "reactor"]),
    ("config", &["balance"]),
    ("names", &["balance", "control", "net::descriptors"]),
    ("relay", &["net", "observe::counters", "reactor"]),
    ("listen", &["config", "drain", "net", "observe::counters", "reactor"]),
    ("session", &["balance", "config", "net", "observe", "reactor", "relay"]),
    (
        "data_plane",
        &[
            "balance::pool",
            "config::LogFormat",
            "drain",
            "listen::accept",
            "observe",
            "reactor",
            "relay::Stream",
            "session",
        ],
    ),
    ("health", &["balance", "config", "control", "net"]),
    // What it saves comes out of the snapshot cells, so it has no need to know Redis.
    ("state", &["balance", "config", "control", "observe::counters"]),
    (
        "redis",
        &[
            "balance::AdminState",
            "balance::BackendId",
            "balance::InvalidAddress",
            "balance::InvalidWeight",
            "balance::Table",
            "balance::Weight",
            "balance::lua_pick::LuaRequest",
            "balance::lua_pick::LuaRequests",
            "balance::cell::Cell",
            "balance::usability",
            "config",
            "control",
            "names::lookup",
            "observe::counters",
        ],
    ),
    ("metrics", &["balance", "observe", "redis::status", "session", "state::SaveStatus"]),
    ("admin", &["config", "control::blocking", "drain", "metrics", "net"]),
    // The composition root: it alone may know all.
    (
        "proxy",
        &[
            "admin",
            "balance",
            "config",
            "control",
            "data_plane",
            "drain",
            "health",
            "listen",
            "metrics",
            "names",
            "net",
            "observe",
            "redis",
            "relay",
            "session",
            "state",
        ],
    ),
    (
        "cli",
        &[
            "balance::AdminState",
            "balance::BackendId",
            "balance::Table",
            "balance::Weight",
            // What `weights simulate` shows.
            "balance::Balance",
            "balance::simulation",
            "config",
            "control",
            "net",
            "observe::log_sink",
            "proxy",
            "redis::weights",
        ],
    ),
];

/// These never name Redis, neither the module nor the crate.
const WITHOUT_REDIS: [&str; 8] =
    ["balance", "data_plane", "health", "listen", "reactor", "relay", "session", "state"];

/// Above this, a file has a second subject.
const FILE_MAX_LINES: usize = 450;

#[test]
fn folders_name_only_what_the_table_allows() {
    let mut wrong = String::new();
    for file in sources() {
        if let Some(module) = &file.module {
            for (line, rule) in violations(module, file.depth, &file.text) {
                writeln!(wrong, "{}:{line}: {rule}", file.path.display()).expect("memory");
            }
        }
    }
    assert!(wrong.is_empty(), "the arrows are in tests/architecture.rs\n{wrong}");
}

#[test]
fn every_folder_has_a_row_and_every_row_its_folder() {
    let mut modules: Vec<String> = sources().into_iter().filter_map(|file| file.module).collect();
    modules.sort();
    modules.dedup();
    let mut known: Vec<&str> = ARROWS.iter().map(|(module, _)| *module).collect();
    known.sort_unstable();
    assert_eq!(modules, known);
}

#[test]
fn the_folders_form_a_graph_without_circles() {
    assert_eq!(upward_arrows(&ARROWS), [""; 0], "an arrow may only point to a row above its own");
}

#[test]
fn every_file_opens_with_what_it_does_and_has_one_subject() {
    for file in sources() {
        let (path, lines) = (file.path.display(), file.text.lines().count());
        assert!(file.text.starts_with("//! "), "{path} does not open with //! and what it does");
        assert!(lines <= FILE_MAX_LINES, "{path} has {lines} lines: look for the second subject");
    }
}

#[test]
fn an_upward_arrow_is_found() {
    let downward: [(&str, &[&str]); 3] =
        [("counters", &[]), ("session", &["counters::Counter"]), ("metrics", &["counters", "session"])];
    assert_eq!(upward_arrows(&downward), [""; 0]);
    let circle: [(&str, &[&str]); 3] =
        [("counters", &[]), ("session", &["metrics::text"]), ("metrics", &["session", "metrics", "gone"])];
    let found = ["session -> metrics::text", "metrics -> metrics", "metrics -> gone"];
    assert_eq!(upward_arrows(&circle), found, "up, to itself, and to no folder at all");
}

/// The checks themselves can fail.
#[test]
fn a_forbidden_path_is_found_however_it_is_written() {
    let found = |module: &str, depth, code: &str| -> Vec<usize> {
        violations(module, depth, code).into_iter().map(|(line, _)| line).collect()
    };
    for bad in [
        "use crate::redis::watch;",
        "use crate::{redis, config};",
        "use crate::{\n metrics::{format::Format, prometheus}};",
        "fn f() { crate::config::Config::load(); }",
        "use super::super::proxy;",
        "use ::redis::Client;",
        "fn f(c: redis::Client) {}",
        "use crate::*;",
    ] {
        assert!(!found("balance", 2, bad).is_empty(), "not found: {bad}");
    }
    let code = "// crate::redis\n/* crate::redis /* redis */ */ let s = \"crate::redis \\\" redis\";\n\
                let c = '\"'; fn f<'a>(x: &'a str) {} let r = r#\"redis \"redis\"#;\n\
                use crate::balance::Table; use super::cell; use crate::observe::counters::{self, Counter};\n\
                #[cfg(test)]\nmod tests { use crate::redis::watch; fn g() { if a { redis::f() } } }\n\
                #[cfg(test)]\nuse crate::proxy;\npub(in crate::balance) struct A;\nuse crate::redis::x;";
    assert_eq!(found("balance", 2, code), [10, 10], "one for the arrow, one for the name");
    assert_eq!(found("redis", 2, "use crate::balance::Table; use redis::Client;"), [0usize; 0]);
    assert_eq!(found("redis", 2, "use crate::balance::snapshot::Snapshot;"), [1]);
    assert_eq!(
        found("redis", 2, "use crate::balance;"),
        [1],
        "all of a module is more than one of its types"
    );
}

/// The arrows of `table` that do not point to an earlier row.
fn upward_arrows(table: &[(&str, &[&str])]) -> Vec<String> {
    let mut upward = Vec::new();
    for (row, (folder, arrows)) in table.iter().enumerate() {
        for arrow in *arrows {
            let target = arrow.split("::").next();
            if !table[..row].iter().any(|(earlier, _)| Some(*earlier) == target) {
                upward.push(format!("{folder} -> {arrow}"));
            }
        }
    }
    upward
}

struct Source {
    path: PathBuf,
    /// `None` of the crate's roots, `lib.rs` and `main.rs`.
    module: Option<String>,
    /// How deep the file's module lies below the crate: `balance/pool.rs` is 2.
    depth: usize,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push(source(&root, path));
            }
        }
    }
    assert!(sources.len() > 40, "these are not all sources");
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

fn source(root: &Path, path: PathBuf) -> Source {
    let text = fs::read_to_string(&path).expect("a text");
    let below = path.strip_prefix(root).expect("it lies there").with_extension("");
    let mut names: Vec<String> =
        below.components().map(|name| name.as_os_str().to_string_lossy().into_owned()).collect();
    if names.last().is_some_and(|name| ["mod", "lib", "main"].contains(&name.as_str())) {
        names.pop();
    }
    Source { module: names.first().cloned(), depth: names.len(), path, text }
}

/// What a file of `module` names and must not: line and rule.
fn violations(module: &str, depth: usize, text: &str) -> Vec<(usize, String)> {
    let tokens = without_tests(tokens(text));
    let (_, allowed) = ARROWS.iter().find(|(name, _)| *name == module).copied().unwrap_or((module, &[]));
    let mut wrong = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let (line, word) = (tokens[at].0, tokens[at].1.as_str());
        let is_name = at == 0 || tokens[at - 1].1 != "." && !is_inner(&tokens, at);
        if word == "redis" && WITHOUT_REDIS.contains(&module) {
            wrong.push((line, format!("`{module}` never names `redis`")));
        }
        if (word == "crate" || word == "super") && is_name && tokens.get(at + 1).is_some_and(|t| t.1 == "::")
        {
            let mut paths = Vec::new();
            let (mut supers, mut start) = (0, at + 2);
            while word == "super" && tokens.get(start).is_some_and(|t| t.1 == "super") {
                (supers, start) = (supers + 1, start + 2);
            }
            read_tree(&tokens, start, String::new(), &mut paths);
            if word == "crate" || supers + 1 >= depth {
                for (line, path) in paths.into_iter().filter(|(_, path)| !is_allowed(module, allowed, path)) {
                    wrong.push((line, format!("`{module}` may not name `{path}`: it may {allowed:?}")));
                }
            }
        }
        at += 1;
    }
    wrong
}

/// Is this the middle of a path, or of `pub(in crate::…)`?
fn is_inner(tokens: &[(usize, String)], at: usize) -> bool {
    tokens[at - 1].1 == "::" || tokens[at - 1].1 == "in"
}

fn is_allowed(module: &str, allowed: &[&str], path: &str) -> bool {
    let below =
        |whole: &str| path == whole || path.strip_prefix(whole).is_some_and(|rest| rest.starts_with("::"));
    below(module) || allowed.iter().any(|whole| below(whole))
}

/// Reads `a::{b, c::d as e, f::*}` from `at` on, and returns where it ends. `self` stands for what it is in.
fn read_tree(
    tokens: &[(usize, String)],
    mut at: usize,
    mut path: String,
    paths: &mut Vec<(usize, String)>,
) -> usize {
    let first = at;
    while let Some((_, word)) = tokens.get(at) {
        match word.as_str() {
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|t| t.1 != "}") {
                    at = read_tree(tokens, at, path.clone(), paths);
                    if tokens.get(at).is_some_and(|t| t.1 == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "self" => {}
            name => {
                path += if path.is_empty() { "" } else { "::" };
                path += name;
            }
        }
        at += 1;
        if tokens.get(at).is_none_or(|t| t.1 != "::") {
            break;
        }
        at += 1;
    }
    paths.push((tokens.get(first).map_or(0, |t| t.0), path));
    if tokens.get(at).is_some_and(|t| t.1 == "as") { at + 2 } else { at }
}

/// Drops each item that follows a `#[cfg(test)]`.
fn without_tests(tokens: Vec<(usize, String)>) -> Vec<(usize, String)> {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let ahead = tokens[at..].iter().take(ATTRIBUTE.len()).map(|t| t.1.as_str());
        if !ahead.eq(ATTRIBUTE) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        at += ATTRIBUTE.len();
        let mut open = 0;
        while let Some((_, word)) = tokens.get(at) {
            at += 1;
            match word.as_str() {
                "{" => open += 1,
                "}" => open -= 1,
                _ => {}
            }
            if open == 0 && (word == "}" || word == ";") {
                break;
            }
        }
    }
    kept
}

/// Names, `::` and single signs, each with its line. Comments, texts, characters and lifetimes are left out.
fn tokens(text: &str) -> Vec<(usize, String)> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => comment_length(rest),
            '"' => text_length(rest),
            'r' | 'b' | 'c' if raw_text_length(rest).is_some() => raw_text_length(rest).unwrap_or(1),
            '\'' => character_length(rest),
            ':' if rest.starts_with("::") => {
                tokens.push((line, "::".to_owned()));
                2
            }
            _ if first.is_alphanumeric() || first == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                tokens.push((line, rest[..length].to_owned()));
                length
            }
            _ if first.is_whitespace() => first.len_utf8(),
            _ => {
                tokens.push((line, first.to_string()));
                first.len_utf8()
            }
        };
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    tokens
}

fn comment_length(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let (step, change) = match &text.as_bytes()[at..] {
            [b'/', b'*', ..] => (2, 1),
            [b'*', b'/', ..] => (2, -1),
            _ => (1, 0),
        };
        (at, depth) = (at + step, depth + change);
        if depth == 0 {
            break;
        }
    }
    at
}

fn text_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// `r"…"`, `br#"…"#`.
fn raw_text_length(text: &str) -> Option<usize> {
    let prefix = text.len() - text.trim_start_matches(['b', 'c']).len();
    let after = text.get(prefix..).filter(|_| prefix <= 1)?.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let inner = after.get(hashes..)?.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(prefix + 1 + hashes + 1 + inner.find(&end)? + end.len())
}

/// `'x'`, `'\n'`, and for `'a` the sign alone.
fn character_length(text: &str) -> usize {
    let inner = &text[1..];
    if inner.starts_with('\\') {
        return 1 + inner[2..].find('\'').map_or(2, |end| 2 + end + 1);
    }
    let Some(character) = inner.chars().next() else { return 1 };
    if inner[character.len_utf8()..].starts_with('\'') { 2 + character.len_utf8() } else { 1 }
}
