//! The reports of proxies: each proxy reports under a lease which weights it has applied, and `--wait` waits
//! for all live proxies.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Operator, Program, eventually};

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";

/// How many proxies have the table, and how many have not.
async fn fleet(operator: &Operator) -> (usize, usize) {
    let get = operator.json("get web").await;
    let count = |part: &str| get["applied"][part].as_array().map_or(0, Vec::len);
    (count("have"), count("have_not"))
}

/// Waits until so many proxies have the table, and so many have not.
async fn fleet_becomes(operator: &Operator, why: &str, wanted: (usize, usize)) {
    eventually(why, || async { fleet(operator).await == wanted }).await;
}

#[tokio::test]
async fn wait_returns_when_all_live_proxies_have_the_table_and_names_one_that_has_not() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    let (first, second) = (Program::run(&operator.yaml("")), Program::run(&operator.yaml("")));
    fleet_becomes(&operator, "both report", (2, 0)).await;
    let set = operator.weights(&format!("set web {A}=2 --wait=15s")).await;
    assert_eq!((set.code, set.stderr.as_str()), (Some(0), ""));
    assert!(set.stdout.ends_with("applied by 2 proxies\n"), "{set:?}");

    second.signal(Signal::STOP);
    eventually("the program is stopped", || async { second.is_stopped() }).await;
    let set = operator.weights(&format!("set web {A}=3 --wait=2s")).await;
    assert_eq!(set.code, Some(3), "{set:?}");
    assert!(
        set.stderr.contains("version 2 is written, but 1 of 2 proxies have not applied it within 2s: "),
        "{set:?}"
    );
    let named = |program: &Program| set.stderr.contains(&format!("/{}/", program.pid()));
    assert!(named(&second) && !named(&first), "{set:?}");
    assert!(set.stdout.starts_with("web: version 2\n"), "{set:?}");

    let get = operator.weights("get web").await;
    assert!(get.stdout.contains("applied by 1 of 2 proxies, not by "), "{get:?}");

    second.signal(Signal::CONT);
    let rollback = operator.weights("rollback web --wait=15s --json").await;
    assert_eq!((rollback.code, rollback.stderr.as_str()), (Some(0), ""), "{rollback:?}");
    let rollback: Value = serde_json::from_str(&rollback.stdout).expect("JSON");
    assert_eq!(rollback["applied"]["have"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn wait_does_not_wait_for_a_proxy_that_ended() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    let (_stays, mut goes) = (Program::run(&operator.yaml("")), Program::run(&operator.yaml("")));
    fleet_becomes(&operator, "both report", (2, 0)).await;
    goes.signal(Signal::TERM);
    assert_eq!(goes.wait().code(), Some(0));
    assert_eq!(fleet(&operator).await, (1, 0), "it removed its report");

    // A killed proxy leaves a report whose lease ends by the clock of the server.
    operator.redis.run_words(&["HSET", "{servers}:applied", "edge/1/dead", "1000 0123"]).await;
    let set = operator.weights(&format!("set web {A}=2 --wait=15s")).await;
    assert!(set.code == Some(0) && set.stdout.ends_with("applied by 1 proxy\n"), "{set:?}");
    operator.redis.run_words(&["HSET", "{servers}:applied", "edge/1/late", "99999999999999 0123"]).await;
    let set = operator.weights(&format!("set web {A}=3 --wait=1s")).await;
    assert!(set.code == Some(3) && set.stderr.ends_with(": edge/1/late\n"), "{set:?}");
    // A proxy that starts removes reports whose lease has ended, and no others.
    let _comes = Program::run(&operator.yaml(""));
    eventually("the report of the dead proxy is removed", || async {
        operator.redis.run("HEXISTS {servers}:applied edge/1/dead").await == redis::Value::Int(0)
    })
    .await;
    assert_eq!(operator.redis.run("HEXISTS {servers}:applied edge/1/late").await, redis::Value::Int(1));
    let lease = operator.redis.run("PTTL {servers}:applied").await;
    assert!(matches!(lease, redis::Value::Int(1..=15_000)), "the key ends with its last lease: {lease:?}");
}

/// Starts two proxies, waits until both report, and stops the second.
async fn a_running_and_a_stopped_proxy(operator: &Operator) -> [Program; 2] {
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    let programs = [Program::run(&operator.yaml("")), Program::run(&operator.yaml(""))];
    fleet_becomes(operator, "both report", (2, 0)).await;
    programs[1].signal(Signal::STOP);
    eventually("the program is stopped", || async { programs[1].is_stopped() }).await;
    programs
}

/// Checks that `--wait` does not take the report of the running proxy for the whole fleet. Once the stopped
/// one runs again, both have the table.
async fn waits_for_the_stopped_proxy(operator: &Operator, second: &Program) {
    let set = operator.weights(&format!("set web {A}=2 --wait=2s")).await;
    assert_eq!(set.code, Some(3), "{set:?}");
    let why = "and 1 proxy has applied it, but Redis was away or has lost reports, or a proxy has just come \
               back: it takes another ";
    assert!(set.stderr.contains(why), "{set:?}");
    let get = operator.weights("get web").await;
    assert!(get.stdout.contains("applied by 1 proxy; more may be running: Redis was away"), "{get:?}");
    second.signal(Signal::CONT);
    let set = operator.weights(&format!("set web {A}=3 --wait=30s")).await;
    assert!(set.code == Some(0) && set.stdout.ends_with("applied by 2 proxies\n"), "{set:?}");
}

#[tokio::test]
async fn after_redis_has_lost_all_data_wait_does_not_take_the_first_reports_for_all() {
    let mut operator = Operator::start().await;
    let [_first, second] = a_running_and_a_stopped_proxy(&operator).await;
    operator.redis.kill();
    operator.redis.launch().await;
    waits_for_the_stopped_proxy(&operator, &second).await;
}

#[tokio::test]
async fn after_only_the_reports_are_lost_wait_does_not_take_the_first_renewed_ones_for_all() {
    let operator = Operator::start().await;
    let [_first, second] = a_running_and_a_stopped_proxy(&operator).await;
    operator.redis.run("DEL {servers}:applied").await;
    waits_for_the_stopped_proxy(&operator, &second).await;
}

#[tokio::test]
async fn after_old_reports_are_restored_wait_does_not_take_them_for_all() {
    let operator = Operator::start().await;
    let [_first, second] = a_running_and_a_stopped_proxy(&operator).await;
    // Makes the reports look as if they were restored from an older dump.
    operator.redis.run(&format!("HDEL {{servers}}:applied {}", name_of(&operator, &second).await)).await;
    operator.redis.run("HSET {servers}:applied since 1000").await;
    operator.redis.run("CLIENT KILL TYPE normal SKIPME yes").await;
    eventually("the first is back", || async {
        operator.redis.run("HGET {servers}:applied since").await != redis::Value::BulkString(b"1000".to_vec())
    })
    .await;
    waits_for_the_stopped_proxy(&operator, &second).await;
}

/// The name under which a program reports.
async fn name_of(operator: &Operator, program: &Program) -> String {
    let get = operator.json("get web").await;
    let names = get["applied"]["have"].as_array().expect("a list");
    let pid = format!("/{}/", program.pid());
    let name = names.iter().filter_map(Value::as_str).find(|name| name.contains(&pid));
    name.expect("it reports").to_owned()
}

#[tokio::test]
async fn a_report_that_should_have_been_renewed_is_not_taken_for_the_whole_fleet() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    // The report of a proxy that has the table, and last renewed its report twelve seconds ago.
    let hash = operator.json("get web").await["hash"].as_str().expect("a text").to_owned();
    let redis::Value::Array(time) = operator.redis.run("TIME").await else { panic!("no time") };
    let seconds: u64 = redis::from_redis_value(time[0].clone()).expect("a number");
    let report = format!("{}000 {hash}", seconds + 3);
    operator.redis.run_words(&["HSET", "{servers}:applied", "since", "1000", "edge/1/gone", &report]).await;
    let set = operator.weights(&format!("set web {A}=1 --wait=100ms")).await;
    assert!(set.code == Some(3) && set.stderr.contains("it takes another "), "{set:?}");
    let report = format!("{}000 {hash}", seconds + 3_600);
    operator.redis.run_words(&["HSET", "{servers}:applied", "edge/1/gone", &report]).await;
    let set = operator.weights(&format!("set web {A}=1 --wait=100ms")).await;
    assert!(set.code == Some(0) && set.stdout.ends_with("applied by 1 proxy\n"), "{set:?}");
}

