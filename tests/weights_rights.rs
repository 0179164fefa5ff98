//! The ACL commands in docs/questions/redis-rights.md: a shell accepts them as they are written, and they
//! grant each role what it needs and no more.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    Cluster, LEAST_RIGHTS, Operator, Program, Redis, Server, eventually, free_port, output, require,
};

const A: &str = "10.0.0.1:80";

/// The page about the rights of Redis users, to which config.yaml and the README link.
fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/questions/redis-rights.md");
    fs::read_to_string(path).expect("the page")
}

/// The redis-cli commands of the page as they are written there, over several lines where a line ends in a
/// backslash.
fn commands() -> Vec<String> {
    let text = page();
    let blocks = text.split("```sh\n").skip(1).filter_map(|block| block.split("\n```").next());
    blocks.map(str::to_owned).collect()
}

/// The only command with this beginning.
fn command(beginning: &str) -> String {
    let mut found = commands().into_iter().filter(|command| command.starts_with(beginning));
    let command = found.next().unwrap_or_else(|| panic!("no {beginning:?}"));
    assert_eq!(found.next(), None);
    command
}

/// Runs a command in a shell whose redis-cli connects to `port`. The command must leave no file and no
/// background job.
async fn type_in(shell: &str, port: u16, command: &str) {
    let (programs, folder) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    let client = require("redis-cli", "redis-tools");
    let wrapper = programs.path().join("redis-cli");
    let script = format!("#!/bin/sh\nexec {} -p {} \"$@\"\n", client.display(), port);
    fs::write(&wrapper, script).expect("a file");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&wrapper, executable).expect("a file");
    let path = std::env::var("PATH").expect("a path");
    let mut typed = Command::new(shell);
    typed.arg("-c").arg(format!("{command}\njobs")).current_dir(folder.path());
    typed.env("PATH", format!("{}:{path}", programs.path().display()));
    let done = output(typed).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(
        (text(&done.stdout).as_str(), text(&done.stderr).as_str()),
        ("OK\n", ""),
        "{shell}: {command}"
    );
    let made: Vec<_> = fs::read_dir(folder.path()).expect("a folder").collect();
    assert!(made.is_empty(), "{shell}: {command} makes {made:?}");
}

/// The rights of `user` on the page, without the shell's quotes and line ends.
fn rights_of(user: &str) -> String {
    let command = command(&format!("redis-cli ACL SETUSER {user} on "));
    let (_, rights) = command.split_once(&format!("{user} ")).expect("it is there");
    let words: Vec<&str> = rights.split_whitespace().filter(|word| *word != "\\").collect();
    words.join(" ").replace('\'', "").replace("PASSWORD", "geheim")
}

/// The commands that the server has refused, by its ACL log.
async fn refused(redis: &Redis) -> Vec<String> {
    let log: Vec<redis::Value> = redis::from_redis_value(redis.run("ACL LOG 100").await).expect("a list");
    let object = |entry: redis::Value| {
        let fields: std::collections::HashMap<String, redis::Value> =
            redis::from_redis_value(entry).expect("a map");
        redis::from_redis_value::<String>(fields["object"].clone()).expect("a text")
    };
    log.into_iter().map(object).collect()
}

/// An operator with a proxy that follows and reports. Its commands run as the user `bob`, which has these
/// rights.
async fn operator_with(rights: &str) -> (Operator, Program) {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    let program = Program::run(&operator.yaml(""));
    eventually("it reports", || async {
        operator.json("get web").await["applied"]["are_all"] == Value::Bool(true)
    })
    .await;
    operator.redis.grant_to("bob", rights).await;
    operator.write_config("username: bob, password: geheim,");
    (operator, program)
}

/// True if all commands that only read work and show the proxy that has the table.
async fn can_read(operator: &Operator) -> bool {
    let (get, history) = (operator.weights("get web --json").await, operator.weights("history web").await);
    if (get.code, history.code) != (Some(0), Some(0)) {
        return false;
    }
    let get: Value = serde_json::from_str(&get.stdout).expect("JSON");
    get["applied"]["have"].as_array().is_some_and(|have| have.len() == 1)
}

