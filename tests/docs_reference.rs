//! The pages of `docs/reference` against what the program really has: a row too many or too few on either
//! side fails.
//!
//! A table of a page is read by the heading above it. The first column of a row is the name, in backticks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};
use statera::config::{Config, Warnings};
use tempfile::TempDir;
use tokio::net::TcpSocket;

use crate::support::{Backend, Operator, Program, Redis, dead_address, echo, eventually, output};

/// One row of a table: the cells without the backticks around them.
#[derive(Clone, Debug)]
struct Row {
    /// The text of the nearest heading above, without backticks.
    heading: String,
    cells: Vec<String>,
    /// The cells that are one text in backticks, and nothing else.
    is_code: Vec<bool>,
}

/// The rows of all tables of the reference page `name`.
fn rows(name: &str) -> Vec<Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut heading, mut rows, mut is_body) = (String::new(), Vec::new(), false);
    for line in text.lines() {
        if let Some(title) = line.strip_prefix('#') {
            heading = title.trim_start_matches('#').trim().replace('`', "");
        }
        let Some(inside) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else {
            is_body = line.starts_with("|---") || (is_body && line.starts_with('|'));
            continue;
        };
        if is_body {
            let cells: Vec<&str> = inside.split(" | ").map(str::trim).collect();
            let code = |cell: &&str| {
                cell.len() > 1
                    && cell.starts_with('`')
                    && cell.ends_with('`')
                    && cell.matches('`').count() == 2
            };
            rows.push(Row {
                heading: heading.clone(),
                is_code: cells.iter().map(code).collect(),
                cells: cells.iter().map(|cell| cell.trim_matches('`').to_owned()).collect(),
            });
        }
    }
    assert!(!rows.is_empty(), "{} has no table", path.display());
    rows
}

/// Fails with what only one side has.
fn assert_same(page: &str, on_the_page: &BTreeSet<String>, in_the_program: &BTreeSet<String>) {
    let missing: Vec<_> = in_the_program.difference(on_the_page).collect();
    let too_many: Vec<_> = on_the_page.difference(in_the_program).collect();
    assert!(
        missing.is_empty() && too_many.is_empty(),
        "docs/reference/{page}\n  lacks rows for {missing:?}\n  has rows that the program does not know: \
         {too_many:?}"
    );
}

// Config keys.

const UNKNOWN: &str = "no-key-has-this-name-at-all";

/// A config with every section present, so that what is left out in it takes its default.
fn whole_config() -> Value {
    json!({
        "redis": {},
        "lua_pick": {},
        "listeners": {"web": {"bind": "127.0.0.1:0", "pool": "web"}},
        "pools": {"web": {}},
        "admin": {"bind": "127.0.0.1:0"},
    })
}

/// Writes `value` at `path` into a config, and what a section of that path cannot be without.
fn with(mut config: Value, path: &[&str], value: Value) -> Value {
    let mut at = &mut config;
    for (depth, key) in path.iter().enumerate() {
        let key = if *key == "NAME" { "web" } else { key };
        if !at.is_object() {
            *at = json!({});
        }
        let map = at.as_object_mut().expect("it is one now");
        if depth + 1 == path.len() {
            map.insert(key.to_owned(), value);
            break;
        }
        at = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
        if path[..=depth] == ["redis", "sentinel"] {
            *at = json!({"master": "main", "nodes": ["10.0.0.1"]});
        } else if path[..=depth] == ["redis", "cluster"] {
            *at = json!({"nodes": ["10.0.0.1"]});
        }
    }
    config
}

fn problems(config: &Value) -> String {
    Config::from_yaml(&config.to_string()).err().map(|error| error.to_string()).unwrap_or_default()
}

/// The keys that the section at `path` may have, by the message about one that it may not have; `None`: it is
/// no section.
fn known_keys(path: &[&str]) -> Option<Vec<String>> {
    let asked: Vec<&str> = path.iter().copied().chain([UNKNOWN]).collect();
    let problems = problems(&with(whole_config(), &asked, json!(1)));
    let line = problems.lines().find(|line| line.contains(UNKNOWN) && line.contains("known here are "))?;
    let (_, keys) = line.split_once("known here are ").expect("it is there");
    let keys = keys.split(" (line ").next().expect("a first part");
    Some(keys.split(", ").map(str::to_owned).collect())
}

