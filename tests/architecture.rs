//! Which folder of `src/` may name which: the arrows between the folders, held against the paths in the
//! code.
//!
//! A small reader of Rust's tokens, not a compiler: it sees `crate::…`, `super::…` and the names of crates
//! outside of comments, string literals and `#[cfg(test)]`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// What each top folder of `src/` may name of this crate besides itself: a whole folder (`config`), one file
/// of it (`observe::counters`) or one type.
///
/// The rows stand from the leaves to the top. Each arrow points to a row above its own, so the graph has no
/// circle.
///
/// The data plane knows nothing of Redis. What Redis says reaches it as snapshots, which `redis` publishes
/// through `balance`'s plain types; where both need an answer at once (the Lua pick), `balance` owns the
/// channel.
const ARROWS: [(&str, &[&str]); 20] = [
    ("drain", &[]),
    ("fault", &[]),
    ("net", &[]),
    ("observe", &[]),
    ("control", &["fault", "observe::tasks"]),
    ("reactor", &[]),
    ("balance", &["observe::counters", "reactor"]),
    ("config", &["balance"]),
    ("names", &["balance", "control", "net::descriptors"]),
    ("relay", &["net", "observe::counters", "reactor"]),
    ("listen", &["config", "drain", "net", "observe::counters", "reactor"]),
    ("session", &["balance", "config", "fault", "net", "observe", "reactor", "relay"]),
    (
        "data_plane",
        &[
            "balance::pool",
            "config::LogFormat",
            "control::supervised",
            "drain",
            "fault",
            "listen::accept",
            "observe",
            "reactor",
            "relay::Stream",
            "session",
        ],
    ),
    ("health", &["balance", "config", "control", "fault", "net"]),
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
            "balance::pool::lua_pick::LuaRequest",
            "balance::pool::lua_pick::LuaRequests",
            "balance::pool::lua_pick::PoolId",
            "balance::pool::Cell",
            "balance::snapshot::Reason",
            "balance::snapshot::Unusable",
            "config",
            "control",
            "fault",
            "names::lookup",
            "observe::counters",
        ],
    ),
    ("metrics", &["balance", "observe", "redis::status", "session", "state::SaveStatus"]),
    ("admin", &["config", "control::blocking", "drain", "fault", "metrics", "net"]),
    // The composition root: it alone may know all.
    (
        "supervisor",
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
            "supervisor",
            "redis::weights",
        ],
    ),
];

/// What each folder (or file) in `src/redis/` may name of the others, in the same order: from the leaves to
/// the top.
const REDIS_ARROWS: [(&str, &[&str]); 8] = [
    ("status", &[]),
    ("schema", &["status"]),
    ("wire", &[]),
    ("topology", &["schema", "status", "wire"]),
    ("follow", &["schema", "status", "topology", "wire"]),
    ("pick", &["schema", "topology", "wire"]),
    ("fleet", &["schema", "topology", "wire"]),
    ("weights", &["fleet", "schema", "topology", "wire"]),
];

/// The most files of one inner folder that may name each other in a circle.
const MOST_IN_CIRCLE: usize = 2;

/// The folders that never name Redis, neither the folder `redis` nor the crate.
const WITHOUT_REDIS: [&str; 8] =
    ["balance", "data_plane", "health", "listen", "reactor", "relay", "session", "state"];

/// A longer file has a second subject.
const FILE_MAX_LINES: usize = 450;

#[test]
fn folders_name_only_what_the_table_allows() {
    let mut wrong = String::new();
    for file in sources() {
        if let Some(folder) = &file.folder {
            for (line, rule) in violations(folder, file.depth, &file.text) {
                writeln!(wrong, "{}:{line}: {rule}", file.path.display()).expect("memory");
            }
        }
    }
    assert!(wrong.is_empty(), "the arrows are in tests/architecture.rs\n{wrong}");
}

#[test]
fn every_folder_has_a_row_and_every_row_its_folder() {
    let mut folders: Vec<String> = sources().into_iter().filter_map(|file| file.folder).collect();
    folders.sort();
    folders.dedup();
    let mut rows: Vec<&str> = ARROWS.iter().map(|(folder, _)| *folder).collect();
    rows.sort_unstable();
    assert_eq!(folders, rows);
}

