//! Defects of Statera itself, made by fault points (src/fault.rs): traffic goes on, what broke is started
//! again, and each defect is logged and counted.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{
    Backend, PATIENCE, Program, Redis, dead_address, echo, eventually, get, greeting, output, text,
};

/// `statera run` with these fault points.
fn run_with(faults: &str, yaml: &str) -> Program {
    let mut command = Command::new("sh");
    // The text of a panic comes in pieces, between which log lines would be written.
    command.args(["-c", "exec \"$0\" \"$@\" 2>/dev/null", Program::path()]).env("STATERA_FAULTS", faults);
    Program::run_by(command, yaml)
}

/// A config with one listener for each of these pools, under its name. `pools`: name and settings.
fn config(top: &str, pools: &[(&str, &str)]) -> String {
    let listeners = pools.iter().map(|(name, _)| format!("{name}: {{bind: \"127.0.0.1:0\", pool: {name}}}"));
    let listeners = listeners.collect::<Vec<_>>().join(", ");
    let pools = pools.iter().map(|(name, settings)| format!("{name}: {{{settings}}}"));
    let pools = pools.collect::<Vec<_>>().join(", ");
    format!("admin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{{listeners}}}\npools: {{{pools}}}\n{top}\n")
}

async fn restarts(program: &Program, task: &str) -> f64 {
    program.metric("statera_task_restarts_total", &format!("task=\"{task}\"")).await
}

async fn closed(program: &Program, reason: &str) -> f64 {
    program.metric("statera_sessions_closed_total", &format!("reason=\"{reason}\"")).await
}

/// The session lines with this reason, once there are so many.
async fn session_lines(program: &Program, reason: &str, count: usize) -> Vec<Value> {
    let lines = || {
        let mut lines = program.lines();
        lines.retain(|line| text(line, "close_reason") == reason);
        lines
    };
    eventually(&format!("{count} sessions end by {reason}"), || async { lines().len() >= count }).await;
    lines()
}

/// A session that was opened and has got an echo.
async fn open(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    assert!(answers(&mut stream).await, "no echo from {address}");
    stream
}

/// True if an echo comes back; false if the connection is reset.
async fn answers(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 4];
    let exchange = async {
        stream.write_all(b"ping").await?;
        stream.read_exact(&mut answer).await
    };
    timeout(PATIENCE, exchange).await.expect("it does not hang").is_ok()
}

async fn ends_well(mut program: Program) {
    program.signal(Signal::TERM);
    assert_eq!(program.ends().await, Some(0), "{}", program.log());
}

#[tokio::test]
async fn a_table_that_breaks_the_decoder_leaves_the_last_one_and_the_next_is_applied() {
    let (first, second) = (Backend::named("first").await, Backend::named("second").await);
    let redis = Redis::start().await;
    for key in ["servers", "others"] {
        redis.run(&format!("ZADD {key} 1 {}", first.address)).await;
    }
    let pools = [("web", "weights_key: servers"), ("other", "weights_key: others")];
    let program = run_with(
        "decode=panic@192.0.2.1:1",
        &config(&format!("redis: {{url: \"{}\"}}", redis.url()), &pools),
    );
    let listeners = program.addresses().await.0;
    redis.run(&format!("ZADD servers 1 192.0.2.1:1 1 {}", second.address)).await;
    let line = program.says("cannot read the weights").await;
    assert_eq!((text(&line, "level"), text(&line, "pool")), ("ERROR", "web"), "{line}");
    assert!(text(&line, "reason").contains("a defect"), "{line}");
    // The other pool's table is followed meanwhile.
    redis.run(&format!("ZADD others 0 {} 1 {}", first.address, second.address)).await;
    eventually("the other pool's table is applied", || async {
        greeting(listeners[1]).await.is_ok_and(|backend| backend == "second")
    })
    .await;
    for _ in 0..50 {
        assert_eq!(greeting(listeners[0]).await.expect("it serves"), "first");
    }
    redis.run("ZREM servers 192.0.2.1:1").await;
    redis.run(&format!("ZREM servers {}", first.address)).await;
    eventually("the next table is applied", || async {
        greeting(listeners[0]).await.is_ok_and(|backend| backend == "second")
    })
    .await;
    assert!(program.metric("statera_table_failed_reads_total", "pool=\"web\"").await >= 1.0);
    ends_well(program).await;
}