/// Every key that the decoder knows, with the path of its section.
fn decoder_keys() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut sections: Vec<Vec<String>> = vec![Vec::new()];
    while let Some(section) = sections.pop() {
        let path: Vec<&str> = section.iter().map(String::as_str).collect();
        let Some(keys) = known_keys(&path) else { continue };
        for key in keys {
            let mut below: Vec<String> = section.iter().cloned().chain([key]).collect();
            found.insert(below.join("."));
            if ["listeners", "pools"].contains(&below.join(".").as_str()) {
                below.push("NAME".to_owned());
            }
            sections.push(below);
        }
    }
    found
}

fn key_of(row: &Row) -> String {
    if row.heading == "Top level" {
        row.cells[0].clone()
    } else {
        format!("{}.{}", row.heading, row.cells[0])
    }
}

#[test]
fn the_page_of_config_keys_has_every_key_that_the_decoder_knows_and_no_other() {
    let page: BTreeSet<String> =
        rows("config.md").iter().filter(|row| row.cells.len() == 4).map(key_of).collect();
    let decoder = decoder_keys();
    assert!(decoder.contains("pools.NAME.health_check.send.hex") && decoder.len() > 60, "{decoder:?}");
    assert_same("config.md", &page, &decoder);
}

#[test]
fn the_keys_that_the_page_calls_not_supported_yet_are_refused_as_such() {
    let later: Vec<Row> = rows("config.md").into_iter().filter(|row| row.cells.len() == 2).collect();
    assert!(!later.is_empty());
    for row in later {
        let path: Vec<&str> = row.cells[0].split('.').collect();
        let problems = problems(&with(whole_config(), &path, json!(1)));
        assert!(problems.contains("not supported yet"), "{}: {problems}", row.cells[0]);
    }
}

#[test]
fn each_default_on_the_page_of_config_keys_is_what_the_decoder_takes_where_the_key_is_left_out() {
    let mut held = 0;
    for row in rows("config.md").iter().filter(|row| row.cells.len() == 4 && row.is_code[2]) {
        let key = key_of(row);
        let path: Vec<&str> = key.split('.').collect();
        let written = row.cells[2].replace("NAME", "web");
        let value: Value = match written.as_str() {
            "{}" => json!({}),
            "\"\"" => json!(""),
            text => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        };
        // A section that is left out may mean something else than one that is empty.
        let mut base = whole_config();
        if path.len() > 2 || (path.len() == 2 && path[0] != "pools" && path[0] != "listeners") {
            let section = &path[..path.len() - 1];
            if !["redis", "admin", "pools.NAME", "listeners.NAME"].contains(&section.join(".").as_str()) {
                base = with(base, section, json!({}));
            }
            if section == ["redis", "sentinel"] {
                base = with(base, section, json!({"master": "main", "nodes": ["10.0.0.1"]}));
            } else if section == ["redis", "cluster"] {
                base = with(base, section, json!({"nodes": ["10.0.0.1"]}));
            }
            if section == ["admin"] {
                base = with(base, section, json!({}));
            }
        }
        let meaning = |config: &Value| match Config::from_yaml(&config.to_string()) {
            // A setting without effect is warned of where it is written.
            Ok(config) => format!("{:?}", Config { warnings: Warnings::default(), ..config }),
            Err(error) => panic!("{key}: {error}\n{config}"),
        };
        assert_eq!(meaning(&base), meaning(&with(base.clone(), &path, value)), "{key}: {written}");
        held += 1;
    }
    assert!(held > 45, "only {held} defaults are held");
}

// Metrics and the access log.

