//! Backends that are DNS names: sessions follow a name that moves, and skip one that does not resolve.
//!
//! The program sees its own hosts file, which the scenario edits. Nothing else on the machine changes, and
//! no name server is asked.

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

/// The file that the program sees as /etc/hosts.
struct Hosts {
    folder: TempDir,
}

impl Hosts {
    fn new(text: &str) -> Self {
        let hosts = Self { folder: TempDir::new().expect("a folder") };
        hosts.write(text);
        // The resolver reads only the file.
        std::fs::write(hosts.folder.path().join("nsswitch.conf"), "hosts: files\n").expect("a file");
        hosts
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("hosts")
    }

    /// Writes into the same file, since the mount is of the file and not of its name. The text is short, so
    /// that no reader sees half of it.
    fn write(&self, text: &str) {
        std::fs::write(self.file(), text).expect("a file");
    }

    /// Runs the program in a mount namespace with this file as /etc/hosts.
    fn run(&self, yaml: &str) -> Program {
        require("unshare", "util-linux");
        require("mount", "mount");
        let script = "mount --bind \"$1/hosts\" /etc/hosts \
            && mount --bind \"$1/nsswitch.conf\" /etc/nsswitch.conf \
                      && shift && exec \"$@\"";
        let mut launcher = Command::new("unshare");
        launcher.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]);
        launcher.arg(self.folder.path()).arg(Program::path());
        Program::run_by(launcher, yaml)
    }
}

/// Two backends on the same port of two addresses, so that a name can move from one to the other.
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
    // Also the first session: the listener waits for the first answer of the resolver.
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

    // A name that resolves no longer keeps its last addresses.
    hosts.write("127.0.0.1 localhost\n");
    program.says("the backend's name does not resolve").await;
    for _ in 0..5 {
        assert_eq!(greeting(address).await.expect("an answer"), "new");
    }
    assert!(new.accepted() >= 10);
}

#[tokio::test]
async fn a_name_with_two_addresses_uses_both_alternately() {
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
async fn a_name_that_does_not_resolve_is_logged_once_and_fails_no_session() {
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
async fn checks_follow_a_name_and_skip_it_while_it_does_not_resolve() {
    let ((old, new), fixed) = (on_one_port("old", "new").await, Backend::named("fixed").await);
    let hosts = Hosts::new("127.0.0.1 localhost\n");
    let name = format!("db.test:{}", old.address.port());
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\nadmin: {{bind: \"127.0.0.1:0\"}}\n\
         pools: {{web: {{backends: {{\"{}\": 1, \"{name}\": 1}}, health_check: {{interval: 50ms}}}}}}",
        fixed.address
    ));
    eventually("the backend with an address is checked", || async { fixed.accepted() >= 5 }).await;
    let count = async |result: &str| {
        let labels = format!("pool=\"web\",backend=\"{name}\",result=\"{result}\"");
        program.metric("statera_backend_health_checks_total", &labels).await
    };
    assert_eq!((count("passed").await, count("failed").await), (0.0, 0.0));

    hosts.write("127.0.0.1 db.test\n");
    eventually("the name is checked once it resolves", || async { old.accepted() >= 3 }).await;
    hosts.write("127.0.0.2 db.test\n");
    eventually("the new address is checked", || async { new.accepted() >= 3 }).await;
    let (before, checked) = (old.accepted(), new.accepted());
    eventually("only the new address is checked", || async { new.accepted() >= checked + 3 }).await;
    assert_eq!(old.accepted(), before);
    // Nothing listens at that address.
    hosts.write("127.0.0.3 db.test\n");
    program.says("backend unhealthy after ").await;
    assert!(count("passed").await >= 6.0);
    assert_eq!(program.messages("the backend's name does not resolve").len(), 1, "{}", program.log());
    assert_eq!(program.messages("backend unhealthy after ").len(), 1, "{}", program.log());
}

#[tokio::test]
async fn configured_names_serve_from_the_first_session_on_although_redis_hangs() {
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
async fn no_session_fails_when_a_backend_is_replaced_by_a_name_in_one_change() {
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
async fn while_a_new_table_has_only_unresolved_names_the_backends_before_serve() {
    let old = Backend::named("old").await;
    let redis = Redis::start().await;
    redis.set_weights([(&old, 1.0)]).await;
    let proxy = Proxy::web(&format!("redis: {{url: \"{}\"}}", redis.url()), "weights_key: servers");
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    let swap = "redis.call('DEL', KEYS[1]) redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])";
    redis.run_words(&["EVAL", swap, "1", "servers", "unknown.invalid:80", "1"]).await;
    eventually("the name arrives", || async { proxy.weights() == [("unknown.invalid:80".to_owned(), 1.0)] })
        .await;
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "old");
    }
    // A weight of zero in the table still refuses sessions.
    redis.run_words(&["EVAL", swap, "1", "servers", "unknown.invalid:80", "0"]).await;
    eventually("the zero arrives", || async { proxy.weights() == [("unknown.invalid:80".to_owned(), 0.0)] })
        .await;
    assert_ne!(greeting(proxy.address()).await.ok().as_deref(), Some("old"));
}

fn at(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, last], port))
}

