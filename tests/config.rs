//! Which configs are accepted, which are refused, and the exact words of each refusal.
//!
//! `tests/configs/valid/*.yaml` must load. Each `tests/configs/invalid/NAME.yaml` must be refused with the
//! lines of `NAME.expected`; to accept new words, run with `STATERA_ACCEPT=1` and read the diff.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use statera::config::{Config, LoadError, LogFormat, OnEmpty, RedisAddress, Watch};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configs").join(name)
}

fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder is part of the repository");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    assert!(!files.is_empty(), "{} holds no config", folder.display());
    files
}

/// The environment variables that the configs of the tests can use.
fn environment(name: &str) -> Option<String> {
    let value = match name {
        "HOST" => "10.0.0.1",
        "ATTEMPTS" => "7",
        "ACCESS" => "false",
        "TIMEOUT" => "250ms",
        "PASSWORD" => "geheim",
        "EMPTY" => "",
        _ => return None,
    };
    Some(value.to_owned())
}

fn load(text: &str) -> Result<Config, LoadError> {
    Config::from_yaml_with(text, &environment)
}

fn refusal(text: &str) -> String {
    load(text).expect_err("this config was accepted").to_string()
}

#[test]
fn every_valid_config_loads() {
    for path in yaml_files(&folder("valid")) {
        let text = fs::read_to_string(&path).unwrap();
        load(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

#[test]
fn every_invalid_config_is_refused_in_the_expected_words() {
    let mut differences = String::new();
    for path in yaml_files(&folder("invalid")) {
        let found = refusal(&fs::read_to_string(&path).unwrap()) + "\n";
        let expected_path = path.with_extension("expected");
        if std::env::var_os("STATERA_ACCEPT").is_some() {
            fs::write(&expected_path, &found).unwrap();
        }
        let expected = fs::read_to_string(&expected_path).unwrap_or_default();
        if found != expected {
            let name = path.display();
            writeln!(differences, "{name}\n--- expected\n{expected}--- found\n{found}").unwrap();
        }
        assert!(!found.contains("geheim"), "{} shows a secret", path.display());
        let is_printable = found.chars().all(|c| c == '\n' || !c.is_control());
        assert!(is_printable, "{} prints control characters", path.display());
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn every_expected_refusal_has_its_config() {
    for entry in fs::read_dir(folder("invalid")).unwrap() {
        assert!(entry.unwrap().path().with_extension("yaml").exists());
    }
}

#[test]
fn the_shipped_example_loads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.yaml");
    let config = Config::load(&path).unwrap();
    assert_eq!(config.listeners[0].bind, ["0.0.0.0:8080".parse().unwrap()]);
    assert_eq!(config.pools[0].weights_key, "servers");
    assert_eq!(config.pools[0].backends.len(), 3);
}

#[test]
fn keys_that_are_left_out_have_the_defaults_of_the_contract() {
    let config = load(&fs::read_to_string(folder("valid/minimal.yaml")).unwrap()).unwrap();
    let pool = &config.pools[0];
    assert!(config.redis.is_none() && config.admin.is_none() && config.state_dir.is_none());
    assert_eq!(config.workers, std::thread::available_parallelism().unwrap());
    assert_eq!(pool.weights_key, "statera:{web}:weights");
    assert_eq!((pool.connect.attempts.get(), pool.connect.deadline), (3, Duration::from_secs(3)));
    assert_eq!(pool.idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(pool.keepalive.probes.get(), 6);
    assert_eq!((config.log.level, config.log.format), (tracing::Level::INFO, LogFormat::Json));
    assert_eq!(config.shutdown.timeout, Duration::from_secs(30));

    let config = load("redis: {}\nlisteners: {a: {bind: '[::1]:0', pool: a}}\npools: {a: {}}").unwrap();
    let redis = config.redis.unwrap();
    assert_eq!(redis.address, RedisAddress::Tcp { host: "127.0.0.1".into(), port: 6379 });
    assert_eq!((redis.watch, redis.on_empty), (Watch::Auto, OnEmpty::KeepLast));
    assert_eq!(redis.max_stale, Duration::from_secs(5));
}

#[test]
fn a_state_dir_that_a_variable_left_empty_is_none() {
    let state_dir =
        |file: &str| load(&fs::read_to_string(folder("valid").join(file)).unwrap()).unwrap().state_dir;
    assert_eq!(state_dir("no_state_dir.yaml"), None);
    assert_eq!(state_dir("everything.yaml"), Some(PathBuf::from("/var/lib/statera")));
}

#[test]
fn variables_reach_texts_numbers_durations_and_keys() {
    let config = load(&fs::read_to_string(folder("valid/environment.yaml")).unwrap()).unwrap();
    let redis = config.redis.unwrap();
    let pool = &config.pools[0];
    assert_eq!(redis.password.unwrap().expose(), "geheim");
    assert_eq!(redis.username, None);
    assert_eq!(redis.connect_timeout, Duration::from_millis(250));
    assert_eq!(pool.connect.attempts.get(), 7);
    assert!(!config.log.access);
    assert_eq!(pool.backends[0].0.as_str(), "10.0.0.1:80");
    assert_eq!(pool.backends[0].1.get(), 7.0);
    assert_eq!(pool.weights_key, "price$${");
    assert_eq!(pool.idle_timeout, None);
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_its_cure() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let message = |path: &Path| Config::load(path).unwrap_err().to_string();
    let shown = path.display();

    assert_eq!(message(&path), format!("{shown}: there is no such file: name the config with -c FILE"));
    let folder = directory.path();
    assert_eq!(message(folder), format!("{}: it is a directory: name the file in it", folder.display()));
    fs::write(&path, b"pools:\n  web: \xff\n").unwrap();
    assert_eq!(message(&path), format!("{shown}: line 2 is not UTF-8: save the file as UTF-8"));
    fs::write(&path, "#".repeat(1024 * 1024 + 1)).unwrap();
    assert_eq!(message(&path), format!("{shown}: it is larger than 1 MiB: is this the config?"));
    fs::write(&path, "pools: {}").unwrap();
    assert!(message(&path).starts_with(&format!("{shown}:\nlisteners: it is missing")), "{}", message(&path));
}

#[test]
fn two_hundred_thousand_brackets_are_refused_before_they_are_parsed() {
    // This message comes from the check before the parser. The parser looks at every open bracket again for
    // each token: it would take 5.7 s, and give another message.
    for bracket in ["[", "{", "[\n", "{a: "] {
        let message = refusal(&format!("pools:\n{}", bracket.repeat(200_000)));
        assert!(message.ends_with("more than 300 brackets are open: close them"), "{message}");
    }
    assert_eq!(refusal(&"[".repeat(200_000)), "line 1: more than 300 brackets are open: close them");
}

#[test]
fn nesting_and_aliases_that_would_use_up_the_memory_are_refused() {
    let deep = refusal(&"- ".repeat(100_000));
    assert!(deep.starts_with("not valid YAML: "), "{deep}");
    // 5,000 aliases of a list with 5,000 items: 25 million values in 35 kB.
    let items = "1,".repeat(5_000);
    let aliases = "*a,".repeat(5_000);
    let bomb = refusal(&format!("a: &a [{items}]\nb: [{aliases}]"));
    assert!(bomb.contains("its aliases expand to too much: write the values out"), "{bomb}");
    let mut laughs = "a0: &a0 [x, x]\n".to_owned();
    for level in 1..60 {
        writeln!(laughs, "a{level}: &a{level} [*a{0}, *a{0}]", level - 1).unwrap();
    }
    let message = refusal(&laughs);
    assert!(message.contains("its aliases"), "{message}");
}

#[test]
fn a_thousand_problems_are_counted_and_fifty_are_listed() {
    let mut text = fs::read_to_string(folder("valid/minimal.yaml")).unwrap();
    for number in 0..2_000 {
        writeln!(text, "key{number}: 1").unwrap();
    }
    let message = refusal(&text);
    assert_eq!(message.lines().count(), 1 + 50 + 1, "{message}");
    assert!(message.ends_with("\nand 1950 more: correct these first"), "{message}");
}

/// Each line number in a message takes one more parse of the file: 18 s if this message had all of them.
#[test]
fn the_largest_file_is_parsed_again_for_twenty_lines_at_the_most() {
    let message = refusal(&"a:\n".repeat(1024 * 1024 / 3));
    assert!(message.contains("a: written twice, first on line 1: keep one of them (line 2)"), "{message}");
    assert!(message.contains("more: correct these first"), "{message}");
    assert_eq!(message.matches("line ").count(), 20, "{message}");
    assert_eq!(message.lines().count(), 1 + 50 + 1, "problems without a line are listed too: {message}");
}

const PIECES: &[&str] = &[
    "listeners",
    "pools",
    "web",
    "bind",
    "pool",
    "redis",
    "url",
    "backends",
    "connect",
    "attempts",
    "admin",
    "log",
    "workers",
    "keepalive",
    "idle",
    ":",
    ": ",
    "\n",
    "\n  ",
    "\n    ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "&a ",
    "*a",
    "!x ",
    "<<",
    "|",
    ">",
    "'",
    "\"",
    "#",
    "${HOST}",
    "${",
    "$$",
    "127.0.0.1:80",
    "redis://u:p@h/0",
    "5s",
    "0s",
    "-1",
    ".inf",
    ".nan",
    "0x10",
    "1e9",
    "~",
    "true",
    "\t",
    "\u{1b}",
    "\u{feff}",
    "---\n",
    "...\n",
    "? ",
    "é",
];

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,200}|[\\x00-\\x7f]{0,200}") {
        let _ = load(&text).map_err(|error| error.to_string());
    }

    #[test]
    fn nothing_that_looks_like_a_config_makes_the_reader_panic(
        pieces in prop::collection::vec(prop::sample::select(PIECES), 0..60)
    ) {
        let _ = load(&pieces.concat()).map_err(|error| error.to_string());
    }

    /// Cuts and insertions in a good config, which reach the code behind the parser.
    #[test]
    fn no_damage_to_a_valid_config_makes_the_reader_panic(
        at in 0..2_000usize, cut in 0..20usize, piece in prop::sample::select(PIECES)
    ) {
        let text = fs::read_to_string(folder("valid/everything.yaml")).unwrap();
        let characters: Vec<char> = text.chars().collect();
        let at = at % characters.len();
        let end = (at + cut).min(characters.len());
        let damaged: String = characters[..at].iter().copied()
            .chain(piece.chars())
            .chain(characters[end..].iter().copied())
            .collect();
        let _ = load(&damaged).map_err(|error| error.to_string());
    }
}

/// The warnings as `statera check` prints them.
fn warnings(config: &Config) -> String {
    config.warnings.first.iter().map(|warning| format!("{warning}\n")).collect()
}

#[test]
fn valid_settings_that_are_most_likely_mistakes_are_warned_of_in_the_expected_words() {
    let mut differences = String::new();
    for path in yaml_files(&folder("warned")) {
        let found = warnings(&load(&fs::read_to_string(&path).unwrap()).unwrap());
        let expected_path = path.with_extension("expected");
        if std::env::var_os("STATERA_ACCEPT").is_some() {
            fs::write(&expected_path, &found).unwrap();
        }
        let expected = fs::read_to_string(&expected_path).unwrap_or_default();
        if found != expected || found.is_empty() {
            let name = path.display();
            writeln!(differences, "{name}\n--- expected\n{expected}--- found\n{found}").unwrap();
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

/// Warnings without a reason would teach users to ignore all of them.
#[test]
fn the_shipped_example_and_the_examples_of_the_docs_give_no_warning() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert_eq!(warnings(&Config::load(&root.join("config.yaml")).unwrap()), "");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let example = readme.split("```yaml\n").nth(1).and_then(|text| text.split("```").next()).unwrap();
    // The user that runs the tests may have no right to write to /var/lib.
    let folder_of_tables = tempfile::tempdir().unwrap();
    let example = example.replace("/var/lib/statera", folder_of_tables.path().to_str().unwrap());
    let example = Config::from_yaml_with(&example, &|_| Some("value".to_owned())).unwrap();
    assert_eq!(warnings(&example), "", "README.md");
    let health = fs::read_to_string(root.join("docs/health.md")).unwrap();
    let checks: Vec<&str> = health
        .lines()
        .flat_map(|line| line.split('`'))
        .filter(|text| text.starts_with("send: ") || text.starts_with("expect: "))
        .collect();
    assert!(checks.len() >= 3, "{checks:?}");
    for check in checks {
        let config = load(&format!(
            "listeners: {{a: {{bind: '127.0.0.1:0', pool: a}}}}\n\
             pools: {{a: {{backends: {{'10.0.0.1:80': 1}}, health_check: {{{check}}}}}}}"
        ));
        assert_eq!(warnings(&config.unwrap()), "", "{check}");
    }
    for file in ["minimal.yaml", "health.yaml", "sentinel.yaml", "hasty.yaml"] {
        let text = fs::read_to_string(folder("valid").join(file)).unwrap();
        assert_eq!(warnings(&load(&text).unwrap()), "", "{file}");
    }
}

#[test]
fn many_warnings_are_counted_and_the_first_are_listed() {
    let pools: String =
        (0..200).map(|n| format!("  unused{n}: {{backends: {{'10.0.0.1:80': 1}}}}\n")).collect();
    let config = load(&format!(
        "listeners: {{a: {{bind: '127.0.0.1:0', pool: a}}}}\n\
         pools:\n  a: {{backends: {{'10.0.0.1:80': 1}}}}\n{pools}"
    ))
    .unwrap();
    assert_eq!((config.warnings.first.len(), config.warnings.more), (50, 150));
}