/// What a scrape declares: name → type.
fn types(metrics: &str) -> BTreeMap<String, String> {
    let types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

/// The labels of a metric's first series, without those that every histogram has; `None`: it has no series.
fn labels(metrics: &str, name: &str, kind: &str) -> Option<BTreeSet<String>> {
    let of_it = |line: &str| {
        let rest = line.strip_prefix(name)?;
        let rest = if kind == "histogram" { rest.strip_prefix("_bucket")? } else { rest };
        let series = rest.rsplit_once(' ')?.0;
        (series.is_empty() || series.starts_with('{')).then(|| series.to_owned())
    };
    let series = metrics.lines().find_map(of_it)?;
    let pairs = series.trim_matches(['{', '}']).split("\",");
    let names = pairs.filter_map(|pair| pair.split_once('=')).map(|(name, _)| name.trim_start_matches(','));
    Some(names.filter(|name| *name != "le").map(str::to_owned).collect())
}

/// The values that a label has in a scrape.
fn values(metrics: &str, name: &str, label: &str) -> BTreeSet<String> {
    let beginning = format!("{label}=\"");
    let series = metrics.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    let values = series.filter_map(|line| line.split_once(&beginning)?.1.split_once('"'));
    values.map(|(value, _)| value.to_owned()).collect()
}

/// A proxy with everything that has a metric, and lines of sessions that ended well and badly.
struct Busy {
    operator: Operator,
    program: Program,
    _backends: [Backend; 2],
    _dead: (TcpSocket, SocketAddr),
    _folder: TempDir,
}

impl Busy {
    async fn start() -> Self {
        let (redis, backends) = (Redis::start().await, [Backend::echo().await, Backend::echo().await]);
        let dead = dead_address();
        redis.run("CONFIG SET notify-keyspace-events KA").await;
        redis
            .run(&format!("ZADD servers 1 {} 1 {} 1 {}", backends[0].address, backends[1].address, dead.1))
            .await;
        let folder = TempDir::new().expect("a folder");
        let operator = Operator::with(redis, "servers");
        let yaml = operator.yaml("").replace(
            "backends: {\"127.0.0.1:9\": 1}",
            // All are checked at a port that answers, so that the dead one gets sessions.
            &format!(
                "balance: weighted_round_robin, outlier: off, max_connections: 100, \
                 health_check: {{interval: 50ms, port: {}}}",
                backends[0].address.port()
            ),
        );
        let program = Program::run(&format!(
            "{yaml}state_dir: {}\nadmin: {{bind: \"127.0.0.1:0\"}}\n",
            folder.path().join("state").display()
        ));
        operator.done(&format!("drain web {}", backends[1].address)).await;
        let address = program.addresses().await.0[0];
        eventually("weights have come by a notification", || async {
            operator.done(&format!("set web {}={}", backends[0].address, fastrand::u32(1..100))).await;
            program.metric("statera_weight_propagation_seconds_count", "").await > 0.0
        })
        .await;
        eventually("a session was retried", || async {
            assert_eq!(echo(address, b"ping").await.expect("an answer"), b"ping");
            program.log().contains("\"failed\":")
        })
        .await;
        eventually("a check was made", || async {
            program.metric("statera_backend_health_checks_total", "passed").await > 0.0
        })
        .await;
        Self { operator, program, _backends: backends, _dead: dead, _folder: folder }
    }
}

#[tokio::test]
async fn the_page_of_metrics_has_every_metric_of_a_scrape_with_its_type_and_labels() {
    let busy = Busy::start().await;
    let metrics = busy.program.metrics().await;
    let scraped = types(&metrics);
    let page = rows("metrics.md");
    let on_the_page = page.iter().map(|row| format!("{} {} {}", row.cells[0], row.cells[1], row.cells[2]));
    let in_the_program = scraped.iter().map(|(name, kind)| {
        let labels =
            labels(&metrics, name, kind).unwrap_or_else(|| panic!("no series of {name}:\n{metrics}"));
        // In the order of the page, so that only what differs is told.
        let written = page.iter().find(|row| row.cells[0] == *name).map(|row| row.cells[2].clone());
        let names = |text: &str| -> BTreeSet<String> {
            text.split(' ').map(|label| label.trim_matches('`').to_owned()).filter(|l| l != "none").collect()
        };
        let found = match written {
            Some(text) if names(&text) == labels => text,
            _ => labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(" "),
        };
        format!("{name} {kind} {found}")
    });
    assert_same("metrics.md", &on_the_page.collect(), &in_the_program.collect());
}

#[tokio::test]
async fn the_page_of_the_access_log_has_every_field_source_and_reason() {
    let busy = Busy::start().await;
    let metrics = busy.program.metrics().await;
    let page = rows("access-log.md");
    let below = |heading: &str| -> BTreeSet<String> {
        page.iter().filter(|row| row.heading == heading).map(|row| row.cells[0].clone()).collect()
    };
    assert_same(
        "access-log.md, sources",
        &below("Source"),
        &values(&metrics, "statera_picks_total", "source"),
    );
    let reasons = values(&metrics, "statera_sessions_closed_total", "reason");
    assert_same("access-log.md, reasons", &below("Why a session ended"), &reasons);

    // The backends that are left refuse connections, so that this session ends with an error.
    let Busy { operator, program, _backends: [alive, _], .. } = &busy;
    let address = program.addresses().await.0[0];
    operator.done(&format!("set web {}=0", alive.address)).await;
    eventually("a session fails", || async {
        let _ = echo(address, b"ping").await;
        program.log().contains("\"error\":\"connection refused\"},")
            || program.log().contains("connect_failed")
    })
    .await;
    let log = program.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Map<String, Value>>(line).ok());
    let fields = lines
        .filter(|line| line.contains_key("close_reason"))
        .flat_map(|line| line.into_iter().map(|(field, _)| field).collect::<Vec<_>>());
    assert_same("access-log.md, fields", &below("Access log"), &fields.collect());
}