/// True if all commands that write work.
async fn can_write(operator: &Operator) -> bool {
    for words in [
        "drain web 10.0.0.1:80",
        "ready web 10.0.0.1:80",
        "set web 10.0.0.1:80=2 --wait=20s",
        "remove web 10.0.0.1:80",
        "rollback web",
        "history web",
    ] {
        if operator.weights(words).await.code != Some(0) {
            return false;
        }
    }
    true
}

/// Commands that the editor must be able to run.
const OF_THE_EDITOR: [&str; 9] = [
    "set web 10.0.0.1:80=2 10.0.0.2:80=1 --wait=20s",
    "remove web 10.0.0.2:80 --wait=20s",
    "rollback web --wait=20s",
    "drain web 10.0.0.1:80 --wait=20s",
    "maint web 10.0.0.1:80",
    "ready web 10.0.0.1:80",
    "history web",
    "simulate web 10.0.0.1:80=3",
    "get web --json",
];

#[tokio::test]
async fn each_role_works_with_the_command_of_the_page_as_a_shell_runs_it() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    for shell in ["sh", "bash"] {
        for user in ["statera", "viewer", "editor"] {
            let command = command(&format!("redis-cli ACL SETUSER {user} on "));
            type_in(shell, operator.redis.port, &command).await;
        }
        type_in(shell, operator.redis.port, &command("redis-cli ACL SETUSER statera '+cluster")).await;
    }
    let _program = Program::run(&operator.yaml("username: statera, password: PASSWORD,"));
    eventually("it reports", || async {
        operator.json("get web").await["applied"]["are_all"] == Value::Bool(true)
    })
    .await;
    operator.write_config("username: editor, password: PASSWORD,");
    for words in OF_THE_EDITOR {
        operator.done(words).await;
    }
    assert_eq!(refused(&operator.redis).await, [""; 0]);
    operator.write_config("username: viewer, password: PASSWORD,");
    for words in ["get web", "history web", "simulate web 10.0.0.1:80=3"] {
        operator.done(words).await;
    }
    // `history` tries to enter the changes of other programs by `eval`, which a viewer may not use.
    assert_eq!(refused(&operator.redis).await, ["eval"]);
}

#[tokio::test]
async fn in_a_cluster_each_role_works_with_the_rights_that_the_page_adds() {
    let cluster = Cluster::start().await;
    for node in &cluster.nodes {
        for user in ["statera", "viewer", "editor"] {
            type_in("sh", node.port, &command(&format!("redis-cli ACL SETUSER {user} on "))).await;
            let more = command("redis-cli ACL SETUSER statera '+cluster");
            type_in("sh", node.port, &more.replace("statera", user)).await;
        }
    }
    let yaml = |user: &str| {
        format!(
            "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
             redis: {{{}, username: {user}, password: PASSWORD, connect_timeout: 10s, response_timeout: 10s}}\n",
            cluster.section()
        )
    };
    let _program = Program::run(&yaml("statera"));
    let folder = TempDir::new().expect("a folder");
    let config = folder.path().join("config.yaml");
    for (user, words) in [("editor", &OF_THE_EDITOR[..]), ("viewer", &["get web", "history web"])] {
        fs::write(&config, yaml(user)).expect("a file");
        for words in words {
            let mut typed = Command::new(Program::path());
            typed.arg("weights").args(words.split(' ')).arg("-c").arg(&config);
            let done = output(typed).await;
            assert!(done.status.success(), "{user}: {words}: {done:?}");
        }
    }
}

