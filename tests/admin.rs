//! The admin server: its probes, the metrics of the contract, and the token.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Duration, Instant};

use crate::support::{
    Backend, Program, Redis, ask, backends, dead_address, echo, eventually, get, output, require, soon,
};

/// Starts a program with one listener and one pool, both `web`, and an admin server; `top` and `pool` are as
/// in `Proxy::web`. Returns also the addresses of the listener and of the admin server.
async fn program_with_admin(top: &str, admin: &str, pool: &str) -> (Program, SocketAddr, SocketAddr) {
    let program = Program::run(&format!(
        "workers: 2\nadmin: {{bind: \"127.0.0.1:0\"{admin}}}\n\
         listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{{pool}}}}}\n{top}\n"
    ));
    let (listeners, admin) = program.addresses().await;
    (program, listeners[0], admin)
}

/// The metrics of docs/reference/metrics.md: the name of the family, its type, its labels.
const METRICS: &[(&str, &str, &[&str])] = &[
    ("statera_listener_connections", "counter", &["listener"]),
    ("statera_listener_connections_active", "gauge", &["listener"]),
    ("statera_listener_rejected", "counter", &["listener", "reason"]),
    ("statera_backend_connections", "counter", &["pool", "backend"]),
    ("statera_backend_connections_active", "gauge", &["pool", "backend"]),
    ("statera_backend_connect_failures", "counter", &["pool", "backend"]),
    ("statera_backend_retries", "counter", &["pool", "backend"]),
    ("statera_backend_bytes_received", "counter", &["pool", "backend"]),
    ("statera_backend_bytes_sent", "counter", &["pool", "backend"]),
    ("statera_backend_connect_duration_seconds", "histogram", &["pool", "backend"]),
    ("statera_backend_session_duration_seconds", "histogram", &["pool", "backend"]),
    ("statera_backend_up", "gauge", &["pool", "backend"]),
    ("statera_backend_weight", "gauge", &["pool", "backend"]),
    ("statera_backend_effective_weight", "gauge", &["pool", "backend"]),
    ("statera_backend_health_checks", "counter", &["pool", "backend", "result"]),
    ("statera_backend_ejections", "counter", &["pool", "backend"]),
    ("statera_backend_admin_state", "gauge", &["pool", "backend", "state"]),
    ("statera_pool_fail_open", "gauge", &["pool"]),
    ("statera_pool_queue", "gauge", &["pool"]),
    ("statera_pool_queued", "counter", &["pool"]),
    ("statera_sessions_closed", "counter", &["reason"]),
    ("statera_session_panics", "counter", &[]),
    ("statera_task_restarts", "counter", &["task"]),
    ("statera_picks", "counter", &["pool", "source"]),
    ("statera_redis_connected", "gauge", &[]),
    ("statera_redis_notifications", "counter", &[]),
    ("statera_redis_resyncs", "counter", &[]),
    ("statera_redis_reconnects", "counter", &[]),
    ("statera_redis_watch_mode", "gauge", &["mode"]),
    ("statera_snapshot_version", "gauge", &["pool"]),
    ("statera_snapshot_age_seconds", "gauge", &["pool"]),
    ("statera_weight_propagation_seconds", "histogram", &[]),
    ("statera_pool_table_kept", "gauge", &["pool"]),
    ("statera_table_rejected_members", "gauge", &["pool"]),
    ("statera_table_failed_reads", "counter", &["pool"]),
    ("statera_state_writes_failed", "counter", &["pool"]),
    ("statera_log_dropped", "counter", &[]),
    ("statera_build_info", "gauge", &["version"]),
];

/// A Python program that reads metrics by Prometheus's own strict parser and prints each family: name, type,
/// labels.
const READ_METRICS: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as families
for family in families(sys.stdin.read()):
    assert family.documentation, family.name
    labels = {label for sample in family.samples for label in sample.labels} - {'le'}
    print(family.name, family.type, ','.join(sorted(labels)))
";