#[tokio::test]
async fn every_task_of_the_control_plane_that_panics_is_run_again_and_traffic_goes_on() {
    const TASKS: [&str; 12] = [
        "admin",
        "watch_redis",
        "report_applied",
        "lua_pick",
        "save_table",
        "resolve_names",
        "health_checks",
        "ejections",
        "slow_start",
        "watch_fail_open",
        "watch_usable",
        "watchdog",
    ];
    let (first, second) = (Backend::named("first").await, Backend::named("second").await);
    let (redis, state) = (Redis::start().await, TempDir::new().expect("a folder"));
    redis.set_weights([(&first, 1.0)]).await;
    let pool = format!(
        "weights_key: servers, backends: {{\"{}\": 1}}, health_check: {{interval: 1s}}, outlier: {{}}, \
         slow_start: 1s",
        first.address
    );
    let top = format!("redis: {{url: \"{}\"}}\nstate_dir: {:?}", redis.url(), state.path());
    let faults = TASKS.map(|task| format!("task=panic@{task}*1")).join(",");
    let program = run_with(&faults, &config(&top, &[("web", &pool)]));
    let listener = program.address().await;
    for _ in 0..20 {
        assert_eq!(greeting(listener).await.expect("it serves"), "first");
    }
    for task in TASKS {
        eventually(&format!("{task} is restarted"), || async { restarts(&program, task).await == 1.0 }).await;
    }
    let lines = program.messages("a control-plane task panicked");
    let logged: HashSet<&str> = lines.iter().map(|line| text(line, "task")).collect();
    assert_eq!(logged, HashSet::from(TASKS));
    assert!(lines.iter().all(|line| text(line, "level") == "ERROR"), "{lines:?}");

    redis.run(&format!("ZADD servers 0 {} 1 {}", first.address, second.address)).await;
    eventually("the new weights are applied", || async {
        greeting(listener).await.is_ok_and(|backend| backend == "second")
    })
    .await;
    let saved = || std::fs::read_to_string(state.path().join("web.table")).unwrap_or_default();
    eventually("the new table is saved", || async { saved().contains(&second.address.to_string()) }).await;
    eventually("the new backend is checked", || async {
        let labels = format!("backend=\"{}\"", second.address);
        program.metric("statera_backend_health_checks_total", &labels).await > 0.0
    })
    .await;
    ends_well(program).await;
}

#[tokio::test]
async fn an_admin_server_that_panics_comes_back_on_the_same_port() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}", backend.address);
    let program = run_with("admin=panic*1", &config("", &[("web", &pool)]));
    let (listeners, admin) = program.addresses().await;
    let mut session = open(listeners[0]).await;
    assert!(get(admin, "/livez").await.is_err(), "the first request meets the defect");
    let line = program.says("a control-plane task panicked").await;
    assert_eq!(text(&line, "task"), "admin", "{line}");
    eventually("it answers again", || async { get(admin, "/readyz").await.is_ok_and(|a| a.status == 200) })
        .await;
    assert_eq!(restarts(&program, "admin").await, 1.0);
    assert!(answers(&mut session).await);
    drop(session);
    ends_well(program).await;
}

#[tokio::test]
async fn health_checks_go_on_after_their_task_has_panicked() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}, health_check: {{interval: 100ms}}", backend.address);
    let program = run_with("health_checks=panic@web*1", &config("", &[("web", &pool)]));
    eventually("it is restarted", || async { restarts(&program, "health_checks").await == 1.0 }).await;
    drop(backend);
    program.says("backend unhealthy after").await;
    ends_well(program).await;
}