// Keys of Redis.

#[tokio::test]
async fn the_page_of_redis_keys_has_every_key_that_statera_makes_with_its_type() {
    let busy = Busy::start().await;
    eventually("the proxy reports what it has applied", || async {
        busy.operator.json("get web").await["applied"]["are_all"] == Value::Bool(true)
    })
    .await;
    let mut connection = busy.operator.redis.connection().await;
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut connection).await.expect("keys");
    let mut found = BTreeSet::new();
    for key in keys {
        let kind: String = redis::cmd("TYPE").arg(&key).query_async(&mut connection).await.expect("a type");
        found.insert(format!("{key} {kind}"));
    }
    let page = rows("redis-keys.md").iter().map(|row| format!("{} {}", row.cells[0], row.cells[1])).collect();
    assert_same("redis-keys.md", &page, &found);
}

// Commands.

/// The lines of a part of a help text: what stands before the description, by two blanks or the line's end.
fn entries(help: &str, part: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != format!("{part}:")).skip(1);
    let lines = lines.take_while(|line| line.starts_with("  "));
    lines.map(|line| line.trim().split("  ").next().expect("a first part").to_owned()).collect()
}

/// Every command below `words` with its arguments and options, as `statera weights get: --json`.
async fn documented_by_help(words: Vec<String>, found: &mut BTreeSet<String>) {
    let mut waiting = vec![words];
    while let Some(words) = waiting.pop() {
        let mut command = Command::new(Program::path());
        // The short help: a line for each.
        command.args(&words).arg("-h");
        let help = String::from_utf8(output(command).await.stdout).expect("a text");
        let commands = entries(&help, "Commands");
        let name = ["statera".to_owned()].iter().chain(&words).cloned().collect::<Vec<_>>().join(" ");
        if commands.is_empty() {
            found.insert(name.clone());
        }
        for entry in entries(&help, "Arguments").into_iter().chain(entries(&help, "Options")) {
            if entry != "-h, --help" && entry != "-V, --version" {
                found.insert(format!("{name}: {entry}"));
            }
        }
        for command in commands.into_iter().filter(|command| command != "help") {
            waiting.push(words.iter().cloned().chain([command]).collect());
        }
    }
}

#[tokio::test]
async fn the_page_of_commands_has_every_command_and_option_of_the_help() {
    let mut help = BTreeSet::new();
    documented_by_help(Vec::new(), &mut help).await;
    assert!(help.contains("statera weights set: --wait[=<TIME>]"), "{help:?}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/commands.md");
    let text = fs::read_to_string(path).expect("the page");
    let headings = text.lines().filter_map(|line| line.strip_prefix("## `")?.strip_suffix('`'));
    let commands = rows("commands.md").into_iter().filter(|row| row.heading.starts_with("statera "));
    let page = headings
        .map(str::to_owned)
        .chain(commands.map(|row| format!("{}: {}", row.heading, row.cells[0])))
        .collect();
    assert_same("commands.md", &page, &help);
}
