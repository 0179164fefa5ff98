//! Backends that are DNS names: followed when they move, left out while nobody knows them.
//!
//! The program sees a hosts file of its own, which the scenario edits: nothing else of the machine changes, and no name
//! server is asked.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

use crate::support::{
    Backend, Program, Proxy, Redis, Traffic, eventually, greeting, require, silent_address, silent_at,
};

/// What the program takes for /etc/hosts.
struct Hosts {
    folder: TempDir,
}

impl Hosts {
    fn new(text: &str) -> Self {
        let hosts = Self { folder: TempDir::new().expect("a folder") };
        hosts.write(text);
        // Only the file is asked.
        std::fs::write(hosts.folder.path().join("nsswitch.conf"), "hosts: files\n").expect("a file");
        hosts
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("hosts")
    }

    /// In place, since the mount shows the file and not its name. Lines are short: no reader sees half of one.
    fn write(&self, text: &str) {
        std::fs::write(self.file(), text).expect("a file");
    }

    /// Runs the program where this is /etc/hosts.
    fn run(&self, yaml: &str) -> Program {
        require("unshare", "util-linux");
        require("mount", "mount");
        let script = "mount --bind \"$1/hosts\" /etc/hosts && mount --bind \"$1/nsswitch.conf\" /etc/nsswitch.conf \
                      && shift && exec \"$@\"";
        let mut launcher = Command::new("unshare");
        launcher.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]);
        launcher.arg(self.folder.path()).arg(Program::path());
        Program::run_by(launcher, yaml)
    }
}

/// Two backends on one port of two addresses: a name can move from one to the other.
async fn on_one_port(first: &'static str, second: &'static str) -> (Backend, Backend) {
    for _ in 0..100 {
        let first = Backend::named(first).await;
        let address = (std::net::Ipv4Addr::new(127, 0, 0, 2), first.address.port()).into();
        if tokio::net::TcpListener::bind(address).await.is_ok() {
            return (first, Backend::named_at(address, second).await);
        }
    }
    panic!("no port is free on both addresses");
}

#[tokio::test]
async fn new_sessions_follow_a_name_that_moves() {
    let (old, new) = on_one_port("old", "new").await;
    let hosts = Hosts::new("127.0.0.1 db.test\n");
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"db.test:{}\": 1}}}}}}",
        old.address.port()
    ));
    let address = program.address().await;
    // The first session already: accepting waits for the first answer.
    for _ in 0..5 {
        assert_eq!(greeting(address).await.expect("an answer"), "old");
    }
    hosts.write("127.0.0.2 db.test\n");
    eventually("the name is followed", || async {
        let answer = greeting(address).await.expect("no session fails meanwhile");
        assert!(["old", "new"].contains(&answer.as_str()));
        answer == "new"
    })
    .await;
    for _ in 0..5 {
        assert_eq!(greeting(address).await.expect("an answer"), "new");
    }

    // A name that nobody knows any more keeps what it had.
    hosts.write("127.0.0.1 localhost\n");
    program.says("the backend's name does not resolve").await;
    for _ in 0..5 {
        assert_eq!(greeting(address).await.expect("an answer"), "new");
    }
    assert!(new.accepted() >= 10);
}

#[tokio::test]
async fn a_name_with_two_addresses_gives_each_in_turn() {
    let (first, second) = on_one_port("first", "second").await;
    let hosts = Hosts::new("127.0.0.1 db.test\n127.0.0.2 db.test\n");
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"db.test:{}\": 1}}}}}}",
        first.address.port()
    ));
    let address = program.address().await;
    for _ in 0..20 {
        greeting(address).await.expect("an answer");
    }
    assert_eq!((first.accepted(), second.accepted()), (10, 10));
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_named_once_and_costs_no_session() {
    let (here, joins) = on_one_port("here", "joins").await;
    let hosts = Hosts::new("127.0.0.1 localhost\n");
    let name = format!("late.test:{}", here.address.port());
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1, \"{name}\": 1}}}}}}",
        here.address
    ));
    let address = program.address().await;
    for _ in 0..100 {
        assert_eq!(greeting(address).await.expect("an answer"), "here");
    }
    hosts.write("127.0.0.2 late.test\n");
    eventually("the name joins", || async {
        greeting(address).await.expect("no session fails meanwhile");
        joins.accepted() > 0
    })
    .await;
    let warnings = program.messages("the backend's name does not resolve");
    assert_eq!(warnings.len(), 1, "{}", program.log());
    assert_eq!((&warnings[0]["backend"], &warnings[0]["level"]), (&name.into(), &"WARN".into()));
    program.says("the name resolves again").await;
    eventually("all sessions are logged", || async {
        let lines = program.lines();
        let sessions = lines.iter().filter(|line| line["close_reason"].is_string());
        sessions.clone().count() as u64 == here.accepted() + joins.accepted()
            && sessions.clone().all(|line| line["close_reason"] == "finished" && line["retries"] == 0)
    })
    .await;
}

