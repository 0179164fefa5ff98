//! `statera weights`: changes are made completely or not at all, each gets a version and a history entry,
//! and can be undone.

use std::os::unix::ffi::OsStrExt as _;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{CommandOutput, Operator, Proxy, Redis, eventually};

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";
const C: &str = "unix:/run/c.sock";

fn table(members: &[(&str, f64)]) -> Vec<(String, f64)> {
    members.iter().map(|(member, weight)| ((*member).to_owned(), *weight)).collect()
}

/// The entries of a history as `VERSION WHAT`, newest first.
fn outline(history: &Value) -> Vec<String> {
    let entries = history["entries"].as_array().expect("a list");
    entries.iter().map(|e| format!("{} {}", e["version"], e["what"].as_str().expect("a text"))).collect()
}

#[tokio::test]
async fn several_members_are_set_at_once_and_get_shows_shares_version_and_author() {
    let operator = Operator::start().await;
    let proxy = Proxy::start(&operator.yaml("resync_interval: 1h,"));
    let set = operator
        .weights_of(&[
            "set",
            "web",
            &format!("{A}=300"),
            &format!("{B}=0.1"),
            &format!("{C}=0"),
            "--reason",
            "new rack",
        ])
        .await;
    assert_eq!((set.code, set.stderr.as_str()), (Some(0), ""));
    assert!(set.stdout.starts_with("web: version 1\n") && set.stdout.contains("new, 300"), "{}", set.stdout);
    assert_eq!(operator.table().await, table(&[(A, 300.0), (B, 0.1), (C, 0.0)]));
    eventually("the proxy has it", || async { proxy.weights() == table(&[(A, 300.0), (B, 0.1), (C, 0.0)]) })
        .await;

    operator.done(&format!("set web {B}=100")).await;
    let set = operator.json(&format!("set web {A}=300 {B}=100")).await;
    assert_eq!(
        (&set["version"], &set["changes"]),
        (&json!(2), &json!([])),
        "nothing to change is no version"
    );

    let get = operator.weights("get web").await;
    assert_eq!((get.code, get.stderr.as_str()), (Some(0), ""));
    for part in ["pool web, key servers, version 2", "jo@", "MEMBER", "75.0 %", "25.0 %", "0.0 %", C] {
        assert!(get.stdout.contains(part), "{part}: {}", get.stdout);
    }
    let get = operator.json("get web").await;
    assert_eq!(
        get["members"][0],
        json!({"member": A, "weight": 300.0, "share_percent": 75.0, "state": "ready"})
    );
    assert_eq!(get["last_change"]["changes"], json!([{"member": B, "old": "0.1", "new": "100"}]));
    assert!(get["last_change"]["who"].as_str().expect("a text").starts_with("jo@"), "{get}");

    operator.done(&format!("remove web {A} {C}")).await;
    assert_eq!(operator.table().await, table(&[(B, 100.0)]));
}

#[tokio::test]
async fn nothing_is_changed_unless_the_whole_change_is_valid() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    for (words, code, why) in [
        (format!("set web {A}=5 {B}=-1"), 2, "-1 is not a weight"),
        (format!("set web {A}=5 10.0.0.256:80=1"), 2, "10.0.0.256:80=1: its host is neither"),
        (format!("set web {A}=5 {A}=6"), 2, "named twice"),
        (format!("set web {A}=5 {B}=5 --if-version 7"), 1, "servers is at version 1, not at 7"),
        (format!("remove web {A} {B}"), 1, "servers has no member 10.0.0.2:80"),
        (format!("remove web {A} --if-version 0"), 1, "servers is at version 1, not at 0"),
        ("rollback web 2".to_owned(), 1, "no such version: the newest is 1"),
        (format!("set wep {A}=5"), 2, "there is no pool \"wep\""),
        ("set web".to_owned(), 2, "MEMBER=WEIGHT"),
    ] {
        let typed = operator.weights(&words).await;
        assert_eq!((typed.code, typed.stdout.as_str()), (Some(code), ""), "{words}: {}", typed.stderr);
        assert!(typed.stderr.contains(why), "{words}: {}", typed.stderr);
        assert_eq!(operator.table().await, table(&[(A, 1.0)]), "{words}");
    }
    assert_eq!(outline(&operator.json("history web").await), ["1 set"]);
}