#[tokio::test]
async fn every_metric_of_the_contract_is_there_and_prometheus_can_read_it() {
    let (backend, redis) = (Backend::echo().await, Redis::start().await);
    redis.set_weights([(&backend, 2.5)]).await;
    let state = tempfile::TempDir::new().expect("a folder");
    let top = format!("redis: {{url: \"{}\"}}\nstate_dir: {:?}", redis.url(), state.path());
    let (program, entry, admin) =
        program_with_admin(&top, "", "weights_key: servers, health_check: {}, max_connections: 9").await;
    echo(entry, b"ping").await.expect("an answer");
    redis.run(&format!("HSET {{servers}}:states {} drain", backend.address)).await;
    // The change of a weight makes a notification, and the first sample of the propagation time.
    redis.run(&format!("ZADD servers 5 {}", backend.address)).await;
    eventually("the weight has arrived", || async {
        program.metric("statera_weight_propagation_seconds_count", "").await >= 1.0
            && program.metric("statera_backend_session_duration_seconds_count", "").await == 1.0
            && program.metric("statera_backend_health_checks_total", "passed").await >= 1.0
            && program.metric("statera_backend_admin_state", "drain").await == 1.0
    })
    .await;

    let accept = "accept: application/openmetrics-text\r\n";
    let answer = ask(admin, "GET /metrics", accept).await.expect("an answer");
    assert_eq!(answer.status, 200);
    let content_type = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(answer.head.lines().any(|line| line == content_type), "{}", answer.head);
    assert!(answer.body.ends_with("# EOF\n"));

    let mut reader = Command::new("/usr/bin/python3");
    let file = program.folder().join("metrics");
    std::fs::write(&file, &answer.body).expect("a file");
    reader.args(["-c", &READ_METRICS.replace("sys.stdin", "open(sys.argv[1])")]).arg(&file);
    let read = output(reader).await;
    let errors = String::from_utf8_lossy(&read.stderr);
    assert!(read.status.success(), "`apt-get install python3-prometheus-client`? {errors}\n{}", answer.body);
    let text = String::from_utf8(read.stdout).expect("names");
    let found: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(' ')).collect();
    for &(name, kind, labels) in METRICS {
        let mut labels = labels.to_vec();
        labels.sort_unstable();
        assert_eq!(found.get(name), Some(&format!("{kind} {}", labels.join(",")).as_str()), "{name}: {text}");
    }
    for name in found.keys() {
        assert!(
            METRICS.iter().any(|(known, ..)| *known == *name),
            "{name} is new: add it to METRICS in tests/admin.rs and to docs/reference/metrics.md"
        );
    }
}

/// Runs `promtool check metrics` on `text`. It must report nothing.
async fn check_by_promtool(text: &str) {
    let mut promtool = tokio::process::Command::new(require("promtool", "prometheus"));
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.kill_on_drop(true).spawn().expect("it starts");
    let mut input = child.stdin.take().expect("a pipe");
    let checked = async {
        input.write_all(text.as_bytes()).await.expect("it reads");
        drop(input);
        child.wait_with_output().await.expect("it ends")
    };
    let checked = soon("promtool ends", checked).await;
    let found = String::from_utf8_lossy(&checked.stderr) + String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && found.trim().is_empty(), "{}: {found}\n{text}", checked.status);
}