#[tokio::test]
async fn checks_follow_a_name_and_leave_one_alone_that_nobody_knows() {
    let ((old, new), fixed) = (on_one_port("old", "new").await, Backend::named("fixed").await);
    let hosts = Hosts::new("127.0.0.1 localhost\n");
    let name = format!("db.test:{}", old.address.port());
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\nadmin: {{bind: \"127.0.0.1:0\"}}\n\
         pools: {{web: {{backends: {{\"{}\": 1, \"{name}\": 1}}, health_check: {{interval: 50ms}}}}}}",
        fixed.address
    ));
    eventually("who is known is asked", || async { fixed.accepted() >= 5 }).await;
    let count = async |result: &str| {
        let labels = format!("pool=\"web\",backend=\"{name}\",result=\"{result}\"");
        program.metric("statera_backend_health_checks_total", &labels).await
    };
    assert_eq!((count("passed").await, count("failed").await), (0.0, 0.0));

    hosts.write("127.0.0.1 db.test\n");
    eventually("it is asked once it is known", || async { old.accepted() >= 3 }).await;
    hosts.write("127.0.0.2 db.test\n");
    eventually("it is asked where it is now", || async { new.accepted() >= 3 }).await;
    let (before, asked) = (old.accepted(), new.accepted());
    eventually("and there alone", || async { new.accepted() >= asked + 3 }).await;
    assert_eq!(old.accepted(), before);
    // Nobody listens there.
    hosts.write("127.0.0.3 db.test\n");
    program.says("backend unhealthy after ").await;
    assert!(count("passed").await >= 6.0);
    assert_eq!(program.messages("the backend's name does not resolve").len(), 1, "{}", program.log());
    assert_eq!(program.messages("backend unhealthy after ").len(), 1, "{}", program.log());
}

#[tokio::test]
async fn configured_names_serve_from_the_first_session_on_though_redis_hangs() {
    let backend = Backend::named("configured").await;
    let (_silent, redis) = silent_address().await;
    let port = backend.address.port();
    let proxy = Proxy::web(
        &format!("redis: {{url: \"redis://{redis}\"}}"),
        &format!("backends: {{\"localhost:{port}\": 1}}"),
    );
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "configured");
}

#[tokio::test]
async fn no_session_is_lost_when_a_backend_is_swapped_for_a_name_at_once() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    redis.set_weights([(&backend, 1.0)]).await;
    let proxy = Proxy::web(&format!("redis: {{url: \"{}\"}}", redis.url()), "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    let traffic = Traffic::start(proxy.address());
    let (plain, name) = (backend.address.to_string(), format!("localhost:{}", backend.address.port()));
    let swap = "redis.call('ZADD', KEYS[1], 1, ARGV[1]) redis.call('ZREM', KEYS[1], ARGV[2])";
    for round in 0..20 {
        let (new, old) = if round % 2 == 0 { (&name, &plain) } else { (&plain, &name) };
        redis.run_words(&["EVAL", swap, "1", "servers", new, old]).await;
        eventually("the swap arrives", || async { proxy.weights() == [(new.clone(), 1.0)] }).await;
        traffic.more(10).await;
    }
    traffic.stop().await;
    let refused = "statera_sessions_closed_total{reason=\"no_backend\"}";
    assert_eq!(proxy.metric(refused).unwrap_or_default(), 0.0);
}

#[tokio::test]
async fn while_only_unknown_names_are_written_the_backends_before_serve() {
    let old = Backend::named("old").await;
    let redis = Redis::start().await;
    redis.set_weights([(&old, 1.0)]).await;
    let proxy = Proxy::web(&format!("redis: {{url: \"{}\"}}", redis.url()), "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    let swap = "redis.call('DEL', KEYS[1]) redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])";
    redis.run_words(&["EVAL", swap, "1", "servers", "nobody.invalid:80", "1"]).await;
    eventually("the name arrives", || async { proxy.weights() == [("nobody.invalid:80".to_owned(), 1.0)] })
        .await;
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "old");
    }
    // A written zero still refuses.
    redis.run_words(&["EVAL", swap, "1", "servers", "nobody.invalid:80", "0"]).await;
    eventually("the zero arrives", || async { proxy.weights() == [("nobody.invalid:80".to_owned(), 0.0)] })
        .await;
    assert_ne!(greeting(proxy.address()).await.ok().as_deref(), Some("old"));
}

fn at(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, last], port))
}

#[tokio::test]
async fn a_name_that_is_pointed_away_from_a_dead_machine_serves_from_the_next_lookup_on() {
    for health in [
        "outlier: {consecutive_failures: 2, ejection: 1h, max_ejected_percent: 100}",
        "health_check: {interval: 60s}",
    ] {
        let new = Backend::named("new").await;
        let port = new.address.port();
        // Nothing listens on the old address.
        let hosts = Hosts::new("127.0.0.9 db.test\n");
        let program = hosts.run(&format!(
            "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\nadmin: {{bind: \"127.0.0.1:0\"}}\n\
             pools: {{web: {{backends: {{\"db.test:{port}\": 1, \"127.0.0.8:1\": 0.001}}, {health}}}}}"
        ));
        let (listeners, _) = program.addresses().await;
        let labels = format!("pool=\"web\",backend=\"db.test:{port}\"");
        eventually("the name is out", || async {
            let _ = greeting(listeners[0]).await;
            program.metric("statera_backend_up", &labels).await == 0.0
        })
        .await;
        hosts.write("127.0.0.1 db.test\n");
        eventually("the name has its new address", || async {
            program.metric("statera_backend_up", &labels).await == 1.0
        })
        .await;
        for _ in 0..20 {
            assert_eq!(greeting(listeners[0]).await.expect("an answer"), "new", "{health}");
        }
        if health.starts_with("health_check") {
            let passed = format!("{labels},result=\"passed\"");
            eventually("a new address is checked at once", || async {
                program.metric("statera_backend_health_checks_total", &passed).await >= 1.0
            })
            .await;
        }
    }
}