#[tokio::test]
async fn a_proxy_logs_with_a_cure_that_the_key_of_reports_is_no_hash() {
    let operator = Operator::start().await;
    operator.redis.run("SET {servers}:applied x").await;
    let program = Program::run(&operator.yaml(""));
    let line = program.says("cannot report which weights are applied").await;
    let cure = line["cure"].as_str().unwrap_or_default();
    assert!(
        cure.starts_with("{servers}:applied") && cure.contains("something else than a hash: delete it"),
        "{line}"
    );
}

#[tokio::test]
async fn without_any_report_wait_says_that_no_proxy_reports() {
    let operator = Operator::start().await;
    let set = operator.weights(&format!("set web {A}=1 --wait=100ms")).await;
    assert_eq!(set.code, Some(3));
    assert!(set.stderr.contains("version 1 is written, but no proxy reported within 100ms"), "{set:?}");
    assert_eq!(operator.table().await, [(A.to_owned(), 1.0)]);
}

#[tokio::test]
async fn a_user_without_the_right_to_read_reports_learns_which_right_and_that_the_change_is_made() {
    let operator = Operator::start().await;
    operator
        .redis
        .run(
            "ACL SETUSER bob on >geheim ~servers ~{servers}:* +hello +select +eval +@sortedset +@stream \
             +get +set",
        )
        .await;
    operator.write_config("username: bob, password: geheim,");
    let set = operator.weights(&format!("set web {A}=1 --wait --json")).await;
    assert_eq!(set.code, Some(1));
    let json: Value = serde_json::from_str(&set.stdout).expect("JSON");
    assert_eq!((&json["version"], &json["applied"]), (&json!(1), &Value::Null));
    assert!(set.stderr.contains("version 1 is written, but which proxies use it is unknown"), "{set:?}");
    assert!(set.stderr.contains("+eval_ro +time +hlen +hscan %R~{servers}:applied"), "{set:?}");
}

