//! Causes: a person who has the log and `statera weights get` alone can say why a backend gets no sessions.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{
    Backend, Program, Proxy, dead_address, eventually, greeting, silent_address, text,
};

/// Reads a byte, and resets.
async fn reset_after_a_byte(mut stream: TcpStream) {
    let _ = stream.read(&mut [0]).await;
    let _ = stream.set_zero_linger();
}

/// One session that sends a byte and waits for the end, whatever that is.
async fn session(proxy: SocketAddr) {
    let Ok(mut stream) = TcpStream::connect(proxy).await else { return };
    let _ = stream.write_all(b"x").await;
    let _ = stream.read(&mut [0]).await;
}

async fn sessions_until(program: &Program, message: &str) -> Value {
    let address = program.address().await;
    eventually(message, || async {
        session(address).await;
        !program.messages(message).is_empty()
    })
    .await;
    program.messages(message).remove(0)
}

/// `program` with one pool of `backends`, each at weight 1, whose sessions connect within half a second.
fn program(backends: &[SocketAddr], pool: &str) -> Program {
    let backends: Vec<_> = backends.iter().map(|backend| format!("\"{backend}\": 1")).collect();
    Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{{}}}, connect: {{timeout: 200ms, deadline: 5s}}, {pool}}}}}\nlog: {{access: false}}\n",
        backends.join(", ")
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
async fn a_backend_that_is_not_ejected_for_the_limit_is_logged_with_its_error() {
    let (_guard, dead) = dead_address();
    let program =
        program(&[dead], "outlier: {consecutive_failures: 3, ejection: 300ms, max_ejected_percent: 50}");
    let line = sessions_until(&program, "backend not ejected after ").await;
    assert!(text(&line, "message").contains("(last error: connection refused)"), "{line}");
}

#[tokio::test]
async fn a_backend_that_becomes_unhealthy_is_logged_with_its_last_checks_error_and_the_number_of_checks() {
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
    eventually("it fails again", || async { !last().is_empty() }).await;
}

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
    session(proxy.address()).await;
    let line = access_line(&proxy, 0).await;
    assert_eq!((text(&line, "close_reason"), text(&line, "error")), ("connect_failed", "connection refused"));
    assert_eq!(
        (text(&line, "backend"), &line["failed"]),
        (dead.to_string().as_str(), &Value::Null),
        "{line}"
    );

    let proxy = pool(&format!("\"{silent}\": 1"));
    session(proxy.address()).await;
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

    // The last of several attempts stands in `backend` and `error`, those before it in `failed`.
    let (_other_guard, other) = dead_address();
    let proxy = pool(&format!("\"{dead}\": 1, \"{other}\": 1"));
    session(proxy.address()).await;
    let line = access_line(&proxy, 0).await;
    let first = if text(&line, "backend") == dead.to_string() { other } else { dead };
    assert_eq!((&line["retries"], text(&line, "error")), (&json!(1), "connection refused"), "{line}");
    assert_eq!(line["failed"], json!([attempt(first, "connection refused")]), "{line}");
}

#[tokio::test]
async fn a_session_that_a_side_reset_names_what_broke_it_and_one_that_ended_well_names_nothing() {
    let (resets, good) = (Backend::start(reset_after_a_byte).await, Backend::named("good").await);
    let pool = |backend: &Backend| {
        Proxy::web("", &format!("backends: {{\"{}\": 1}}, outlier: off", backend.address))
    };
    let proxy = pool(&resets);
    session(proxy.address()).await;
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
