//! Causes: the log and `statera weights get` say why a backend gets no sessions.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{
    Backend, Operator, Program, Proxy, backends, dead_address, eventually, greeting, silent_address, text,
};

/// The script of a backend that reads a byte and resets the connection.
async fn reset_after_a_byte(mut stream: TcpStream) {
    let _ = stream.read(&mut [0]).await;
    let _ = stream.set_zero_linger();
}

/// Runs one session that sends a byte and reads once: it may be served, reset or refused.
async fn any_session(proxy: SocketAddr) {
    let Ok(mut stream) = TcpStream::connect(proxy).await else { return };
    let _ = stream.write_all(b"x").await;
    let _ = stream.read(&mut [0]).await;
}

/// Runs sessions until the program has logged this message, and returns the first line with it.
async fn sessions_until(program: &Program, message: &str) -> Value {
    let address = program.address().await;
    eventually(message, || async {
        any_session(address).await;
        !program.messages(message).is_empty()
    })
    .await;
    program.messages(message).remove(0)
}

/// A program with one pool of these addresses, each at weight 1. A connect may take a second.
fn program(addresses: &[SocketAddr], pool: &str) -> Program {
    Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{{}, connect: {{timeout: 1s, deadline: 10s}}, {pool}}}}}\nlog: {{access: false}}\n",
        backends(addresses)
    ))
}

#[tokio::test]
async fn an_ejection_and_its_trial_name_the_last_error_and_the_failure_count() {
    let (good, resets) = (Backend::named("good").await, Backend::start(reset_after_a_byte).await);
    let ((_guard, dead), (_queue, silent)) = (dead_address(), silent_address().await);
    for (bad, error) in
        [(dead, "connection refused"), (silent, "timed out"), (resets.address, "connection reset by peer")]
    {
        let outlier = "outlier: {consecutive_failures: 3, ejection: 300ms, max_ejected_percent: 50}";
        let program = program(&[bad, good.address], outlier);
        let line = sessions_until(&program, "backend ejected after ").await;
        let begin = format!(
            "backend ejected after 3 failed sessions in a row (last error: {error}), no sessions for 0."
        );
        assert!(text(&line, "message").starts_with(&begin), "{line}");
        assert_eq!((text(&line, "error"), &line["failures"]), (error, &json!(3)), "{line}");
        assert_eq!(text(&line, "backend"), bad.to_string());
        let ejection = text(&line, "ejection");
        assert!(ejection.len() == 4 && text(&line, "message").ends_with(ejection), "{line}");
        let line = sessions_until(&program, "trial session failed").await;
        let begin = format!("trial session failed ({error}): backend stays ejected for ");
        assert!(text(&line, "message").starts_with(&begin) && text(&line, "error") == error, "{line}");
    }
}

#[tokio::test]
async fn a_backend_that_is_not_ejected_because_of_max_ejected_percent_is_logged_with_its_error() {
    let (_guard, dead) = dead_address();
    let program =
        program(&[dead], "outlier: {consecutive_failures: 3, ejection: 300ms, max_ejected_percent: 50}");
    let line = sessions_until(&program, "backend not ejected after ").await;
    assert!(text(&line, "message").contains("(last error: connection refused)"), "{line}");
}

#[tokio::test]
async fn a_backend_that_becomes_unhealthy_is_logged_with_the_error_and_the_number_of_its_failed_checks() {
    let (good, (guard, dead)) = (Backend::named("good").await, dead_address());
    let program = program(&[dead, good.address], "health_check: {interval: 100ms, fall: 3, rise: 2}");
    let line = program.says("backend unhealthy after ").await;
    let message = "backend unhealthy after 1 failed check (last error: cannot connect: connection refused)";
    assert_eq!(
        (text(&line, "message"), text(&line, "error")),
        (message, "cannot connect: connection refused")
    );
    drop(guard);
    let back = Backend::start_at(dead, async |_| {}).await;
    program.says("backend healthy again after 2 passed checks").await;
    drop(back);
    let last = || program.messages("backend unhealthy after 3 failed checks (last error: ");
    eventually("its checks fail again", || async { !last().is_empty() }).await;
}

/// Waits for a session line after the first `before` ones, and returns it.
async fn access_line(proxy: &Proxy, before: usize) -> Value {
    eventually("the session is logged", || async { proxy.access_lines().len() > before }).await;
    proxy.access_lines().remove(before)
}