#[tokio::test]
async fn a_sentinel_accepts_the_command_of_the_page() {
    let port = free_port();
    let _sentinel = Server::start(|folder| {
        let config = folder.join("sentinel.conf");
        fs::write(&config, format!("port {port}\nbind 127.0.0.1\n")).expect("a file");
        let mut sentinel = Command::new(Redis::program());
        sentinel.arg(config).arg("--sentinel").current_dir(folder);
        sentinel
    });
    eventually("the sentinel listens", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;
    let command = command("redis-cli -p 26379 ACL SETUSER statera on ");
    type_in("sh", port, &command.replace("26379", &port.to_string())).await;
}

/// The rights without one command, for each command. Those of the handshake are left: the library decides
/// whether to send them.
fn without_each(rights: &str) -> impl Iterator<Item = (&str, String)> {
    let of_the_handshake = ["+hello", "+auth", "+select"];
    let commands =
        rights.split(' ').filter(move |word| word.starts_with('+') && !of_the_handshake.contains(word));
    commands.map(move |command| {
        let kept: Vec<&str> = rights.split(' ').filter(|word| *word != command).collect();
        (command, format!("reset {}", kept.join(" ")))
    })
}

#[tokio::test]
async fn a_viewer_needs_exactly_the_rights_of_the_page_and_writes_nothing() {
    let rights = rights_of("viewer");
    let (operator, _program) = operator_with(&rights).await;
    assert!(can_read(&operator).await, "{rights}");
    assert_eq!(operator.weights(&format!("set web {A}=5")).await.code, Some(1));
    for (command, rights) in without_each(&rights) {
        operator.redis.grant_to("bob", &rights).await;
        operator.redis.run("ACL LOG RESET").await;
        let can = can_read(&operator).await;
        assert!(!can || is_missed(&operator, command).await, "{command} is not needed");
    }
}

#[tokio::test]
async fn an_editor_needs_exactly_the_rights_of_the_page() {
    let rights = rights_of("editor");
    let (operator, _program) = operator_with(&rights).await;
    assert!(can_write(&operator).await && can_read(&operator).await, "{rights}");
    for (command, rights) in without_each(&rights) {
        operator.redis.grant_to("bob", &rights).await;
        operator.redis.run("ACL LOG RESET").await;
        let can = can_write(&operator).await && can_read(&operator).await;
        assert!(!can || is_missed(&operator, command).await, "{command} is not needed");
    }
}

/// True if the command was tried and refused: some commands work without it by a fallback.
async fn is_missed(operator: &Operator, command: &str) -> bool {
    refused(&operator.redis).await.iter().any(|refused| format!("+{refused}") == command)
}

#[tokio::test]
async fn a_proxy_with_the_rights_of_the_page_reports() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    let rights = rights_of("statera").replace("geheim", "secret");
    let page = page();
    let (_, seen) = page.split_once("Without `").expect("what may be left out");
    let (seen, _) = seen.split_once("` the proxy follows all the same").expect("its end");
    let seen = seen.replace('\'', "");
    let may_go = |right: &&str| !seen.split(' ').any(|seen| seen == *right);
    let least = rights.split(' ').filter(may_go).collect::<Vec<_>>().join(" ");
    let sorted = |rights: &str| {
        let mut words: Vec<String> = rights.split(' ').map(str::to_owned).collect();
        words.sort();
        words
    };
    assert_eq!(sorted(&least), sorted(LEAST_RIGHTS));
    operator.redis.grant_to("proxy", &rights).await;
    let _program = Program::run(&operator.yaml("username: proxy, password: secret,"));
    eventually("it is seen", || async {
        operator.json("get web").await["applied"]["have"].as_array().is_some_and(|have| have.len() == 1)
    })
    .await;
}

#[test]
fn the_companion_keys_are_listed_on_the_page() {
    let page = page();
    let (_, keys) = page.split_once("## The keys beside the weights key").expect("a part of the page");
    for key in ["{servers}:version", "{servers}:history", "{servers}:known", "{servers}:applied"] {
        assert!(keys.contains(key), "{key}: {keys}");
    }
}
