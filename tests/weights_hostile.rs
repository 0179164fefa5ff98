//! Every `statera weights` command when a foreign or hostile program has written to the companion keys of a
//! table.
//!
//! A command either works, or exits with 1, names the key and a cure, and leaves the weights as they were.
//! No raw bytes from Redis reach a terminal.

use redis::Value;

use crate::support::{Operator, calls};

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";
const KEYS: [&str; 6] = [
    "servers",
    "{servers}:version",
    "{servers}:history",
    "{servers}:known",
    "{servers}:states",
    "{servers}:applied",
];
/// `A` and `B` stand for the members [`A`] and [`B`].
const COMMANDS: [&str; 17] = [
    "get web",
    "get web --json",
    "set web A=7 B=0.5",
    "set web A=7 --json --wait=50ms",
    "set web A=7 --if-version 2",
    "remove web A",
    "drain web A",
    "drain web A --wait=50ms",
    "maint web A",
    "ready web A",
    "history web",
    "history web --json --limit 1000",
    "rollback web",
    "rollback web 0",
    "rollback web 1 --json",
    "rollback web 18446744073709551615",
    "simulate web A=7 --sessions 10",
];
const OF_A_VARIANT: [&str; 4] =
    ["set web A=7 B=0.5", "history web", "rollback web 0", "rollback web 1 --json"];
/// Each refusal contains one of these.
const CURES: [&str; 8] = [
    "nothing was changed",
    "delete it",
    "split the pool",
    "first",
    "the oldest to go back to is",
    "the newest is",
    "was lost",
    "there is no version to go back to",
];
const ESCAPE: &str = "\u{1b}[2J\u{9b}31m\u{202e}\n\u{7f}";

/// Hostile content of the keys, and which commands must refuse it.
struct Case {
    name: &'static str,
    setup: Vec<Vec<Vec<u8>>>,
    /// The key that each refused command names.
    key: &'static str,
    /// The commands that are refused, by their first words; empty if none is.
    refused: &'static str,
    /// True for a variant of the case before, for which a few commands are enough.
    is_variant: bool,
}

impl Case {
    fn variant(self) -> Self {
        Self { is_variant: true, ..self }
    }
}

fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

fn case(name: &'static str, setup: &[&[&str]], key: &'static str, refused: &'static str) -> Case {
    Case {
        name,
        setup: setup.iter().map(|command| words(command)).collect(),
        key,
        refused,
        is_variant: false,
    }
}

/// A history entry as statera writes it, with any text as its `version` and `changes`.
fn entry<'a>(version: &'a str, what: &'a str, changes: &'a str) -> [&'a str; 19] {
    [
        "XADD",
        "{servers}:history",
        "*",
        "version",
        version,
        "what",
        what,
        "back_to",
        "",
        "who",
        ESCAPE,
        "why",
        ESCAPE,
        "count",
        "1",
        "changes",
        changes,
        "hash",
        "",
    ]
}

/// Copies all keys from one prefix to another in one step, and removes those that the source lacks. Returns
/// the weights.
async fn copy(operator: &Operator, from: &str, to: &str) -> Value {
    let copy = "for _, key in ipairs(KEYS) do \
                if redis.call('COPY', ARGV[1] .. key, ARGV[2] .. key, 'REPLACE') == 0 then \
                redis.call('DEL', ARGV[2] .. key) end end return redis.call('DUMP', 'servers')";
    let words = ["EVAL", copy, "6"].into_iter().chain(KEYS).chain([from, to]);
    operator.redis.run_words(&words.collect::<Vec<_>>()).await
}

/// An operator whose table has two versions and their history.
async fn operator() -> Operator {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A} 1 {B}")).await;
    operator.done(&format!("set web {A}=2")).await;
    operator.done(&format!("set web {A}=3")).await;
    copy(&operator, "", "good:").await;
    operator
}

async fn weights_themselves(operator: &Operator) -> Value {
    operator.redis.run("DUMP servers").await
}