#[tokio::test]
async fn a_failed_session_names_its_error_and_a_retried_one_the_backends_that_failed_and_why() {
    let good = Backend::named("good").await;
    let ((_guard, dead), (_queue, silent)) = (dead_address(), silent_address().await);
    let settings = "outlier: off, connect: {attempts: 3, timeout: 200ms, deadline: 5s}";
    let pool = |backends: &str| Proxy::web("", &format!("backends: {{{backends}}}, {settings}"));

    let proxy = pool(&format!("\"{dead}\": 1"));
    any_session(proxy.address()).await;
    let line = access_line(&proxy, 0).await;
    assert_eq!((text(&line, "close_reason"), text(&line, "error")), ("connect_failed", "connection refused"));
    assert_eq!(
        (text(&line, "backend"), &line["failed"]),
        (dead.to_string().as_str(), &Value::Null),
        "{line}"
    );

    let proxy = pool(&format!("\"{silent}\": 1"));
    any_session(proxy.address()).await;
    let line = access_line(&proxy, 0).await;
    assert_eq!((text(&line, "close_reason"), text(&line, "error")), ("connect_timeout", "timed out"));

    // The two that fail have nearly all of the weight, so some session tries both before the good one.
    let proxy = pool(&format!("\"{dead}\": 1000, \"{silent}\": 1000, \"{}\": 1", good.address));
    let mut both = Vec::new();
    for n in 0..5 {
        assert_eq!(greeting(proxy.address()).await.expect("a backend"), "good");
        let line = access_line(&proxy, n).await;
        assert_eq!((text(&line, "close_reason"), &line["error"]), ("finished", &Value::Null), "{line}");
        both.extend(line["failed"].as_array().filter(|failed| failed.len() == 2).cloned());
    }
    let mut failed = both.into_iter().next().expect("a session that tried both");
    failed.sort_by_key(|attempt| attempt["error"].to_string());
    let attempt = |backend: SocketAddr, error: &str| json!({"backend": backend.to_string(), "error": error});
    assert_eq!(failed, [attempt(dead, "connection refused"), attempt(silent, "timed out")]);

    // `backend` and `error` are those of the last attempt; the attempts before it are in `failed`.
    let (_other_guard, other) = dead_address();
    let proxy = pool(&format!("\"{dead}\": 1, \"{other}\": 1"));
    any_session(proxy.address()).await;
    let line = access_line(&proxy, 0).await;
    let first = if text(&line, "backend") == dead.to_string() { other } else { dead };
    assert_eq!((&line["retries"], text(&line, "error")), (&json!(1), "connection refused"), "{line}");
    assert_eq!(line["failed"], json!([attempt(first, "connection refused")]), "{line}");
}

#[tokio::test]
async fn a_session_that_was_reset_has_an_error_in_its_line_and_one_that_ended_well_has_none() {
    let (resets, good) = (Backend::start(reset_after_a_byte).await, Backend::named("good").await);
    let pool = |backend: &Backend| {
        Proxy::web("", &format!("backends: {{\"{}\": 1}}, outlier: off", backend.address))
    };
    let proxy = pool(&resets);
    any_session(proxy.address()).await;
    let line = access_line(&proxy, 0).await;
    assert_eq!(
        (text(&line, "close_reason"), text(&line, "error")),
        ("backend_reset", "connection reset by peer")
    );
    let proxy = pool(&good);
    greeting(proxy.address()).await.expect("an answer");
    let line = access_line(&proxy, 0).await;
    assert_eq!(text(&line, "close_reason"), "finished");
    assert!(line.get("error").is_none() && line.get("failed").is_none(), "{line}");
}

/// The line of `weights get` for this member.
async fn line_of(operator: &Operator, member: impl ToString) -> String {
    let said = operator.done("get web").await.stdout;
    let begin = format!("{} ", member.to_string());
    said.lines().find(|line| line.starts_with(&begin)).map(str::to_owned).unwrap_or(said)
}

async fn line_becomes(operator: &Operator, member: impl ToString, end: &str) {
    let member = member.to_string();
    eventually(end, || async { line_of(operator, &member).await.ends_with(end) }).await;
}