#[tokio::test]
async fn of_writers_that_expect_the_same_version_exactly_one_wins() {
    let operator = Operator::start().await;
    for round in 0..5 {
        let mut writers = JoinSet::new();
        for writer in 1..=6 {
            let command = operator.command(&[
                "set",
                "web",
                &format!("{A}={writer}"),
                &format!("{B}={round}"),
                "--if-version",
                &round.to_string(),
            ]);
            writers.spawn(async move { (writer, CommandOutput::of(command).await) });
        }
        let all = writers.join_all().await;
        let won: Vec<i32> =
            all.iter().filter(|(_, typed)| typed.code == Some(0)).map(|(writer, _)| *writer).collect();
        assert_eq!(won.len(), 1, "{all:?}");
        for (_, lost) in all.iter().filter(|(_, typed)| typed.code != Some(0)) {
            assert_eq!(lost.code, Some(1));
            let both = format!("is at version {}, not at {round}", round + 1);
            assert!(lost.stderr.contains(&both), "{}", lost.stderr);
        }
        assert_eq!(operator.table().await, table(&[(A, f64::from(won[0])), (B, f64::from(round))]));
    }
}

#[tokio::test]
async fn a_change_by_hand_is_entered_in_the_history_once_noticed() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    assert!(operator.weights("get web").await.stdout.contains("no command has changed it yet"));
    operator.done(&format!("set web {A}=2")).await;
    operator.redis.run(&format!("ZADD servers 0.1 {B}")).await;
    let get = operator.weights("get web").await;
    assert!(
        get.stdout.contains("version 1")
            && get.stdout.contains("1 member changed by another program since then"),
        "{}",
        get.stdout
    );
    // The next command notices the change by hand and enters it before its own.
    operator.done(&format!("set web {C}=3")).await;
    operator.redis.run(&format!("ZREM servers {A}")).await;
    // `history` notices and enters it, too.
    let history = operator.json("history web").await;
    assert_eq!(outline(&history), ["2 outside", "2 set", "1 outside", "1 set", "0 outside"]);
    assert_eq!(history["entries"][0]["changes"], json!([{"member": A, "old": "2", "new": null}]));
    assert_eq!(history["entries"][1]["changes"], json!([{"member": C, "old": null, "new": "3"}]));
    assert_eq!(history["entries"][2]["changes"][0]["member"], B);
    assert_eq!(outline(&operator.json("history web").await).len(), 5, "noticed once");
    let text = operator.weights("history web --limit 1").await.stdout;
    assert!(
        text.contains("changed by another program") && text.contains("2, removed") && !text.contains("jo@"),
        "{text}"
    );
}

#[tokio::test]
async fn rollback_brings_back_the_table_of_a_version_as_a_new_version() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 0.1 {A}")).await;
    operator.done(&format!("set web {A}=1 {B}=1")).await;
    // A change by hand belongs to version 1 if it comes before version 2.
    operator.redis.run(&format!("ZADD servers 0 {B}")).await;
    operator.done(&format!("set web {A}=9")).await;
    let back = operator.weights_of(&["rollback", "web", "--reason", "too much"]).await;
    assert!(back.stdout.starts_with("web: version 3, the same table as version 1\n"), "{back:?}");
    assert_eq!(operator.table().await, table(&[(A, 1.0), (B, 0.0)]));
    operator.done("rollback web 2").await;
    assert_eq!(operator.table().await, table(&[(A, 9.0), (B, 0.0)]));
    operator.redis.run(&format!("ZADD servers 7 {C}")).await;
    // A rollback to the current version undoes later changes by hand, whether they are in the history or
    // not.
    assert_eq!(outline(&operator.json("history web --limit 1").await), ["4 outside"]);
    operator.redis.run(&format!("ZADD servers 8 {C}")).await;
    operator.done("rollback web 4").await;
    assert_eq!(operator.table().await, table(&[(A, 9.0), (B, 0.0)]));
    operator.done("rollback web 0").await;
    assert_eq!(operator.table().await, table(&[(A, 0.1)]));
    let history = operator.json("history web").await;
    assert_eq!(outline(&history)[..4], ["6 rollback", "5 rollback", "4 outside", "4 outside"]);
    assert_eq!(
        (&history["entries"][5]["back_to"], &history["entries"][5]["why"]),
        (&json!(1), &json!("too much"))
    );
}

#[tokio::test]
async fn removing_the_last_member_warns_that_proxies_keep_the_last_table() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    let removed = operator.weights(&format!("remove web {A}")).await;
    assert!(
        removed.stdout.contains("proxies keep using the last one (redis.on_empty: keep_last)"),
        "{removed:?}"
    );
    assert!(operator.weights("get web").await.stdout.contains("the table is empty"));
    operator.done("rollback web").await;
    assert_eq!(operator.table().await, table(&[(A, 1.0)]));
}