#[tokio::test]
async fn promtool_reports_no_problem_in_the_metrics_of_a_proxy_that_has_every_kind_of_them() {
    let (backend, redis) = (Backend::echo().await, Redis::start().await);
    let (_kept, dead) = dead_address();
    redis.run(&format!("ZADD servers 2.5 {} 1 {dead} 0 unix:/tmp/quoted\"name", backend.address)).await;
    redis.run(&format!("HSET {{servers}}:states {dead} drain")).await;
    let state = tempfile::TempDir::new().expect("a folder");
    let top = format!("redis: {{url: \"{}\"}}\nstate_dir: {:?}", redis.url(), state.path());
    let (program, entry, admin) =
        program_with_admin(&top, "", "weights_key: servers, health_check: {}, max_connections: 9").await;
    echo(entry, b"ping").await.expect("an answer");
    redis.run(&format!("ZADD servers 5 {}", backend.address)).await;
    eventually("each kind has a sample", || async {
        program.metric("statera_weight_propagation_seconds_count", "").await >= 1.0
            && program.metric("statera_backend_session_duration_seconds_count", "").await == 1.0
            && program.metric("statera_backend_health_checks_total", "passed").await >= 1.0
            && program.metric("statera_backend_admin_state", "drain").await == 1.0
    })
    .await;
    for accept in ["", "accept: */*\r\n", "accept: application/openmetrics-text;q=2\r\n"] {
        let answer = ask(admin, "GET /metrics", accept).await.expect("an answer");
        let content_type = "content-type: text/plain; version=0.0.4; charset=utf-8";
        assert!(answer.head.lines().any(|line| line == content_type), "{}", answer.head);
        check_by_promtool(&answer.body).await;
        for &(name, kind, _) in METRICS {
            let total = if kind == "counter" { "_total" } else { "" };
            let helped = answer.body.contains(&format!("# HELP {name}{total} "));
            let typed = answer.body.contains(&format!("# TYPE {name}{total} {kind}\n"));
            assert!(helped && typed, "{name}: {}", answer.body);
        }
        assert!(!answer.body.contains("# EOF") && !answer.body.contains("# UNIT"), "{}", answer.body);
    }
}

#[tokio::test]
async fn a_scraper_gets_the_format_that_it_prefers_of_those_it_accepts() {
    let backend = Backend::echo().await;
    let (_program, _, admin) = program_with_admin("", "", &backends(&[backend.address])).await;
    for (accept, is_open) in [
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", true),
        ("application/openmetrics-text;version=1.0.0;q=0.2,text/plain;version=0.0.4;q=0.5", false),
        ("text/plain\r\naccept: application/openmetrics-text", true),
    ] {
        let answer = ask(admin, "GET /metrics", &format!("accept: {accept}\r\n")).await.expect("an answer");
        assert_eq!(answer.body.ends_with("# EOF\n"), is_open, "{accept}: {}", answer.head);
        assert_eq!(answer.head.contains("openmetrics-text"), is_open, "{accept}: {}", answer.head);
    }
}

#[tokio::test]
async fn metrics_and_session_lines_agree_with_the_sessions_that_ran() {
    let echoing = Backend::echo().await;
    let (_kept, dead) = dead_address();
    let (program, entry, _) = program_with_admin("", "", &backends(&[echoing.address, dead])).await;
    for n in 1..=40 {
        assert_eq!(echo(entry, &vec![b'x'; n]).await.expect("an answer").len(), n);
    }
    let bytes = f64::from((1..=40).sum::<u16>());
    let (alive, dead) = (format!("backend=\"{}\"", echoing.address), format!("backend=\"{dead}\""));
    eventually("all sessions have ended", || async {
        program.metric("statera_sessions_closed_total", "reason=\"finished\"").await == 40.0
    })
    .await;
    let retried = program.metric("statera_backend_connect_failures_total", &dead).await;
    assert!(retried > 0.0, "half of the first picks are of the dead backend");
    for (name, label, expected) in [
        ("statera_listener_connections_total", "listener=\"web\"", 40.0),
        ("statera_listener_connections_active", "listener=\"web\"", 0.0),
        ("statera_listener_rejected_total", "", 0.0),
        ("statera_backend_connections_total", &alive, 40.0),
        ("statera_backend_connections_total", &dead, 0.0),
        ("statera_backend_connections_active", "", 0.0),
        ("statera_backend_connect_failures_total", &alive, 0.0),
        ("statera_backend_bytes_sent_total", &alive, bytes),
        ("statera_backend_bytes_received_total", &alive, bytes),
        ("statera_backend_session_duration_seconds_count", &alive, 40.0),
        ("statera_backend_connect_duration_seconds_count", &alive, 40.0),
        ("statera_backend_weight", &alive, 1.0),
        ("statera_sessions_closed_total", "", 40.0),
        ("statera_picks_total", "source=\"configured\"", 40.0 + retried),
        ("statera_picks_total", "source=\"snapshot\"", 0.0),
        ("statera_build_info", concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""), 1.0),
    ] {
        assert_eq!(program.metric(name, label).await, expected, "{name}{{{label}}}");
    }

    let sessions = || -> Vec<serde_json::Value> {
        let lines = program.log();
        let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        lines.filter(|line| line.get("close_reason").is_some()).collect()
    };
    eventually("all sessions are logged", || async { program.log().matches("close_reason").count() == 40 })
        .await;
    let sum =
        |field: &str| sessions().iter().map(|line| line[field].as_f64().expect("a number")).sum::<f64>();
    assert_eq!((sum("bytes_in"), sum("bytes_out"), sum("retries")), (bytes, bytes, retried));
    let fields = "time listener client pool backend source weight retries queue_ms connect_ms duration_ms \
                  bytes_in bytes_out close_reason term";
    for line in sessions() {
        let mut names: Vec<&str> = fields.split(' ').collect();
        // `failed` lists the backends that failed before one took the session.
        names.extend((line["retries"] != 0).then_some("failed"));
        names.sort_unstable();
        assert_eq!(line.as_object().expect("an object").keys().collect::<Vec<_>>(), names);
        assert_eq!(line["backend"], echoing.address.to_string());
        assert!(line["client"].as_str().is_some_and(|text| text.starts_with("127.0.0.1:")));
        assert!(line["duration_ms"].as_f64() >= line["connect_ms"].as_f64(), "{line}");
    }
}