#[tokio::test]
async fn one_dead_address_of_three_costs_sessions_nothing_once_checks_have_found_it() {
    let (first, second) = on_one_port("first", "second").await;
    let port = first.address.port();
    // A machine that is gone: its handshakes are not answered.
    let (_queue, _) = silent_at(at(3, port)).await;
    let hosts = Hosts::new("127.0.0.1 db.test\n127.0.0.2 db.test\n127.0.0.3 db.test\n");
    for health in [
        "health_check: {interval: 200ms, timeout: 100ms}",
        "outlier: {consecutive_failures: 2, ejection: 1h}",
    ] {
        let program = hosts.run(&format!(
            "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\nadmin: {{bind: \"127.0.0.1:0\"}}\n\
             pools: {{web: {{backends: {{\"db.test:{port}\": 1}}, connect: {{timeout: 600ms, deadline: 5s}}, {health}}}}}"
        ));
        let address = program.address().await;
        let said =
            if health.starts_with("health") { "backend unhealthy after" } else { "backend ejected after" };
        let is_said =
            |line: &serde_json::Value| line["message"].as_str().is_some_and(|text| text.starts_with(said));
        let asked = AtomicU64::new(0);
        let ask = async || {
            asked.fetch_add(1, Relaxed);
            greeting(address).await.expect("an answer")
        };
        let all_logged = || async { sessions(&program).len() as u64 == asked.load(Relaxed) };
        eventually("the dead address is found", || async {
            ask().await;
            program.lines().iter().any(is_said)
        })
        .await;
        let lines = program.lines();
        let about = lines.iter().find(|line| is_said(line)).expect("it was said");
        assert_eq!(about["address"], at(3, port).to_string(), "{health}");
        let before = [first.accepted(), second.accepted()];
        eventually("all sessions are logged", all_logged).await;
        let sessions_before = sessions(&program).len();
        for _ in 0..20 {
            ask().await;
        }
        if health.starts_with("outlier") {
            assert_eq!([first.accepted() - before[0], second.accepted() - before[1]], [10, 10], "in turn");
        }
        eventually("all sessions are logged", all_logged).await;
        // The dead address takes its third of the time, 200 ms, of each session that tries it.
        let waited = sessions(&program).split_off(sessions_before);
        assert!(waited.iter().all(|ms| *ms < 200.0), "{health}: {waited:?}");
        let up =
            program.metric("statera_backend_up", &format!("pool=\"web\",backend=\"db.test:{port}\"")).await;
        assert_eq!(up, 1.0);
    }
}

/// How many milliseconds each session so far took to connect.
fn sessions(program: &Program) -> Vec<f64> {
    let lines = program.lines();
    lines.iter().filter_map(|line| line["connect_ms"].as_f64()).collect()
}

#[tokio::test]
async fn an_address_that_resets_its_sessions_is_left_out_and_comes_back_by_one_session() {
    let good = Backend::named("good").await;
    let port = good.address.port();
    let is_back = Arc::new(AtomicBool::new(false));
    let back = Arc::clone(&is_back);
    let bad = Backend::start_at(at(2, port), move |mut stream| {
        let is_back = back.load(Relaxed);
        async move {
            if is_back {
                let _ = stream.write_all(b"back").await;
            } else {
                // Its handshake may be all that the other side wanted.
                let _ = stream.set_zero_linger();
            }
        }
    })
    .await;
    let hosts = Hosts::new("127.0.0.1 db.test\n127.0.0.2 db.test\n");
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"db.test:{port}\": 1}}, outlier: {{consecutive_failures: 3, ejection: 1s}}}}}}"
    ));
    let address = program.address().await;
    let answers = async || greeting(address).await.is_ok_and(|text| !text.is_empty());
    eventually("it is ejected", || async {
        answers().await;
        !program.messages("backend ejected after").is_empty()
    })
    .await;
    // The sessions that probe it may be reset.
    let mut reset = 0;
    let before = bad.accepted();
    while bad.accepted() < before + 2 {
        reset += u64::from(!answers().await);
    }
    assert!(reset <= bad.accepted() - before, "{reset} sessions were reset");
    is_back.store(true, Relaxed);
    eventually("it is back", || async { greeting(address).await.is_ok_and(|text| text == "back") }).await;
    eventually("it is said", || async {
        answers().await;
        !program.messages("backend is back: a trial session succeeded").is_empty()
    })
    .await;
}