#[tokio::test]
async fn the_history_stays_short_and_a_rollback_beyond_it_says_so() {
    let operator = Operator::start().await;
    let mut pipe = redis::pipe();
    for version in 1..=3_000 {
        let changes = format!("[[\"{A}\",\"{}\",\"{version}\"]]", version - 1);
        pipe.cmd("XADD")
            .arg("{servers}:history")
            .arg("*")
            .arg("version")
            .arg(version)
            .arg("what")
            .arg("set")
            .arg("changes")
            .arg(changes)
            .ignore();
    }
    for key in ["servers", "{servers}:known"] {
        pipe.cmd("ZADD").arg(key).arg(3_000).arg(A).ignore();
    }
    pipe.query_async::<()>(&mut operator.redis.connection().await).await.expect("written");
    let set = operator.weights(&format!("set web {A}=1")).await;
    assert!(set.stdout.starts_with("web: version 3001\n"), "{set:?}");
    let length = operator.redis.run("XLEN {servers}:history").await;
    assert!(matches!(length, redis::Value::Int(1_000..=1_100)), "{length:?}");
    let back = operator.weights("rollback web 1500").await;
    assert_eq!(back.code, Some(1));
    assert!(back.stderr.contains("version 1500 of servers is not in the history any more"), "{back:?}");
    operator.done("rollback web 2500").await;
    assert_eq!(operator.table().await, table(&[(A, 2_500.0)]));
}

#[tokio::test]
async fn large_tables_are_changed_and_too_large_ones_refused() {
    let operator = Operator::start().await;
    let fill = async |from: u32, to: u32| {
        let mut zadd = redis::cmd("ZADD");
        zadd.arg("servers");
        for member in from..to {
            zadd.arg(1).arg(format!("10.{}.{}.{}:80", member >> 16, member >> 8 & 255, member & 255));
        }
        zadd.query_async::<()>(&mut operator.redis.connection().await).await.expect("written");
    };
    fill(0, 10_000).await;
    operator.done("set web 10.0.0.1:80=5").await;
    operator.redis.run("RENAME servers elsewhere").await;
    operator.done(&format!("set web {A}=1")).await;
    // The rollback restores the 10,000 members and removes the new one.
    operator.done("rollback web").await;
    assert_eq!(operator.table().await.len(), 0);
    fill(0, 10_001).await;
    operator.done("set web 10.0.0.1:80=5").await;
    let back = operator.weights("rollback web 1").await;
    assert_eq!(back.code, Some(1));
    assert!(back.stderr.contains("that is not kept: it was too large"), "{back:?}");
    let history = operator.json("history web").await;
    assert_eq!(history["entries"][1]["changes"], json!({"count": 10_001}));
    fill(10_001, 100_001).await;
    for words in ["get web".to_owned(), format!("set web {A}=1")] {
        let typed = operator.weights(&words).await;
        assert_eq!(typed.code, Some(1));
        assert!(typed.stderr.contains("servers has more than 100000 members: split the pool"), "{typed:?}");
    }
}

#[tokio::test]
async fn a_missing_right_is_named_and_nothing_is_half_changed() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    let commands = ["eval", "zrange", "zadd", "zrem", "get", "set", "xadd", "xrevrange", "zrangestore"];
    for missing in commands.iter().skip(1) {
        let mut user = vec![
            "ACL",
            "SETUSER",
            "bob",
            "reset",
            "on",
            ">geheim",
            "~servers",
            "~{servers}:*",
            "+hello",
            "+select",
        ];
        let granted: Vec<String> =
            commands.iter().filter(|c| *c != missing).map(|c| format!("+{c}")).collect();
        user.extend(granted.iter().map(String::as_str));
        operator.redis.run_words(&user).await;
        operator.write_config("username: bob, password: geheim,");
        let typed = operator.weights(&format!("set web {A}=7 {B}=5")).await;
        assert_eq!(typed.code, Some(1), "{missing}: {typed:?}");
        assert!(typed.stderr.contains(&format!("+{missing} ~")), "{missing}: {}", typed.stderr);
        assert_eq!(operator.table().await, table(&[(A, 1.0)]), "{missing}");
        operator.write_config("");
        assert_eq!(outline(&operator.json("history web").await), ["1 set"], "{missing}");
    }
    // The full list is enough, so each refusal above was due to the one missing right.
    let mut user = vec!["ACL", "SETUSER", "bob"];
    let all: Vec<String> = commands.iter().map(|c| format!("+{c}")).collect();
    user.extend(all.iter().map(String::as_str));
    operator.redis.run_words(&user).await;
    operator.write_config("username: bob, password: geheim,");
    operator.done(&format!("set web {A}=7 {B}=5")).await;
    operator.done("rollback web").await;
}