#[tokio::test]
async fn probes_tell_a_ready_proxy_from_one_that_drains() {
    let backend = Backend::echo().await;
    let (mut program, entry, admin) =
        program_with_admin("shutdown: {delay: 1h}", "", &backends(&[backend.address])).await;
    for (path, text) in [("/livez", "live\n"), ("/readyz", "ready\n")] {
        let answer = get(admin, path).await.expect("an answer");
        assert_eq!((answer.status, answer.body.as_str()), (200, text), "{path}");
    }
    program.signal(Signal::TERM);
    eventually("it is not ready any more", || async {
        get(admin, "/readyz").await.is_ok_and(|answer| answer.status == 503 && answer.body == "draining\n")
    })
    .await;
    assert_eq!(get(admin, "/livez").await.expect("an answer").status, 200, "a draining proxy is still alive");
    assert_eq!(echo(entry, b"late").await.expect("sessions are still accepted during the delay"), b"late");
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_in_http_terms() {
    let backend = Backend::echo().await;
    let (_program, _, admin) = program_with_admin("", "", &backends(&[backend.address])).await;
    for path in ["/", "/metric", "/metrics/", "/../metrics", "/livez/x", "/%00"] {
        assert_eq!(get(admin, path).await.expect("an answer").status, 404, "{path}");
    }
    assert_eq!(get(admin, "/metrics?x=1").await.expect("an answer").status, 200);
    for method in ["POST", "DELETE", "PUT", "BREW", "OPTIONS"] {
        for path in ["/metrics", "/livez", "/readyz"] {
            let answer = ask(admin, &format!("{method} {path}"), "").await.expect("an answer");
            assert_eq!(answer.status, 405, "{method} {path}");
        }
    }
    let head = ask(admin, "HEAD /metrics", "").await.expect("an answer");
    assert_eq!((head.status, head.body.as_str()), (200, ""));

    let mut garbage = TcpStream::connect(admin).await.expect("it listens");
    garbage.write_all(b"\x16\x03\x01 not http\r\n\r\n").await.expect("connected");
    let mut answer = Vec::new();
    let read = soon("the connection ends", garbage.read_to_end(&mut answer)).await;
    assert!(read.is_err() || answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    assert_eq!(get(admin, "/livez").await.expect("an answer").status, 200);
}

#[tokio::test]
async fn metrics_need_the_token_and_probes_do_not() {
    let backend = Backend::echo().await;
    let token = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(token.path(), "s3cret\n").expect("a file");
    let admin = format!(", token_file: {}", token.path().display());
    let (program, _, admin) = program_with_admin("", &admin, &backends(&[backend.address])).await;
    for headers in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: Bearer s3cre\r\n",
        "authorization: Bearer s3cret2\r\n",
        "authorization: Bearer \r\n",
        "authorization: s3cret\r\n",
        "authorization: Basic s3cret\r\n",
        "authorization: Bearer s3cr\u{e9}t\r\n",
    ] {
        let answer = ask(admin, "GET /metrics", headers).await.expect("an answer");
        assert_eq!(answer.status, 401, "{headers}");
        assert!(answer.head.contains("\r\nwww-authenticate: bearer"), "{}", answer.head);
        assert!(!answer.body.contains("statera_") && !answer.body.contains("s3cret"), "{}", answer.body);
    }
    let answer = ask(admin, "GET /metrics", "authorization: Bearer s3cret\r\n").await.expect("an answer");
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("statera_build_info"));
    for path in ["/livez", "/readyz"] {
        assert_eq!(get(admin, path).await.expect("an answer").status, 200, "{path}");
    }
    assert!(!program.log().contains("s3cret"));
}