#[tokio::test]
async fn weights_get_says_from_how_many_proxies_a_backend_gets_no_sessions_and_why() {
    let operator = Operator::start().await;
    let (good, resets) = (Backend::echo().await, Backend::start(reset_after_a_byte).await);
    let (_guard, dead) = dead_address();
    let [of_good, of_resets, of_dead] =
        [good.address, resets.address, dead].map(|address| address.to_string());
    let words = [
        "ZADD",
        "servers",
        "1",
        &of_good,
        "1",
        &of_resets,
        "1",
        &of_dead,
        "1",
        "nowhere.invalid:80",
        "0",
        "10.0.0.1:80",
    ];
    operator.redis.run_words(&words).await;
    // The checks of a backend that resets its sessions pass: they only connect.
    let pool = "outlier: {consecutive_failures: 3, ejection: 1h, max_ejected_percent: 90}";
    let checked = operator
        .yaml("")
        .replace("backends:", &format!("{pool}, health_check: {{interval: 100ms}}, backends:"));
    let unchecked = operator.yaml("").replace("backends:", &format!("{pool}, backends:"));
    let programs = [Program::run(&checked), Program::run(&unchecked)];
    line_becomes(&operator, dead, "no sessions from 1 of 2 proxies: unhealthy (connection refused)").await;
    line_becomes(&operator, "nowhere.invalid:80", "no sessions from 2 of 2 proxies: name not resolved").await;
    let line = line_of(&operator, "10.0.0.1:80").await;
    assert!(
        line.contains(" 0  ") && !line.contains("no sessions"),
        "a weight of 0 needs no further reason: {line}"
    );

    // A backend that fails the sessions of both proxies is ejected by both.
    for program in &programs {
        sessions_until(program, "backend ejected after ").await;
    }
    let ejected = "no sessions from 2 of 2 proxies: ejected (connection reset by peer)";
    let addresses = [programs[0].address().await, programs[1].address().await];
    eventually(ejected, || async {
        for address in addresses {
            any_session(address).await;
        }
        line_of(&operator, &of_resets).await.ends_with(ejected)
    })
    .await;
    assert!(line_of(&operator, &of_good).await.ends_with('%'), "it gets sessions");

    // The admin state is shown once, beside the other reason.
    operator.done(&format!("drain web {of_resets}")).await;
    line_becomes(&operator, &of_resets, &format!("0.0 %  drain  {ejected}")).await;
    let get = operator.json("get web").await;
    let member = |name: &str| -> Value {
        let members = get["members"].as_array().expect("a list");
        members.iter().find(|member| member["member"] == name).expect("a member").clone()
    };
    let reasons = json!([{"reason": "unresolved", "error": null}]);
    let unresolved = json!({"proxies": 2, "of": 2, "answers": [{"proxies": 2, "reasons": reasons}]});
    assert_eq!(member("nowhere.invalid:80")["unusable"], unresolved);
    assert_eq!(member(&of_good).get("unusable"), None);
    assert_eq!(get["reported"], json!({"proxies": 2, "not_known_of": 0, "cut_short": 0, "fail_open": 0}));

    // The report of an older proxy does not say which backends get no sessions.
    let hash = get["hash"].as_str().expect("a text");
    let lease = format!("99999999999999 {hash}");
    operator.redis.run_words(&["HSET", "{servers}:applied", "old/1/0000", &lease]).await;
    line_becomes(&operator, "nowhere.invalid:80", "no sessions from 2 of 2 proxies: name not resolved").await;
    let said = operator.done("get web").await.stdout;
    assert!(
        said.contains("1 proxy of an older version: these do not report which members get no sessions"),
        "{said}"
    );
}

#[tokio::test]
async fn weights_get_says_when_a_proxy_ignores_health() {
    let operator = Operator::start().await;
    let (_guard, dead) = dead_address();
    operator.redis.run(&format!("ZADD servers 1 {dead}")).await;
    let _program =
        Program::run(&operator.yaml("").replace("backends:", "health_check: {interval: 100ms}, backends:"));
    eventually("it fails open", || async {
        operator.done("get web").await.stdout.contains("health is ignored by 1 of 1 proxy (fail-open)")
    })
    .await;
    assert!(line_of(&operator, dead).await.ends_with('%'), "it gets sessions although it is unhealthy");
}