#[tokio::test]
async fn a_user_who_may_only_read_sees_all_and_writes_nothing() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    operator.redis.run(&format!("ZADD servers 2 {B}")).await;
    let rights = "on >geheim %R~servers %R~{servers}:* +hello +select +eval_ro +zrange +get +xrevrange";
    operator.redis.grant_to("bob", rights).await;
    operator.write_config("username: bob, password: geheim,");
    let get = operator.json("get web").await;
    assert_eq!(get["changed_outside"], json!([{"member": B, "old": null, "new": "2"}]));
    let history = operator.json("history web").await;
    assert_eq!(outline(&history), ["1 set"]);
    assert_eq!(history["not_entered"], json!([{"member": B, "old": null, "new": "2"}]));
    assert!(
        operator
            .weights("history web")
            .await
            .stdout
            .contains("not in the history yet, since this Redis user may not write")
    );
    let set = operator.weights(&format!("set web {A}=5")).await;
    assert_eq!(set.code, Some(1));
    // Redis 6 has neither read-only scripts nor read-only keys, so there the first write is refused.
    let cure = if Redis::is_before_7() { "+zadd ~servers" } else { "+eval ~servers ~{servers}:*" };
    assert!(set.stderr.contains(&format!("grant the ACL user {cure}")), "{}", set.stderr);
}

#[tokio::test]
async fn what_prevents_a_command_is_named_with_its_cure_and_exit_code() {
    let mut operator = Operator::start().await;
    for (command, words, why) in [
        ("SET servers x", "get web", "servers holds something else than a sorted set: rename or delete it"),
        ("SET {servers}:history x", "history web", "{servers}:history holds something else than a stream"),
        (
            "LPUSH {servers}:version x",
            "set web a:1=1",
            "{servers}:version holds something else than a number",
        ),
        ("SET {servers}:version x", "get web", "{servers}:version was written by something else"),
        ("XADD {servers}:history * a b", "rollback web 0", "{servers}:history was written by something else"),
    ] {
        operator.redis.run("FLUSHALL").await;
        operator.redis.run(command).await;
        operator.redis.run("INCRBY {other} 1").await;
        if words.starts_with("rollback") {
            operator.redis.run("SET {servers}:version 1").await;
        }
        let typed = operator.weights(words).await;
        assert_eq!((typed.code, typed.stdout.as_str()), (Some(1), ""), "{command}");
        assert!(typed.stderr.contains(why), "{command}: {}", typed.stderr);
    }
    operator.redis.run("FLUSHALL").await;
    let typed = operator.weights("rollback web").await;
    assert!(typed.stderr.contains("no command has changed servers yet"), "{typed:?}");
    let unknown = operator.weights("get db").await;
    assert_eq!(unknown.code, Some(2));
    assert!(
        unknown.stderr.contains("there is no pool \"db\"") && unknown.stderr.contains("its pools are web"),
        "{unknown:?}"
    );
    operator.redis.kill();
    for words in ["get web", "set web a:1=1", "history web", "remove web a:1", "rollback web"] {
        let typed = operator.weights(words).await;
        assert_eq!((typed.code, typed.stdout.as_str()), (Some(4), ""), "{words}");
        assert!(
            typed.stderr.contains("redis at redis://127.0.0.1:") && typed.stderr.contains("is it up"),
            "{typed:?}"
        );
    }
}

#[tokio::test]
async fn a_pool_without_redis_has_no_weights_to_change() {
    let operator = Operator::start().await;
    let folder = tempfile::TempDir::new().expect("a folder");
    let path = folder.path().join("alone.yaml");
    let yaml = operator.yaml("");
    let alone = yaml.split("redis:").next().expect("a part").replace("weights_key: \"servers\", ", "");
    std::fs::write(&path, alone).expect("a file");
    let mut command = std::process::Command::new(crate::support::Program::path());
    command.args(["weights", "get", "web", "-c"]).arg(&path);
    let typed = CommandOutput::of(command).await;
    assert_eq!(typed.code, Some(2));
    assert!(typed.stderr.contains("has no redis section"), "{typed:?}");
}