async fn try_all(operator: &Operator, cases: Vec<Case>) {
    for Case { name, setup, key, refused, is_variant } in cases {
        copy(operator, "good:", "").await;
        for command in &setup {
            operator.redis.run_words(command).await;
        }
        operator.redis.run("CONFIG RESETSTAT").await;
        copy(operator, "", "bad:").await;
        let commands = if is_variant { &OF_A_VARIANT[..] } else { &COMMANDS };
        for command in commands {
            let before = copy(operator, "bad:", "").await;
            let typed = operator.weights(&command.replace('A', A).replace('B', B)).await;
            let context = format!("{name}: {command}: {typed:?}");
            let raw = |text: &str| text.chars().any(|c| c.is_control() && c != '\n' || c == '\u{202e}');
            assert!(!raw(&typed.stdout) && !raw(&typed.stderr), "{context}");
            let is_short = typed.stdout.len() < 1 << 20 || command.contains("--json");
            assert!(is_short && typed.stderr.len() < 4 << 10, "{name}: {command} writes too much");
            let is_refused = command.split(' ').next().is_some_and(|word| refused.contains(word))
                && !command.contains("18446744073709551615");
            match typed.code {
                Some(0) => assert!(!is_refused, "{context}"),
                // `--wait` fails, since no proxy reports.
                Some(3) => assert!(command.contains("--wait") && !is_refused, "{context}"),
                Some(1) => {
                    assert!(CURES.iter().any(|cure| typed.stderr.contains(cure)), "{context}");
                    assert!(!is_refused || typed.stderr.contains(key), "{context}");
                    let is_conflict = command.contains("--if-version") && typed.stderr.contains("not at 2");
                    let is_waiting = command.contains("--wait") && typed.stderr.contains("{servers}:applied");
                    let may_be = is_refused || is_conflict || is_waiting || command.starts_with("rollback");
                    assert!(may_be || refused.contains("rollback"), "{context}");
                    if !typed.stderr.contains("is written") {
                        assert_eq!(weights_themselves(operator).await, before, "{context}");
                    }
                }
                _ => panic!("{context}"),
            }
        }
        // The number of reads is bounded however many entries there are.
        let reads = calls(&operator.redis, "xrevrange").await;
        assert!(reads < 5 * 2_100, "{name}: {reads} reads of the history");
    }
}

/// All commands except those that set admin states, which have no version.
const VERSIONED: &str = "get set remove history rollback simulate";

#[tokio::test]
async fn hostile_versions_are_refused_with_their_key_and_the_weights_stay() {
    let operator = operator().await;
    let mut cases = Vec::new();
    for text in ["x", "-1", "1.5", "0x10", "nan", "inf", "9007199254740993", "7\n", ESCAPE, "\0"] {
        cases.push(
            case("a version", &[&["SET", "{servers}:version", text]], "{servers}:version", VERSIONED)
                .variant(),
        );
    }
    let giant = "1".repeat(32 << 20);
    cases.push(case("a giant", &[&["SET", "{servers}:version", &giant]], "{servers}:version", VERSIONED));
    cases.push(case(
        "a list",
        &[&["DEL", "{servers}:version"], &["RPUSH", "{servers}:version", "1"]],
        "{servers}:version",
        VERSIONED,
    ));
    let mut not_utf8 = case("not UTF-8", &[], "{servers}:version", VERSIONED);
    not_utf8.setup = vec![vec![b"SET".to_vec(), b"{servers}:version".to_vec(), b"\xff\xfe".to_vec()]];
    cases.push(not_utf8);
    // A version that is lost or too low is taken from the history; one that is higher than the history's is
    // used.
    cases.push(case("none", &[&["DEL", "{servers}:version"]], "", ""));
    cases.push(case("an older one", &[&["SET", "{servers}:version", "0"]], "", ""));
    cases.push(case("a newer one", &[&["SET", "{servers}:version", "9007199254000000"]], "", ""));
    try_all(&operator, cases).await;
}