#[test]
fn the_folders_form_a_graph_without_circles() {
    assert_eq!(upward_arrows(&ARROWS), [""; 0], "an arrow may only point to a row above its own");
}

#[test]
fn the_folders_in_redis_form_a_graph_without_circles() {
    assert_eq!(upward_arrows(&REDIS_ARROWS), [""; 0], "an arrow may only point to a row above its own");
    let mut wrong = String::new();
    for file in sources().iter().filter(|file| file.module.len() >= 2 && file.module[0] == "redis") {
        for (line, rule) in inner_violations(&REDIS_ARROWS, &file.module, &file.text) {
            writeln!(wrong, "{}:{line}: {rule}", file.path.display()).expect("memory");
        }
    }
    assert!(wrong.is_empty(), "the arrows are in tests/architecture.rs\n{wrong}");
}

#[test]
fn no_more_than_two_files_of_a_folder_in_redis_name_each_other_in_a_circle() {
    let sources = sources();
    for (folder, _) in REDIS_ARROWS {
        let is_in = |file: &&Source| file.module.get(..2) == Some(&["redis".to_owned(), folder.to_owned()]);
        let files: Vec<_> = sources.iter().filter(is_in).map(|file| (&*file.module, &*file.text)).collect();
        assert!(!files.is_empty(), "redis/{folder} is gone: take it out of the table");
        assert_eq!(circles(&files), [[""; 0]; 0], "in redis/{folder}");
    }
}

