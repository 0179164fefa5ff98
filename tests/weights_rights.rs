//! The rights that config.yaml tells people to grant: enough for what they are for, and none too many.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Desk, LEAST_RIGHTS, Program, eventually};

const A: &str = "10.0.0.1:80";

/// The lines of config.yaml's comment after `heading`, up to the next one that has no deeper margin, as one.
fn comment(heading: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.yaml");
    let text = fs::read_to_string(path).expect("the example");
    let lines: Vec<&str> = text.lines().filter_map(|line| line.trim_start().strip_prefix('#')).collect();
    let at = lines.iter().position(|line| line.contains(heading)).unwrap_or_else(|| panic!("no {heading:?}"));
    let (_, first) = lines[at].split_once(heading).expect("it is there");
    let rest = lines[at + 1..].iter().take_while(|line| line.starts_with("   "));
    let all: Vec<&str> =
        std::iter::once(first).chain(rest.copied()).flat_map(str::split_whitespace).collect();
    all.join(" ")
}

/// What stands after `ACL SETUSER name` in the example.
fn rights_of(user: &str) -> String {
    let rights = comment(&format!("ACL SETUSER {user} "));
    assert!(rights.starts_with("on >PASSWORD resetkeys "), "{user}: {rights}");
    rights.replace("PASSWORD", "geheim")
}

/// A desk that a proxy follows and reports to; what is typed there is `bob`'s, who has these rights.
async fn desk_of(rights: &str) -> (Desk, Program) {
    let desk = Desk::start().await;
    desk.redis.run(&format!("ZADD servers 1 {A}")).await;
    let program = Program::run(&desk.yaml(""));
    eventually("it reports", || async {
        desk.json("get web").await["applied"]["are_all"] == Value::Bool(true)
    })
    .await;
    desk.redis.grant_to("bob", rights).await;
    desk.write_config("username: bob, password: geheim,");
    (desk, program)
}

/// True where everything that only reads works, and shows who has the table.
async fn can_read(desk: &Desk) -> bool {
    let (get, history) = (desk.weights("get web --json").await, desk.weights("history web").await);
    if (get.code, history.code) != (Some(0), Some(0)) {
        return false;
    }
    let get: Value = serde_json::from_str(&get.said).expect("JSON");
    get["applied"]["have"].as_array().is_some_and(|have| have.len() == 1)
}

/// True where everything that writes works.
async fn can_write(desk: &Desk) -> bool {
    for words in [
        "drain web 10.0.0.1:80",
        "ready web 10.0.0.1:80",
        "set web 10.0.0.1:80=2 --wait=20s",
        "remove web 10.0.0.1:80",
        "rollback web",
        "history web",
    ] {
        if desk.weights(words).await.code != Some(0) {
            return false;
        }
    }
    true
}

/// Takes each command away in turn. Those of the greeting are sent at once or not at all, by the library's choice.
fn without_each(rights: &str) -> impl Iterator<Item = (&str, String)> {
    let of_the_greeting = ["+hello", "+auth", "+select"];
    let commands =
        rights.split(' ').filter(move |word| word.starts_with('+') && !of_the_greeting.contains(word));
    commands.map(move |command| {
        let kept: Vec<&str> = rights.split(' ').filter(|word| *word != command).collect();
        (command, format!("reset {}", kept.join(" ")))
    })
}

#[tokio::test]
async fn who_may_read_sees_all_by_the_rights_of_the_example_and_writes_nothing() {
    let rights = rights_of("viewer");
    let (desk, _program) = desk_of(&rights).await;
    assert!(can_read(&desk).await, "{rights}");
    assert_eq!(desk.weights(&format!("set web {A}=5")).await.code, Some(1));
    for (command, rights) in without_each(&rights) {
        desk.redis.grant_to("bob", &rights).await;
        assert!(!can_read(&desk).await, "{command} is not needed");
    }
}

#[tokio::test]
async fn who_may_write_needs_the_rights_of_the_example_and_no_others() {
    let rights = rights_of("editor");
    let (desk, _program) = desk_of(&rights).await;
    assert!(can_write(&desk).await && can_read(&desk).await, "{rights}");
    for (command, rights) in without_each(&rights) {
        desk.redis.grant_to("bob", &rights).await;
        assert!(!can_write(&desk).await, "{command} is not needed");
    }
}

#[tokio::test]
async fn a_proxy_is_seen_by_the_rights_of_the_example() {
    let desk = Desk::start().await;
    desk.redis.run(&format!("ZADD servers 1 {A}")).await;
    let least = comment("All that its ACL user needs:");
    let (least, _) = least.split_once(", and that of a sentinel").expect("a sentinel's follow");
    assert_eq!(format!("on >secret {least}"), LEAST_RIGHTS);
    let seen = comment("To be seen by --wait, besides:");
    desk.redis.grant_to("proxy", &format!("{LEAST_RIGHTS} {seen}")).await;
    let _program = Program::run(&desk.yaml("username: proxy, password: secret,"));
    eventually("it is seen", || async {
        desk.json("get web").await["applied"]["have"].as_array().is_some_and(|have| have.len() == 1)
    })
    .await;
}

#[test]
fn the_keys_beside_a_table_are_named() {
    let keys = comment("Keys beside `servers`,");
    for key in ["{servers}:version", "{servers}:history", "{servers}:known", "{servers}:applied"] {
        assert!(keys.contains(key), "{key}: {keys}");
    }
}