#[tokio::test]
async fn a_health_thread_that_cannot_start_is_tried_again() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}, health_check: {{interval: 100ms}}", backend.address);
    let program = run_with("check_thread=error*3", &config("", &[("web", &pool)]));
    let listener = program.address().await;
    assert_eq!(echo(listener, b"ping").await.expect("it serves"), b"ping");
    let line = program.says("a control-plane task failed").await;
    let fields = ["level", "task", "pool"].map(|field| text(&line, field));
    assert_eq!(fields, ["ERROR", "health_checks", "web"], "{line}");
    eventually("the backend is checked", || async {
        program.metric("statera_backend_health_checks_total", "result=\"passed\"").await > 0.0
    })
    .await;
    assert_eq!(restarts(&program, "health_checks").await, 3.0);
    ends_well(program).await;
}

#[tokio::test]
async fn a_task_that_blocks_the_control_plane_is_logged_and_traffic_goes_on() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}", backend.address);
    let program = run_with("admin=block:8s*1", &config("", &[("web", &pool)]));
    let (listeners, admin) = program.addresses().await;
    let asked = tokio::spawn(get(admin, "/livez"));
    let line = program.says("a task blocks a thread of the control plane").await;
    let fields = ["level", "task", "thread"].map(|field| text(&line, field));
    assert_eq!(fields, ["ERROR", "admin", "statera-control"], "{line}");
    assert_eq!(echo(listeners[0], b"ping").await.expect("it serves"), b"ping");
    program.says("a thread of the control plane runs its tasks again").await;
    assert_eq!(asked.await.expect("it ends").expect("an answer").status, 200);
    ends_well(program).await;
}

#[tokio::test]
async fn a_watch_over_redis_that_hangs_is_noticed_and_started_again() {
    let (first, second) = (Backend::named("first").await, Backend::named("second").await);
    let redis = Redis::start().await;
    redis.set_weights([(&first, 1.0)]).await;
    // A hang is ten times the sum of the three.
    let top = format!(
        "redis: {{url: \"{}\", heartbeat_interval: 100ms, connect_timeout: 100ms, response_timeout: 100ms}}",
        redis.url()
    );
    let pool = format!("weights_key: servers, backends: {{\"{}\": 1}}", first.address);
    let program = run_with("watch_redis=hang*1", &config(&top, &[("web", &pool)]));
    let listener = program.address().await;
    assert_eq!(greeting(listener).await.expect("it serves"), "first");
    let line = program.says("a control-plane task failed").await;
    assert_eq!(text(&line, "task"), "watch_redis", "{line}");
    assert!(text(&line, "reason").starts_with("it hung"), "{line}");
    redis.run(&format!("ZADD servers 0 {} 1 {}", first.address, second.address)).await;
    eventually("the new weights are applied", || async {
        greeting(listener).await.is_ok_and(|backend| backend == "second")
    })
    .await;
    assert_eq!(restarts(&program, "watch_redis").await, 1.0);
    ends_well(program).await;
}

#[tokio::test]
async fn a_worker_that_dies_is_replaced_and_sessions_of_the_others_go_on() {
    const SESSIONS: usize = 8;
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}", backend.address);
    let yaml = config("workers: 2", &[("web", &pool), ("trap", &pool)]);
    let program = run_with("accept_loop=panic@trap*1", &yaml);
    let listeners = program.addresses().await.0;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(open(listeners[0]).await);
    }
    let mut trapped = TcpStream::connect(listeners[1]).await.expect("it listens");
    assert!(!answers(&mut trapped).await, "the connection that met the defect is reset");
    let line = program.says("a worker died").await;
    assert_eq!(text(&line, "level"), "ERROR", "{line}");
    program.says("the worker is replaced").await;

    let mut alive = 0;
    for session in &mut sessions {
        alive += usize::from(answers(session).await);
    }
    // Few sessions are shared out evenly, so each worker had some.
    assert!((2..=6).contains(&alive), "{alive}");
    let lines = session_lines(&program, "defect", SESSIONS - alive).await;
    assert!(lines.iter().all(|line| text(line, "term") == "ID"), "{lines:?}");
    assert_eq!(lines.len(), SESSIONS - alive);
    assert_eq!(closed(&program, "defect").await, lines.len() as f64);
    assert_eq!(program.metric("statera_session_panics_total", "").await, 0.0, "the thread has panicked");
    assert_eq!(restarts(&program, "worker").await, 1.0);
    for listener in listeners {
        for _ in 0..20 {
            assert_eq!(echo(listener, b"ping").await.expect("it serves"), b"ping");
        }
    }
    drop(sessions);
    ends_well(program).await;
}