#[test]
fn every_arrow_is_used() {
    let mut named = Vec::new();
    for file in sources() {
        let paths = crate_paths(&without_tests(tokens(&file.text)), file.depth);
        named.extend(paths.into_iter().map(|(_, path)| (file.folder.clone(), path)));
    }
    let is_used = |folder: &str, arrow: &str| {
        named.iter().any(|(from, path)| from.as_deref() == Some(folder) && is_within(path, arrow))
    };
    let all = ARROWS.iter().flat_map(|(folder, arrows)| arrows.iter().map(move |arrow| (*folder, *arrow)));
    let unused: Vec<_> = all.filter(|(folder, arrow)| !is_used(folder, arrow)).collect();
    assert_eq!(unused, [("", ""); 0], "no line needs them any more: take them out of the table");
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

#[test]
fn an_upward_arrow_and_a_circle_of_files_in_redis_are_found() {
    let module = |path: &str| -> Vec<String> { path.split("::").map(str::to_owned).collect() };
    let rules = |path: &str, code: &str| inner_violations(&REDIS_ARROWS, &module(path), code).len();
    for (path, bad) in [
        ("redis::wire::connection", "use crate::redis::topology::sentinel;"),
        ("redis::wire::reply_limit::framing", "use super::super::super::follow::watch;"),
        ("redis::topology::cluster::view", "use crate::{config, redis::{wire, weights::Ledger}};"),
        ("redis::status", "fn f() { super::follow::watch::run() }"),
        ("redis::follow::sync", "use crate::redis::Followed;"),
    ] {
        assert_eq!(rules(path, bad), 1, "{path}: {bad}");
    }
    let downward = "use super::primary; use crate::redis::{status, wire::error};\n\
                    #[cfg(test)]\nmod tests { use crate::redis::follow; }";
    assert_eq!(rules("redis::topology::shards", downward), 0);

    let (a, b, c) = (module("redis::wire::a"), module("redis::wire::b"), module("redis::wire::a::c"));
    let pair = [(&*a, "use c::C; mod c;"), (&*b, ""), (&*c, "use super::A; use super::super::b::B;")];
    assert_eq!(circles(&pair), [[""; 0]; 0]);
    let circle = [pair[0], (&*b, "use super::a::A;"), pair[2]];
    assert_eq!(circles(&circle), [["wire::a", "wire::a::c", "wire::b"]]);
}

#[test]
fn a_forbidden_path_is_found_however_it_is_written() {
    let found = |folder: &str, depth, code: &str| -> Vec<usize> {
        violations(folder, depth, code).into_iter().map(|(line, _)| line).collect()
    };
    for bad in [
        "use crate::redis::watch;",
        "use crate::{redis, config};",
        "use crate::{\n metrics::{format::Format, Observed}};",
        "fn f() { crate::config::Config::load(); }",
        "use super::super::supervisor;",
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
                #[cfg(test)]\nuse crate::supervisor;\npub(in crate::balance) struct A;\nuse crate::redis::x;";
    assert_eq!(found("balance", 2, code), [10, 10], "one for the arrow, one for the name");
    assert_eq!(found("redis", 2, "use crate::balance::Table; use redis::Client;"), [0usize; 0]);
    assert_eq!(found("redis", 2, "use crate::balance::snapshot::Snapshot;"), [1]);
    assert_eq!(found("redis", 2, "use crate::balance;"), [1], "a whole folder is more than one of its types");
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
    /// The top folder, or the file where that lies in `src/` itself. `None` for `lib.rs` and `main.rs`.
    folder: Option<String>,
    /// How deep the file's module lies below the crate's root: `balance/pool.rs` is 2.
    depth: usize,
    /// The path of the file's module: `balance`, `pool`.
    module: Vec<String>,
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
    let below = path.strip_prefix(root).expect("the file is in src").with_extension("");
    let mut names: Vec<String> =
        below.components().map(|name| name.as_os_str().to_string_lossy().into_owned()).collect();
    if names.last().is_some_and(|name| ["mod", "lib", "main"].contains(&name.as_str())) {
        names.pop();
    }
    Source { folder: names.first().cloned(), depth: names.len(), module: names, path, text }
}

/// Each name in a file of `folder` that the table does not allow: its line and the rule.
fn violations(folder: &str, depth: usize, text: &str) -> Vec<(usize, String)> {
    let tokens = without_tests(tokens(text));
    let (_, allowed) = ARROWS.iter().find(|(name, _)| *name == folder).copied().unwrap_or((folder, &[]));
    let mut wrong = Vec::new();
    if WITHOUT_REDIS.contains(&folder) {
        let lines = tokens.iter().filter(|token| token.1 == "redis").map(|token| token.0);
        wrong.extend(lines.map(|line| (line, format!("`{folder}` never names `redis`"))));
    }
    for (line, path) in crate_paths(&tokens, depth) {
        if !is_within(&path, folder) && !allowed.iter().any(|arrow| is_within(&path, arrow)) {
            wrong.push((line, format!("`{folder}` may not name `{path}`: it may {allowed:?}")));
        }
    }
    wrong.sort();
    wrong
}

/// Each name in the file of `module`, which lies in `src/redis/`, that `table` does not allow: its line and
/// the rule. A name of the root of `redis`, which knows all folders in it, is an upward arrow too.
fn inner_violations(table: &[(&str, &[&str])], module: &[String], text: &str) -> Vec<(usize, String)> {
    let tokens = without_tests(tokens(text));
    let (root, folder) = (&module[0], &module[1]);
    let (_, allowed) = table.iter().find(|(name, _)| name == folder).copied().unwrap_or((folder, &[]));
    let mut wrong = Vec::new();
    for (line, path) in absolute_paths(&tokens, module) {
        let Some((first, rest)) = path.split_once("::") else { continue };
        let is_allowed = |inner: &str| is_within(rest, inner);
        if first == root && !is_allowed(folder) && !allowed.iter().any(|inner| is_allowed(inner)) {
            wrong.push((line, format!("`{folder}` may not name `{path}`: it may {allowed:?}")));
        }
    }
    wrong
}

/// The groups of more than [`MOST_IN_CIRCLE`] files that name each other in a circle, each file by its
/// module.
fn circles(files: &[(&[String], &str)]) -> Vec<Vec<String>> {
    let names: Vec<String> = files.iter().map(|(module, _)| module.join("::")).collect();
    let target = |path: &str| {
        let holders = names.iter().enumerate().filter(|(_, name)| is_within(path, name));
        holders.max_by_key(|(_, name)| name.len()).map(|(index, _)| index)
    };
    let named_by = |(module, text): &(&[String], &str)| -> Vec<usize> {
        let tokens = without_tests(tokens(text));
        let children = tokens.windows(2).filter(|pair| pair[0].1 == "mod").map(|pair| &pair[1].1);
        let children: Vec<String> = children.map(|child| format!("{}::{child}", module.join("::"))).collect();
        let used = |child: &String| {
            let name = child.rsplit("::").next().unwrap_or_default();
            tokens.windows(2).any(|pair| pair[0].1 == name && pair[1].1 == "::")
        };
        let paths = absolute_paths(&tokens, module).into_iter().map(|(_, path)| path);
        paths
            .chain(children.iter().filter(|child| used(child)).cloned())
            .filter_map(|path| target(&path))
            .collect()
    };
    let arrows: Vec<Vec<usize>> = files.iter().map(named_by).collect();
    let reached = |from: usize| {
        let (mut reached, mut open) = (vec![false; files.len()], vec![from]);
        while let Some(file) = open.pop() {
            for &next in &arrows[file] {
                if !std::mem::replace(&mut reached[next], true) {
                    open.push(next);
                }
            }
        }
        reached
    };
    let reached: Vec<Vec<bool>> = (0..files.len()).map(reached).collect();
    let mut circles: Vec<Vec<String>> = Vec::new();
    for (file, of_file) in reached.iter().enumerate() {
        let circle = (0..files.len()).filter(|&other| of_file[other] && reached[other][file]);
        let mut circle: Vec<String> = circle.map(|index| files[index].0[1..].join("::")).collect();
        circle.sort();
        if circle.len() > MOST_IN_CIRCLE && !circles.contains(&circle) {
            circles.push(circle);
        }
    }
    circles
}

/// A path that begins with `crate` or `super`.
struct Start {
    /// The number of `super`; `None` for `crate`.
    supers: Option<usize>,
    /// Where the token behind it is.
    next: usize,
}

fn starts(tokens: &[(usize, String)]) -> impl Iterator<Item = Start> {
    let word = |at: usize| tokens.get(at).map_or("", |token| token.1.as_str());
    (0..tokens.len()).filter_map(move |at| {
        let begins_path = at == 0 || !["::", "in", "."].contains(&word(at - 1));
        if !["crate", "super"].contains(&word(at)) || !begins_path || word(at + 1) != "::" {
            return None;
        }
        let (mut supers, mut next) = (usize::from(word(at) == "super"), at + 2);
        while supers > 0 && word(next) == "super" {
            (supers, next) = (supers + 1, next + 2);
        }
        Some(Start { supers: (supers > 0).then_some(supers), next })
    })
}

/// All paths of the crate that the file of `module` names, as seen from the crate's root, each with its
/// line.
fn absolute_paths(tokens: &[(usize, String)], module: &[String]) -> Vec<(usize, String)> {
    let mut paths = Vec::new();
    for Start { supers, next } in starts(tokens) {
        let base = supers.map_or(0, |supers| module.len().saturating_sub(supers));
        read_tree(tokens, next, module[..base].join("::"), &mut paths);
    }
    paths
}

/// The paths below the crate's root that a file names, each with its line. `depth` is how deep the file's
/// module lies.
fn crate_paths(tokens: &[(usize, String)], depth: usize) -> Vec<(usize, String)> {
    let mut paths = Vec::new();
    for Start { supers, next } in starts(tokens) {
        if supers.is_none_or(|supers| supers >= depth) {
            read_tree(tokens, next, String::new(), &mut paths);
        }
    }
    paths
}

/// Is `path` the item `whole`, or in it?
fn is_within(path: &str, whole: &str) -> bool {
    path.strip_prefix(whole).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Reads `a::{b, c::d as e, f::*}` from `at` on into `paths`, and returns the index behind it. `self` adds
/// nothing to the path.
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

/// Leaves out each item that follows a `#[cfg(test)]`.
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

/// Words, `::` and single signs, each with its line. Comments, string and character literals are left out;
/// of a lifetime, the quote is.
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

/// The length of `r"…"` or `br#"…"#`; `None` for everything else.
fn raw_text_length(text: &str) -> Option<usize> {
    let prefix = text.len() - text.trim_start_matches(['b', 'c']).len();
    let after = text.get(prefix..).filter(|_| prefix <= 1)?.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let inner = after.get(hashes..)?.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(prefix + 1 + hashes + 1 + inner.find(&end)? + end.len())
}

/// The length of `'x'` or `'\n'`; for the lifetime `'a`, that of the quote alone.
fn character_length(text: &str) -> usize {
    let inner = &text[1..];
    if inner.starts_with('\\') {
        return 1 + inner[2..].find('\'').map_or(2, |end| 2 + end + 1);
    }
    let Some(character) = inner.chars().next() else { return 1 };
    if inner[character.len_utf8()..].starts_with('\'') { 2 + character.len_utf8() } else { 1 }
}