#[tokio::test]
async fn a_proxy_that_may_not_write_reports_logs_that_once_and_follows_the_weights_all_the_same() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    operator
        .redis
        .grant_to("proxy", "on >geheim %R~servers &* +hello +select +subscribe +zrange +config|get")
        .await;
    let backend = crate::support::Backend::named("found").await;
    let program =
        Program::run(&operator.yaml("username: proxy, password: geheim, heartbeat_interval: 100ms,"));
    let line = program.says("cannot report which weights are applied").await;
    assert_eq!(line["level"], json!("INFO"));
    assert!(
        line["cure"]
            .as_str()
            .is_some_and(|cure| cure.contains("+eval +time +hset") && cure.ends_with("~{servers}:applied")),
        "{line}"
    );
    let entry = program.address().await;
    operator.redis.run(&format!("ZADD servers 0 {A} 1 {}", backend.address)).await;
    eventually("the new table arrives", || async {
        crate::support::greeting(entry).await.is_ok_and(|greeting| greeting == "found")
    })
    .await;
    assert_eq!(program.messages("cannot report").len(), 1);
    assert_eq!(operator.redis.run("EXISTS {servers}:applied").await, redis::Value::Int(0));
}

#[tokio::test]
async fn the_history_and_the_proxies_use_the_same_hash_for_a_table() {
    let operator = Operator::start().await;
    // Equal weights, fractions, zeros, and members that proxies leave out.
    operator
        .redis
        .run(&format!("ZADD servers 0.1 {A} 0.1 {B} -0 a:1 -5 b:1 inf c:1 1 no-port 1e300 d:1"))
        .await;
    let _program = Program::run(&operator.yaml(""));
    fleet_becomes(&operator, "it reports", (1, 0)).await;
    for change in ["e:1=0.3333333333333333", "f:1=5e-324 a:1=7", "unix:/run/x=2"] {
        let set = operator.weights(&format!("set web {change} --wait=15s --json")).await;
        assert_eq!(set.code, Some(0), "{set:?}");
        let set: Value = serde_json::from_str(&set.stdout).expect("JSON");
        let history = operator.json("history web --limit 1").await;
        assert_eq!(history["entries"][0]["hash"], set["hash"], "{change}");
    }
}
