//! Signals that operators and tools send routinely: none of them ends a session.

use std::process::Command;

use rustix::process::{Resource, Signal};
use tempfile::TempDir;

use crate::support::{Backend, PATIENCE, Peer, Program, echo, eventually, limited, sum_of};

/// Signals with their numbers on x86 and ARM, and whether the program logs them.
const ROUTINE: [(&str, i32, bool); 22] = [
    ("HUP", 1, true),
    ("USR1", 10, true),
    ("USR2", 12, true),
    ("PIPE", 13, false),
    ("ALRM", 14, true),
    ("STKFLT", 16, true),
    ("CHLD", 17, false),
    ("CONT", 18, false),
    ("TTIN", 21, true),
    ("TTOU", 22, true),
    ("URG", 23, false),
    ("XCPU", 24, true),
    ("XFSZ", 25, true),
    ("VTALRM", 26, true),
    ("PROF", 27, true),
    ("WINCH", 28, false),
    ("IO", 29, true),
    ("PWR", 30, true),
    ("real-time signal 34", 34, true),
    ("real-time signal 35", 35, true),
    ("real-time signal 50", 50, true),
    ("real-time signal 63", 63, true),
];

fn yaml(backend: &Backend, top: &str) -> String {
    format!(
        "workers: 2\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}}}}}\n{top}\n",
        backend.address
    )
}

/// Sends a signal by the shell's `kill`, which knows real-time signals.
fn kill(pid: u32, number: i32) {
    let status = Command::new("sh").args(["-c", &format!("kill -{number} {pid}")]).status();
    assert!(status.expect("sh starts").success(), "signal {number}: it has ended");
}

fn answers(program: &Program, signal: &str) -> usize {
    program.lines().iter().filter(|line| line["signal"] == signal).count()
}

#[tokio::test]
async fn routine_signals_end_no_session() {
    let backend = Backend::echo().await;
    let mut program = Program::run(&yaml(&backend, ""));
    let (listeners, _) = program.addresses().await;
    let mut client = Peer::connect(listeners[0]).await;
    for (name, number, is_answered) in ROUTINE {
        kill(program.pid(), number);
        if is_answered {
            eventually(name, || async { answers(&program, name) == 1 }).await;
        }
        client.say(name.as_bytes()).await;
        client.hears(name.as_bytes()).await;
    }
    // QUIT drains, as it does in nginx.
    program.signal(Signal::QUIT);
    program.says("draining").await;
    client.say(b"last").await;
    client.hears(b"last").await;
    drop(client);
    assert_eq!(program.ends().await, Some(0), "{}", program.log());
}

#[tokio::test]
async fn a_signal_that_comes_before_the_config_is_read_is_logged_later() {
    let backend = Backend::echo().await;
    let folder = TempDir::new().expect("a folder");
    let go = folder.path().join("go");
    let made = Command::new("mkfifo").arg(&go).status().expect("mkfifo starts");
    assert!(made.success());
    // The config file is a FIFO, so the program waits until this test writes to it.
    let mut launcher = Command::new("sh");
    launcher.args(["-c", "exec \"$0\" run -c \"$1\"", Program::path()]).arg(&go);
    let program = Program::run_by(launcher, "");
    let catches_usr1 = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid())).expect("it runs");
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("Linux lists it");
        let caught = u64::from_str_radix(caught.trim(), 16).expect("a number");
        caught >> (10 - 1) & 1 == 1
    };
    eventually("it has a handler", || async { catches_usr1() }).await;
    program.signal(Signal::USR1);
    let config = yaml(&backend, "");
    tokio::task::spawn_blocking(move || std::fs::write(go, config)).await.expect("a thread").expect("a pipe");
    let (listeners, _) = program.addresses().await;
    eventually("the answer", || async { answers(&program, "USR1") == 1 }).await;
    assert_eq!(echo(listeners[0], b"ping").await.expect("it serves"), b"ping");
}

#[tokio::test]
async fn a_flood_of_signals_writes_few_lines() {
    let backend = Backend::echo().await;
    let program = Program::run(&yaml(&backend, ""));
    let (listeners, _) = program.addresses().await;
    for _ in 0..20 {
        for _ in 0..10 {
            program.signal(Signal::USR1);
        }
        assert_eq!(echo(listeners[0], b"ping").await.expect("it serves"), b"ping");
    }
    // At most two lines per 10 s are written, and the sessions take only a few of these windows.
    assert!((1..=10).contains(&answers(&program, "USR1")), "{}", program.log());
}

#[tokio::test]
async fn a_log_file_at_its_limit_loses_counted_lines_and_no_session() {
    const LIMIT: u64 = 16 * 1024;
    let backend = Backend::echo().await;
    let state = TempDir::new().expect("a folder");
    let redis = crate::support::Redis::start().await;
    let top = format!("redis: {{url: \"{}\"}}\nstate_dir: {:?}", redis.url(), state.path());
    let mut program = Program::run_by(
        limited(&[&format!("--fsize={LIMIT}:")]),
        &yaml(&backend, &top).replace("{web: {backends", "{web: {weights_key: servers, backends"),
    );
    let (listeners, _) = program.addresses().await;
    // The file of this table is larger than the limit.
    let mut words = vec!["ZADD".to_owned(), "servers".to_owned()];
    words.extend(["100000".to_owned(), backend.address.to_string()]);
    words.extend((0..1_000).flat_map(|n| ["0".to_owned(), format!("10.1.{}.{}:8080", n / 250, n % 250)]));
    redis.run_words(&words).await;
    eventually("the table's file does not fit", || async {
        program.metric("statera_state_writes_failed_total", "").await > 0.0
    })
    .await;
    let serve = async || {
        for _ in 0..20 {
            assert_eq!(echo(listeners[0], b"ping").await.expect("it serves"), b"ping");
        }
    };
    eventually("lines are lost", || async {
        serve().await;
        program.metric("statera_log_dropped_total", "").await >= 20.0
    })
    .await;
    let size = || program.log().len() as u64;
    assert_eq!(size(), LIMIT, "the file is at its limit");

    program.limit(Resource::Fsize, 1 << 30);
    eventually("the table is saved", || async { state.path().join("web.table").is_file() }).await;
    eventually("lines are written again", || async {
        serve().await;
        size() > LIMIT + 1_000
    })
    .await;
    let lost = sum_of(&program.metrics().await, "statera_log_dropped_total", "");
    program.signal(Signal::TERM);
    assert_eq!(program.ends().await, Some(0));
    let log = program.log();
    let torn = log.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_err()).count();
    assert!(torn <= 1, "a lost line spoiled others: {lost} lost, {torn} torn");
    assert!(log.lines().last().expect("a line").contains("\"stopped\""), "within {PATIENCE:?}");
}