#[tokio::test]
async fn a_hostile_history_is_refused_with_its_key_and_the_weights_stay() {
    let operator = operator().await;
    let history = "{servers}:history";
    let mut cases = vec![
        case("a text", &[&["SET", history, "x"]], history, VERSIONED),
        case("a hash", &[&["DEL", history], &["HSET", history, "version", "1"]], history, VERSIONED),
        case("nothing", &[&["DEL", history]], "", ""),
        case("a stream that was emptied", &[&["XTRIM", history, "MAXLEN", "0"]], "", ""),
        case(
            "a stream that never held anything",
            &[&["DEL", history], &["XGROUP", "CREATE", history, "g", "$", "MKSTREAM"]],
            history,
            "set remove",
        ),
        case(
            "the last id",
            &[&["XADD", history, "18446744073709551615-18446744073709551615", "version", "2"]],
            history,
            "set remove",
        ),
        case("a foreign entry", &[&["XADD", history, "*", ESCAPE, ESCAPE]], "", ""),
        case("no changes", &[&["XADD", history, "*", "version", "2", "hash", ""]], "", ""),
    ];
    for version in ["-1", "1e300", "9007199254740993", ESCAPE, ""] {
        cases.push(case("an entry's version", &[&entry(version, "set", "[]")], history, VERSIONED).variant());
    }
    let deep = "[".repeat(5_000);
    let long = format!("[[\"{}\",\"1\",null]]", "z".repeat(3 << 20));
    for changes in [
        "\"a\"",
        "{\"a\":1}",
        "[7]",
        "[[\"a:1\"]]",
        "[[\"a:1\",1,2]]",
        "[[7,\"1\",\"2\"]]",
        "[[\"a:1\",\"x\",null]]",
        "[[\"a:1\",\" 1\",null]]",
        "[[\"a:1\",\"1\",null,-5]]",
        "[[\"a:1\",\"1\",null,1e300,{}]]",
        "[[\"\\u0000\\u001b[2J\",\"1\",null]]",
        "[[null,null,null]]",
        &deep,
        ESCAPE,
    ] {
        cases.push(case("an entry's changes", &[&entry("3", "set", changes)], "", "").variant());
    }
    cases.push(case("an entry's changes", &[&entry("3", "set", &long)], history, VERSIONED).variant());
    // Versions that repeat or decrease, and a great many entries.
    let again: Vec<[&str; 19]> = ["2", "1", "2", "1", "3"].map(|version| entry(version, "set", "[]")).into();
    let again: Vec<&[&str]> = again.iter().map(|entry| &entry[..]).collect();
    cases.push(case("a circle", &again, "", ""));
    let million = "for i = 1, 20000 do redis.call('XADD', KEYS[1], '*', 'version', '2', 'what', 'outside', \
                   'changes', '[]', 'count', '0') end";
    cases.push(case("twenty thousand entries", &[&["EVAL", million, "1", history]], "", ""));
    let large = "local one = '[\"' .. string.rep('a', 480) .. ':1\",\"1\",null]' \
                 local text = '[' .. string.rep(one .. ',', 2900) .. one .. ']' \
                 for i = 1, 24 do redis.call('XADD', KEYS[1], '*', 'version', '2', 'what', 'outside', 'changes', \
                 text, 'count', '1') end";
    cases.push(case("large entries", &[&["EVAL", large, "1", history]], "", ""));
    let giant = "redis.call('XADD', KEYS[1], '*', 'version', '2', 'changes', string.rep('x', 67108864))";
    cases.push(case(
        "a giant entry",
        &[&["EVAL", giant, "1", history]],
        history,
        "get set remove history simulate",
    ));
    let mut not_utf8 = case("not UTF-8", &[], "", "");
    not_utf8.setup = vec![words(&entry("3", "set", "[]"))];
    for index in [6, 10, 12, 16, 18] {
        not_utf8.setup[0][index] = b"\xff\xc0[[\"".to_vec();
    }
    cases.push(not_utf8);
    try_all(&operator, cases).await;
}

#[tokio::test]
async fn states_that_cannot_be_read_are_reported_beside_the_table() {
    let operator = operator().await;
    operator.redis.run("SET {servers}:states x").await;
    let get = operator.done("get web").await;
    let warning =
        "unknown which members are in drain or maint: {servers}:states holds something else than a hash";
    assert!(get.stdout.contains(warning), "{get:?}");
}

#[tokio::test]
async fn hostile_companion_keys_are_refused_by_name_and_the_weights_stay() {
    let operator = operator().await;
    let (known, states, applied) = ("{servers}:known", "{servers}:states", "{servers}:applied");
    let fill = "for i = 1, 120000 do redis.call(ARGV[1], KEYS[1], ARGV[1] == 'ZADD' and i or 'm' .. i, 'm' .. i) end";
    let giants = "for i = 1, 4 do local name = string.rep('x', 16777216) .. i redis.call(ARGV[1], KEYS[1], \
                  ARGV[1] == 'ZADD' and i or name, name) end";
    let cases = vec![
        case("known, a text", &[&["SET", known, "x"]], known, VERSIONED),
        case("known, gone", &[&["DEL", known]], "", ""),
        case("known, odd scores", &[&["ZADD", known, "inf", "a:1", "-inf", ESCAPE, "-0", ""]], "", ""),
        case("known, too many", &[&["EVAL", fill, "1", known, "ZADD"]], known, VERSIONED).variant(),
        case("known, giants", &[&["EVAL", giants, "1", known, "ZADD"]], known, VERSIONED).variant(),
        case("states, a text", &[&["SET", states, "x"]], states, "drain maint ready"),
        case("states, odd", &[&["HSET", states, A, ESCAPE, ESCAPE, ESCAPE, "", ""]], "", ""),
        case("states, too many", &[&["EVAL", fill, "1", states, "HSET"]], "", "").variant(),
        case("states, giants", &[&["EVAL", giants, "1", states, "HSET"]], "", "").variant(),
        case("states, a giant of a member", &[&["HSET", states, A, &"x".repeat(32 << 20)]], "", "").variant(),
        case("applied, a text", &[&["SET", applied, "x"]], "", ""),
        case(
            "applied, odd",
            &[&["HSET", applied, ESCAPE, "99999999999999 \u{1b};\u{1b}=7;+x;a=99999999999"]],
            "",
            "",
        )
        .variant(),
        case("applied, giants", &[&["EVAL", giants, "1", applied, "HSET"]], "", "").variant(),
    ];
    try_all(&operator, cases).await;
}
