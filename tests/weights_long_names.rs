//! `statera weights` beside members whose names are too long for a backend, of up to megabytes, and beside a
//! history that other programs have written to.

use serde_json::json;

use crate::support::{CommandOutput, Operator};

const A: &str = "10.0.0.1:80";

async fn is_refused(operator: &Operator, words: &str, why: &str) -> CommandOutput {
    let typed = operator.weights(words).await;
    assert_eq!((typed.code, typed.stdout.as_str()), (Some(1), ""), "{words}: {}", typed.stderr);
    assert!(typed.stderr.contains(why), "{words}: {}", typed.stderr);
    assert!(!typed.stderr.contains("redis.url"), "it blames the config: {}", typed.stderr);
    typed
}

async fn zadd(operator: &Operator, key: &str, weight: &str, member: &[u8]) {
    operator.redis.run_words(&[b"ZADD", key.as_bytes(), weight.as_bytes(), member]).await;
}

async fn has_members(operator: &Operator, members: &[(&str, f64)]) {
    let members: Vec<(String, f64)> = members.iter().map(|(m, w)| ((*m).to_owned(), *w)).collect();
    assert_eq!(operator.table().await, members);
}

#[tokio::test]
async fn a_name_too_long_for_a_backend_is_shortened_in_the_history_and_left_alone_by_a_rollback() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    let long = "é".repeat(500_000);
    zadd(&operator, "servers", "5", long.as_bytes()).await;

    let change = json!({"member": "é".repeat(49), "member_bytes": 1_000_000, "old": null, "new": "5"});
    assert_eq!(operator.json("get web").await["changed_outside"], json!([change]));
    let history = operator.weights("history web --limit 1").await;
    assert!(history.stdout.contains("é… (1000000 bytes)  new, 5\n"), "{history:?}");
    assert_eq!(operator.json("history web").await["entries"][0]["changes"], json!([change]));
    let redis::Value::Int(bytes) = operator.redis.run("MEMORY USAGE {servers}:history").await else {
        panic!("no number")
    };
    assert!(bytes < 20_000, "the history takes {bytes} bytes");

    // A rollback neither removes nor restores such a member.
    operator.done(&format!("set web {A}=2")).await;
    let back = operator.done("rollback web 1").await;
    assert_eq!(back.stdout, format!("web: version 3, the same table as version 1\n    {A}  2 -> 1\n"));
    has_members(&operator, &[(A, 1.0), (&long, 5.0)]).await;
    let back = operator.done("rollback web 0").await;
    let left_alone = "1 member not changed: the name is too long for a backend, and the history does not keep such names\n";
    assert!(back.stdout.starts_with(left_alone), "{back:?}");
    has_members(&operator, &[(&long, 5.0)]).await;
    operator.redis.run_words(&["ZREM", "servers", &long]).await;
    let back = operator.json("rollback web 3").await;
    assert_eq!((&back["back_to"], &back["left_alone"]), (&json!(3), &json!(1)));
    has_members(&operator, &[(A, 1.0)]).await;
}

#[tokio::test]
async fn a_member_of_20_mb_is_named_with_its_cure_and_all_works_again_once_it_is_removed() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=1")).await;
    zadd(&operator, "servers", "5", &vec![b'z'; 20_000_000]).await;
    let commands = [
        "get web".to_owned(),
        "get web --json".to_owned(),
        "history web".to_owned(),
        format!("set web {A}=2"),
        format!("remove web {A}"),
        "rollback web".to_owned(),
    ];
    for words in &commands {
        let why = "servers is too large to be read: a member has 20000000 bytes, and no backend's name has more than 512";
        is_refused(&operator, words, why).await;
    }
    assert_eq!(operator.redis.run("ZCARD servers").await, redis::Value::Int(2));
    let errors = is_refused(&operator, "get web", "remove it, by `redis-cli EVAL \"").await.stderr;
    let script = errors.split('"').nth(1).expect("it is in quotes");
    assert!(errors.contains(&format!("\"{script}\" 1 'servers'`")), "{errors}");
    operator.redis.run_words(&["EVAL", script, "1", "servers"]).await;

    has_members(&operator, &[(A, 1.0)]).await;
    for words in &commands {
        operator.done(words).await;
    }
    let history = operator.json("history web").await;
    assert_eq!(history["entries"].as_array().map(Vec::len), Some(4), "{history}");
}