#[tokio::test]
async fn curl_and_a_kept_connection_are_served() {
    let backend = Backend::echo().await;
    let (_program, _, admin) = program_with_admin("", "", &backends(&[backend.address])).await;
    let mut curl = Command::new(require("curl", "curl"));
    curl.args(["-sS", "--fail", "--max-time", "20", "-w", "%{num_connects}\n"]);
    curl.args([format!("http://{admin}/livez"), format!("http://{admin}/metrics")]);
    curl.stderr(Stdio::inherit());
    let answer = output(curl).await;
    let text = String::from_utf8(answer.stdout).expect("a text");
    assert!(answer.status.success(), "{text}");
    assert!(text.starts_with("live\n1\n# HELP") && text.ends_with("\n0\n"), "{text}");
    assert!(text.contains("\n# TYPE statera_listener_connections_total counter\n"), "{text}");
}

#[tokio::test]
async fn a_client_that_does_not_finish_its_header_is_cut() {
    let backend = Backend::echo().await;
    let (_program, _, admin) = program_with_admin("", "", &backends(&[backend.address])).await;
    let begin = Instant::now();
    let mut slow = TcpStream::connect(admin).await.expect("it listens");
    let (mut reader, mut writer) = slow.split();
    let drip = async {
        let mut piece: &[u8] = b"GET /livez HTTP/1.1\r\nhost: x\r\nx-slow: ";
        while writer.write_all(piece).await.is_ok() {
            piece = b"x";
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let mut answer = Vec::new();
    let cut = async {
        tokio::select! {
            () = drip => {}
            _ = reader.read_to_end(&mut answer) => {}
        }
    };
    // The client may see a reset or an end. Either must come although the client keeps sending.
    soon("the connection is cut", cut).await;
    assert!(begin.elapsed() > Duration::from_secs(2), "a slow network has time for its header");
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn five_hundred_idle_admin_connections_hold_back_neither_a_probe_nor_a_session() {
    let backend = Backend::echo().await;
    let (program, entry, admin) = program_with_admin("", "", &backends(&[backend.address])).await;
    let mut idle = Vec::new();
    for n in 0..500u32 {
        // The server may accept it, close it to make room, or leave it in the kernel's queue: this side
        // stays open.
        idle.push(TcpStream::connect(admin).await.expect("the kernel takes it"));
        if n % 10 == 0 {
            assert_eq!(echo(entry, &[7]).await.expect("a session"), [7]);
        }
    }
    // There are more idle connections than permits, and none of them has timed out yet. Each probe gets a
    // permit nevertheless.
    let begun = Instant::now();
    for _ in 0..20 {
        get(admin, "/livez").await.expect("a probe is answered");
    }
    assert!(begun.elapsed() < Duration::from_secs(4), "the probes waited until idle connections timed out");
    get(admin, "/metrics").await.expect("a scrape is answered");
    drop(idle);
    assert_eq!(program.metric("statera_backend_connections_total", "").await, 50.0);
}