#[tokio::test]
async fn connections_in_the_accept_queue_of_a_worker_that_dies_are_served_by_its_replacement() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}", backend.address);
    let program = run_with("accept_loop=panic@web*2", &config("workers: 1", &[("web", &pool)]));
    let listener = program.address().await;
    // The only worker dies with the first connection, and its replacement with the second.
    let mut connections = Vec::new();
    for _ in 0..10 {
        connections.push(TcpStream::connect(listener).await.expect("the kernel takes it"));
    }
    let mut served = 0;
    for connection in &mut connections {
        served += usize::from(answers(connection).await);
    }
    assert_eq!(served, 8, "{}", program.log());
    assert_eq!(restarts(&program, "worker").await, 2.0);
    drop(connections);
    ends_well(program).await;
}

#[tokio::test]
async fn a_session_that_panics_is_a_defect_gives_its_slot_back_and_harms_no_other() {
    let (backend, another) = (Backend::echo().await, Backend::echo().await);
    let web = format!("backends: {{\"{}\": 1}}, max_connections: 1", backend.address);
    let other = format!("backends: {{\"{}\": 1}}", another.address);
    let yaml = config("workers: 1", &[("web", &web), ("other", &other)]);
    let program = run_with(&format!("session_relays=panic@{}*1", backend.address), &yaml);
    let listeners = program.addresses().await.0;
    let mut neighbour = open(listeners[1]).await;
    let mut session = TcpStream::connect(listeners[0]).await.expect("it listens");
    assert!(!answers(&mut session).await, "it is reset");
    let line = session_lines(&program, "defect", 1).await.remove(0);
    assert_eq!((text(&line, "pool"), text(&line, "term")), ("web", "ID"), "{line}");
    assert_eq!(text(&line, "backend"), backend.address.to_string(), "{line}");
    let line = program.says("a session panicked").await;
    assert_eq!((text(&line, "level"), text(&line, "listener")), ("ERROR", "web"), "{line}");

    assert!(answers(&mut neighbour).await, "the other session of the worker goes on");
    let mut next = open(listeners[0]).await;
    assert!(answers(&mut next).await, "the only slot is free again");
    assert_eq!(closed(&program, "defect").await, 1.0);
    assert_eq!(program.metric("statera_session_panics_total", "").await, 1.0);
    assert_eq!(program.metric("statera_backend_connections_active", "pool=\"web\"").await, 1.0);
    drop((next, neighbour));
    ends_well(program).await;
}

#[tokio::test]
async fn a_session_that_panics_in_the_queue_leaves_it() {
    let backend = Backend::echo().await;
    let pool = format!(
        "backends: {{\"{}\": 1}}, max_connections: 1, queue: {{size: 1, timeout: 10s}}",
        backend.address
    );
    let program = run_with("session_waits=panic@web*1", &config("workers: 1", &[("web", &pool)]));
    let listener = program.address().await;
    let first = open(listener).await;
    let mut second = TcpStream::connect(listener).await.expect("it listens");
    assert!(!answers(&mut second).await, "it is reset");
    let line = session_lines(&program, "defect", 1).await.remove(0);
    assert_eq!((text(&line, "term"), &line["backend"]), ("IC", &Value::Null), "{line}");
    let mut third = TcpStream::connect(listener).await.expect("it listens");
    eventually("the third one waits", || async {
        program.metric("statera_pool_queue", "pool=\"web\"").await == 1.0
    })
    .await;
    drop(first);
    assert!(answers(&mut third).await, "the slot is its own");
    drop(third);
    ends_well(program).await;
}