#[tokio::test]
async fn a_replica_and_a_full_server_refuse_with_the_cure_and_change_nothing() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    operator.redis.run("CONFIG SET maxmemory 1").await;
    let full = operator.weights(&format!("set web {A}=2")).await;
    assert_eq!(full.code, Some(1));
    assert!(full.stderr.contains("memory"), "{full:?}");
    operator.redis.run("CONFIG SET maxmemory 0").await;
    let primary = Redis::start().await;
    operator.redis.run("CONFIG SET replica-serve-stale-data yes").await;
    operator.redis.run(&format!("REPLICAOF 127.0.0.1 {}", primary.port)).await;
    eventually("a replica refuses", || async {
        let typed = operator.weights(&format!("set web {A}=2")).await;
        typed.code == Some(1) && typed.stderr.contains("primary")
    })
    .await;
    operator.redis.run("REPLICAOF NO ONE").await;
}

#[tokio::test]
async fn in_a_cluster_all_keys_of_a_pool_share_one_slot() {
    let redis = Redis::start_with(&["--cluster-enabled", "yes", "--notify-keyspace-events", "KA"]).await;
    // Redis 6.2 has no ADDSLOTSRANGE.
    let slots = (0..16_384).map(|slot| slot.to_string());
    redis
        .run_words(&["CLUSTER", "ADDSLOTS"].map(String::from).into_iter().chain(slots).collect::<Vec<_>>())
        .await;
    eventually("the cluster is up", || async {
        let info = redis.run("CLUSTER INFO").await;
        format!("{info:?}").contains("cluster_state:ok")
    })
    .await;
    let mut operator = Operator::with(redis, "servers");
    for key in ["servers", "statera:{web}:weights"] {
        operator = Operator::with(operator.redis, key);
        operator.done(&format!("set web {A}=1 {B}=2")).await;
        operator.done(&format!("remove web {B}")).await;
        operator.done("rollback web").await;
        assert_eq!(operator.table().await, table(&[(A, 1.0), (B, 2.0)]), "{key}");
        assert_eq!(
            outline(&operator.json("history web").await),
            ["3 rollback", "2 remove", "1 set"],
            "{key}"
        );
    }
    assert!(matches!(operator.redis.run("EXISTS statera:{web}:version").await, redis::Value::Int(1)));
    // No companion key can be in the slot of a key with such braces.
    let operator = Operator::with(operator.redis, "a}b");
    let typed = operator.weights(&format!("set web {A}=1")).await;
    assert_eq!(typed.code, Some(1));
    assert!(typed.stderr.contains("without stray braces"), "{typed:?}");
}

#[tokio::test]
async fn hostile_names_are_shown_escaped_and_can_be_removed() {
    let operator = Operator::start().await;
    let hostile = b"a\x1b[2J\xc2\x9b31m\n\xff:80";
    operator.redis.run_words(&[b"ZADD".as_slice(), b"servers", b"1", hostile]).await;
    operator.redis.run(&format!("ZADD servers -5 {A} inf {B}")).await;
    let reason = "look\x1b[31m\nhere\u{202e}";
    let set = operator.weights_of(&["set", "web", &format!("{C}=1"), "--reason", reason]).await;
    assert_eq!(set.code, Some(0));
    for words in ["get web", "get web --json", "history web", "history web --json", "remove web stranger"] {
        let typed = operator.weights(words).await;
        for text in [&typed.stdout, &typed.stderr] {
            let raw = text.chars().find(|c| c.is_control() && *c != '\n' || *c == '\u{202e}');
            assert_eq!(raw, None, "{words}: {text:?}");
        }
    }
    let get = operator.json("get web").await;
    assert_eq!(
        (get["members"].as_array().map(Vec::len), get["left_out"].as_array().map(Vec::len)),
        (Some(1), Some(3))
    );
    let hostile = std::ffi::OsStr::from_bytes(hostile);
    let removed = operator
        .weights_of(&[std::ffi::OsStr::new("remove"), "web".as_ref(), hostile, A.as_ref(), B.as_ref()])
        .await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert_eq!(operator.table().await, table(&[(C, 1.0)]));
    // The rollback restores the names byte by byte.
    operator.done("rollback web").await;
    let count = operator.redis.run("ZCARD servers").await;
    assert_eq!(count, redis::Value::Int(4));
    let score = operator.redis.run_words(&[b"ZSCORE".as_slice(), b"servers", hostile.as_bytes()]).await;
    assert!(!matches!(score, redis::Value::Nil), "{score:?}");
}
