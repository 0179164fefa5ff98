//! What can be checked of the pages without a reader: lines that fit, links that lead somewhere, paths and
//! metrics that exist, and an index that has every page.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::path::{Component, Path, PathBuf};

const WIDEST: usize = 110;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files below `folder`, by their paths from the root, whose names end so.
fn files(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("a text");
            if path.is_dir() {
                folders.push(path);
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path.strip_prefix(root()).expect("it is below").to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Every page of the project.
fn pages() -> Vec<PathBuf> {
    let top = fs::read_dir(root())
        .expect("the root")
        .map(|entry| PathBuf::from(entry.expect("an entry").file_name()));
    let mut pages: Vec<PathBuf> = top.filter(|path| path.extension().is_some_and(|e| e == "md")).collect();
    for folder in ["docs", "benches", "packaging", "tests"] {
        pages.extend(files(folder, &[".md"]));
    }
    pages.sort();
    pages
}

fn text_of(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text without its blocks of code, and without code within a line where `keeps_code` is false.
fn prose(text: &str, keeps_code: bool) -> String {
    let mut prose = String::new();
    let mut is_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            let parts = line.split('`').enumerate();
            prose.extend(parts.filter(|(n, _)| keeps_code || n % 2 == 0).map(|(_, part)| part));
        }
        prose.push('\n');
    }
    prose
}

/// The targets of the links of a page, in the order of the page.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text, false);
    let targets = prose.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()));
    targets.filter(|target| !target.contains("://")).collect()
}

/// Where a link leads: a path from the root, and the anchor in it.
fn resolve(page: &Path, target: &str) -> (PathBuf, Option<String>) {
    let (path, anchor) = target.split_once('#').map_or((target, None), |(path, anchor)| (path, Some(anchor)));
    if path.is_empty() {
        return (page.to_owned(), anchor.map(str::to_owned));
    }
    let mut whole = page.parent().unwrap_or(Path::new("")).to_owned();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => assert!(whole.pop(), "{}: {target} leads out", page.display()),
            part => whole.push(part),
        }
    }
    (whole, anchor.map(str::to_owned))
}