#[tokio::test]
async fn a_name_that_moves_away_from_a_dead_machine_serves_from_the_next_lookup_on() {
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
        eventually("the name is found dead", || async {
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
async fn one_dead_address_of_three_delays_no_session_once_it_is_found() {
    let (first, second) = on_one_port("first", "second").await;
    let port = first.address.port();
    // A machine that is down: it does not answer handshakes.
    let (_queue, _) = silent_at(at(3, port)).await;
    let hosts = Hosts::new("127.0.0.1 db.test\n127.0.0.2 db.test\n127.0.0.3 db.test\n");
    for health in [
        "health_check: {interval: 200ms, timeout: 100ms}",
        "outlier: {consecutive_failures: 2, ejection: 1h}",
    ] {
        let program = hosts.run(&format!(
            "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\nadmin: {{bind: \"127.0.0.1:0\"}}\n\
             pools: {{web: {{backends: {{\"db.test:{port}\": 1}}, connect: {{timeout: 600ms, \
             deadline: 5s}}, {health}}}}}"
        ));
        let address = program.address().await;
        let message =
            if health.starts_with("health") { "backend unhealthy after" } else { "backend ejected after" };
        let is_found =
            |line: &serde_json::Value| line["message"].as_str().is_some_and(|text| text.starts_with(message));
        let opened = AtomicU64::new(0);
        let open_session = async || {
            opened.fetch_add(1, Relaxed);
            greeting(address).await.expect("an answer")
        };
        let all_logged = || async { sessions(&program).len() as u64 == opened.load(Relaxed) };
        eventually("the dead address is found", || async {
            open_session().await;
            program.lines().iter().any(is_found)
        })
        .await;
        let lines = program.lines();
        let about = lines.iter().find(|line| is_found(line)).expect("it was logged");
        assert_eq!(about["address"], at(3, port).to_string(), "{health}");
        let before = [first.accepted(), second.accepted()];
        eventually("all sessions are logged", all_logged).await;
        let sessions_before = sessions(&program).len();
        for _ in 0..20 {
            open_session().await;
        }
        if health.starts_with("outlier") {
            assert_eq!(
                [first.accepted() - before[0], second.accepted() - before[1]],
                [10, 10],
                "both alternately"
            );
        }
        eventually("all sessions are logged", all_logged).await;
        // A session that tries the dead address gives it a third of the connect timeout: 200 ms.
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
async fn an_address_that_resets_its_sessions_is_left_out_and_comes_back_after_a_trial_session() {
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
                // The client may have closed already after the handshake.
                let _ = stream.set_zero_linger();
            }
        }
    })
    .await;
    let hosts = Hosts::new("127.0.0.1 db.test\n127.0.0.2 db.test\n");
    let program = hosts.run(&format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"db.test:{port}\": 1}}, outlier: {{consecutive_failures: 3, \
         ejection: 1s}}}}}}"
    ));
    let address = program.address().await;
    let answers = async || greeting(address).await.is_ok_and(|text| !text.is_empty());
    eventually("it is ejected", || async {
        answers().await;
        !program.messages("backend ejected after").is_empty()
    })
    .await;
    // The trial sessions may be reset.
    let mut reset = 0;
    let before = bad.accepted();
    while bad.accepted() < before + 2 {
        reset += u64::from(!answers().await);
    }
    assert!(reset <= bad.accepted() - before, "{reset} sessions were reset");
    is_back.store(true, Relaxed);
    eventually("it is back", || async { greeting(address).await.is_ok_and(|text| text == "back") }).await;
    eventually("its return is logged", || async {
        answers().await;
        !program.messages("backend is back: a trial session succeeded").is_empty()
    })
    .await;
}