#[tokio::test]
async fn a_trial_session_that_panics_leaves_the_trial_to_the_next() {
    let ((guard, address), other) = (dead_address(), Backend::named("other").await);
    let pool = format!(
        "backends: {{\"{address}\": 1, \"{}\": 1}}, outlier: {{consecutive_failures: 1, ejection: 1s}}",
        other.address
    );
    let faults = format!("session_relays=panic@{address}*1");
    let program = run_with(&faults, &config("workers: 1", &[("web", &pool)]));
    let listener = program.address().await;
    let is_said = |message: &str| !program.messages(message).is_empty();
    eventually("it is ejected", || async {
        assert_eq!(greeting(listener).await.expect("it serves"), "other");
        is_said("backend ejected after")
    })
    .await;
    drop(guard);
    let _backend = Backend::start_at(address, |mut stream| async move {
        let _ = stream.write_all(b"back").await;
    })
    .await;
    // The first session that it gets panics.
    eventually("a later trial session succeeds", || async {
        // A panic resets.
        let _ = greeting(listener).await;
        is_said("backend is back")
    })
    .await;
    let line = session_lines(&program, "defect", 1).await.remove(0);
    assert_eq!(text(&line, "backend"), address.to_string(), "{line}");
    assert_eq!(closed(&program, "defect").await, 1.0);
    ends_well(program).await;
}

#[tokio::test]
async fn a_session_that_panics_as_it_begins_leaves_the_accept_loop_alone() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}", backend.address);
    let program = run_with("session_begins=panic@web*1", &config("workers: 1", &[("web", &pool)]));
    let listener = program.address().await;
    let mut first = TcpStream::connect(listener).await.expect("it listens");
    assert!(!answers(&mut first).await, "it is reset");
    program.says("beginning a session panicked").await;
    assert_eq!(echo(listener, b"ping").await.expect("it serves"), b"ping");
    assert_eq!(restarts(&program, "worker").await, 0.0);
    ends_well(program).await;
}

/// A worker that dies again and again is replaced each time, and sessions of the other one never notice.
#[tokio::test]
async fn a_worker_that_keeps_dying_is_replaced_each_time() {
    let backend = Backend::echo().await;
    let pool = format!("backends: {{\"{}\": 1}}", backend.address);
    let yaml = config("workers: 2", &[("web", &pool), ("trap", &pool)]);
    let program = run_with("accept_loop=panic@trap*4", &yaml);
    let listeners = program.addresses().await.0;
    for died in 1..=4 {
        let mut trapped = TcpStream::connect(listeners[1]).await.expect("it listens");
        assert!(!answers(&mut trapped).await, "the connection that met the defect is reset");
        eventually("the worker is replaced", || async {
            program.messages("the worker is replaced").len() == died
        })
        .await;
        assert_eq!(restarts(&program, "worker").await, died as f64);
    }
    for listener in listeners {
        assert_eq!(echo(listener, b"ping").await.expect("it serves"), b"ping");
    }
    ends_well(program).await;
}

#[tokio::test]
async fn no_build_that_ships_has_fault_points() {
    let features = |edges: &'static str| async move {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.args(["tree", "--locked", "--offline", "-e", edges, "-i", "statera"]);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        String::from_utf8(output(cargo).await.stdout).expect("a text")
    };
    assert!(features("features").await.contains("fault-points"), "the tests have them");
    let shipped = features("features,no-dev").await;
    assert!(shipped.starts_with("statera ") && !shipped.contains("fault-points"), "{shipped}");
}