/// The anchors of a page, as GitHub makes them of its headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let prose = prose(text, true);
    let headings =
        prose.lines().filter_map(|line| line.strip_prefix('#')).map(|line| line.trim_start_matches('#'));
    let anchor = |heading: &str| -> String {
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

/// The words of a text that look like paths below one of these folders.
fn paths_named(text: &str, folders: &[&str]) -> BTreeSet<String> {
    let is_of_path = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let words = text.split(|c: char| !is_of_path(c)).map(|word| word.trim_end_matches(['.', '/', '-']));
    let words = words.filter(|word| folders.iter().any(|folder| word.starts_with(folder)));
    words.map(str::to_owned).collect()
}

#[test]
fn lines_of_pages_fit_into_the_width() {
    let mut wide = String::new();
    for path in pages().into_iter().chain([PathBuf::from("config.yaml")]) {
        for (number, line) in text_of(&path).lines().enumerate() {
            let width = line.chars().count();
            if width > WIDEST {
                writeln!(wide, "{}:{}: {width} columns", path.display(), number + 1).expect("memory");
            }
        }
    }
    assert!(wide.is_empty(), "more than {WIDEST} columns:\n{wide}");
}

#[test]
fn links_lead_to_pages_and_headings_that_exist() {
    let mut broken = String::new();
    let mut known: HashMap<PathBuf, BTreeSet<String>> = HashMap::new();
    for page in pages() {
        for target in links(&text_of(&page)) {
            let (path, anchor) = resolve(&page, &target);
            let is_there = root().join(&path).exists();
            let has_anchor = match anchor {
                Some(anchor) if is_there => {
                    known.entry(path.clone()).or_insert_with(|| anchors(&text_of(&path))).contains(&anchor)
                }
                _ => true,
            };
            if !is_there || !has_anchor {
                writeln!(broken, "{}: {target}", page.display()).expect("memory");
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere:\n{broken}");
}

/// An index is `docs/README.md` and each `README.md` that it links.
#[test]
fn the_index_of_the_docs_links_every_page() {
    let index = PathBuf::from("docs/README.md");
    let (mut linked, mut indexes) = (BTreeSet::from([index.clone()]), vec![index]);
    while let Some(index) = indexes.pop() {
        for target in links(&text_of(&index)) {
            let (path, _) = resolve(&index, &target);
            if path.ends_with("README.md") && path.starts_with("docs") && !linked.contains(&path) {
                indexes.push(path.clone());
            }
            linked.insert(path);
        }
    }
    let missing: Vec<PathBuf> = pages().into_iter().filter(|page| !linked.contains(page)).collect();
    assert!(missing.is_empty(), "docs/README.md leads to none of {missing:?}");
}

#[test]
fn files_that_pages_and_comments_name_exist() {
    let mut missing = String::new();
    let folders = ["src/", "tests/", "benches/", "docs/", "packaging/"];
    let named_by_pages = pages().into_iter().map(|page| {
        // Links are relative to their page, and checked as such.
        let text = text_of(&page);
        let without_links: Vec<&str> = text
            .split("](")
            .enumerate()
            .map(|(n, part)| if n == 0 { part } else { part.split_once(')').map_or("", |(_, rest)| rest) })
            .collect();
        let named = paths_named(&without_links.join(" "), &folders);
        (page, named)
    });
    let sources =
        ["src", "tests", "benches"].into_iter().flat_map(|folder| files(folder, &[".rs", ".lua", ".sh"]));
    let named_by_comments = sources.map(|path| {
        let text = text_of(&path);
        (path, paths_named(&text, &["docs/"]))
    });
    for (path, named) in named_by_pages.chain(named_by_comments) {
        for name in named.into_iter().filter(|name| !root().join(name).exists()) {
            writeln!(missing, "{}: {name}", path.display()).expect("memory");
        }
    }
    assert!(missing.is_empty(), "files that do not exist:\n{missing}");
}

#[test]
fn every_folder_of_the_source_is_in_architecture_md() {
    let page = text_of(Path::new("ARCHITECTURE.md"));
    let folders = fs::read_dir(root().join("src")).expect("the source").map(|entry| entry.expect("an entry"));
    let folders = folders.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name());
    let missing: Vec<String> = folders
        .map(|name| format!("`src/{}`", name.to_str().expect("a text")))
        .filter(|name| !page.contains(name.as_str()))
        .collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md lacks {missing:?}");
}

#[test]
fn metrics_that_pages_name_are_in_the_reference() {
    let reference = text_of(Path::new("docs/reference/metrics.md"));
    let names = |text: &str| -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let words = words.filter(|word| word.starts_with("statera_") && !word.ends_with('_'));
        words.map(str::to_owned).collect()
    };
    let known = names(&reference);
    let mut unknown = String::new();
    // What changed may name what is gone.
    for page in pages().into_iter().filter(|page| *page != Path::new("CHANGELOG.md")) {
        for name in names(&text_of(&page)) {
            let base = ["_bucket", "_count", "_sum"].iter().find_map(|part| name.strip_suffix(part));
            if !known.contains(&name) && !base.is_some_and(|base| known.contains(base)) {
                writeln!(unknown, "{}: {name}", page.display()).expect("memory");
            }
        }
    }
    assert!(unknown.is_empty(), "metrics that docs/reference/metrics.md does not have:\n{unknown}");
}

/// Sockets, backends and sessions are no persons. In pieces, so that this file does not find itself.
const NEVER: [&str; 7] = [
    concat!("no", "body"),
    concat!("some", "body"),
    concat!("who", "ever"),
    concat!("who", "m"),
    concat!("h", "e"),
    concat!("hi", "s"),
    concat!("hi", "m"),
];

#[test]
fn no_line_speaks_of_things_as_persons() {
    let mut found = String::new();
    let folders = ["src", "tests", "benches", "docs", "packaging", ".ci", ".config"].into_iter();
    let below = folders.flat_map(|folder| files(folder, &[""]));
    let single = ["config.yaml", "Makefile", "Cargo.toml", "deny.toml", "clippy.toml", "rust-toolchain.toml"];
    let top = pages().into_iter().chain(single.into_iter().map(PathBuf::from));
    for path in below.chain(top).collect::<BTreeSet<PathBuf>>() {
        // What is no text has no words.
        let Ok(text) = fs::read_to_string(root().join(&path)) else { continue };
        for (number, line) in text.lines().enumerate() {
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            for word in words.filter(|word| NEVER.iter().any(|never| never.eq_ignore_ascii_case(word))) {
                writeln!(found, "{}:{}: {word}", path.display(), number + 1).expect("memory");
            }
        }
    }
    assert!(found.is_empty(), "a thing is \"it\"; say which thing acts:\n{found}");
}