#[tokio::test]
async fn a_table_with_more_bytes_of_names_than_can_be_read_is_refused_with_its_cure() {
    let operator = Operator::start().await;
    let mut words = vec!["ZADD".to_owned(), "servers".to_owned()];
    for member in 0..30_000 {
        words.extend(["1".to_owned(), format!("{member}{}:80", "z".repeat(490))]);
    }
    operator.redis.run_words(&words).await;
    for words in ["get web", "set web a:1=1", "history web"] {
        is_refused(&operator, words, "the names in servers make up more than 12 MiB: split the pool").await;
    }
}

#[tokio::test]
async fn a_history_of_large_changes_is_read_completely_and_in_order() {
    // A read returns five entries, so these are two pages and a part of a third. A debug build takes 0.1 s
    // for each entry.
    const ENTRIES: u64 = 12;
    let operator = Operator::start().await;
    let member = |member: u32| format!("[\"10.0.{}.{}:80\",\"1.5\",\"2.5\"]", member / 250, member % 250);
    let changes: Vec<String> = (0..10_000).map(member).collect();
    let changes = format!("[{}]", changes.join(","));
    let mut pipe = redis::pipe();
    for version in 1..=ENTRIES {
        let mut xadd = redis::cmd("XADD");
        xadd.arg("{servers}:history").arg("*").arg("version").arg(version).arg("what").arg("set");
        pipe.add_command(xadd.arg("count").arg(10_000).arg("changes").arg(&changes).clone()).ignore();
    }
    pipe.query_async::<()>(&mut operator.redis.connection().await).await.expect("written");
    for limit in [1, 5, 7, 12, 13] {
        let history = operator.json(&format!("history web --limit {limit}")).await;
        let entries = history["entries"].as_array().expect("a list");
        let versions: Vec<u64> = entries.iter().filter_map(|entry| entry["version"].as_u64()).collect();
        let newest: Vec<u64> = (1..=ENTRIES).rev().take(limit).collect();
        assert_eq!(versions, newest);
        assert_eq!(entries[0]["changes"].as_array().map(Vec::len), Some(10_000));
    }
}

#[tokio::test]
async fn foreign_content_of_companion_keys_is_named_with_its_cure() {
    let operator = Operator::start().await;
    let giant = "z".repeat(20_000_000);
    let entry =
        |changes: &'static str| ["XADD", "{servers}:history", "*", "version", "1", "changes", changes];

    let mut foreign = entry("").to_vec();
    foreign[6] = &giant;
    operator.redis.run_words(&foreign).await;
    for words in ["get web", "history web", "set web a:1=1"] {
        is_refused(
            &operator,
            words,
            "{servers}:history was written by something else than statera: delete it",
        )
        .await;
    }
    // The large entry is not the newest any more, so only commands that read the whole history find it.
    operator.redis.run_words(&entry("[]")).await;
    operator.done("get web").await;
    is_refused(&operator, "history web", "{servers}:history holds more than statera writes there: delete it")
        .await;
    operator.redis.run("DEL {servers}:history").await;

    zadd(&operator, "{servers}:known", "1", giant.as_bytes()).await;
    for words in ["get web", "history web", "set web a:1=1"] {
        is_refused(&operator, words, "{servers}:known holds more than statera writes there: delete it").await;
    }
    operator.redis.run("DEL {servers}:known").await;
    operator.done("set web a:1=1").await;
    operator.done("history web").await;
}
