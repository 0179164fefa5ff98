//! The system calls of a short session, counted by strace: an additional call fails these tests.
//!
//! docs/decisions/0016-system-calls.md has the table. `epoll_wait` is counted apart, since the kernel
//! decides how many events share a call.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::support::{Peer, Program, eventually, require, soon};

const MESSAGE: [u8; 64] = [7; 64];

/// The calls of one short session, without those that sessions share ([`is_shared`]).
const SHORT_SESSION: [(&str, usize); 8] = [
    ("accept4", 1),
    ("close", 2),
    ("connect", 1),
    ("epoll_ctl", 2),
    // The request, the client's end, the answer, the backend's end.
    ("recvfrom", 4),
    ("sendto", 2),
    ("shutdown", 1),
    ("socket", 1),
];

/// The program with one worker under strace, in front of an echo backend.
struct Traced {
    program: Program,
    calls: TempDir,
    entry: SocketAddr,
}

impl Traced {
    async fn start() -> Self {
        let calls = TempDir::new().expect("a folder");
        let mut strace = Command::new(require("strace", "strace"));
        // -D makes the program the child of this test instead of strace's; -ff writes a file for each
        // thread.
        strace.args(["-D", "-ff", "-qq", "-o"]).arg(calls.path().join("calls")).arg(Program::path());
        let backend = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = backend.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = backend.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    tokio::io::copy(&mut reader, &mut writer).await
                });
            }
        });
        let program = Program::run_by(
            strace,
            &format!(
                "workers: 1\nlog: {{access: false}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
                 pools: {{web: {{backends: {{\"{address}\": 1}}}}}}"
            ),
        );
        let entry = program.address().await;
        Self { program, calls, entry }
    }

    /// Ends the program and returns the calls of its worker.
    async fn calls(mut self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.program.pid())).expect("it runs");
        let worker = tasks
            .map(|task| task.expect("readable").path())
            .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "statera-0"))
            .expect("a worker");
        let thread = worker.file_name().expect("a thread").to_string_lossy().into_owned();
        let file: PathBuf = self.calls.path().join(format!("calls.{thread}"));
        self.program.signal(Signal::TERM);
        assert!(self.program.wait().success(), "{}", self.program.log());
        let text = || fs::read_to_string(&file).unwrap_or_default();
        eventually("strace has written all", || async { text().contains("\nexit(") }).await;
        text().lines().map(str::to_owned).collect()
    }
}

async fn session(entry: SocketAddr, requests: usize) {
    let mut client = Peer::connect(entry).await;
    for _ in 0..requests {
        client.say(&MESSAGE).await;
        client.hears(&MESSAGE).await;
    }
    client.end().await;
    // The proxy closes the client's connection once the backend has ended its direction too.
    client.hears_the_end().await;
}

fn name(call: &str) -> &str {
    call.split('(').next().unwrap_or(call)
}

fn accepted(call: &str) -> bool {
    name(call) == "accept4" && !call.contains("EAGAIN")
}

/// The calls of `sessions` sessions, without those of the first and the last session.
fn window(calls: &[String], sessions: usize) -> &[String] {
    let accepts: Vec<usize> = (0..calls.len()).filter(|at| accepted(&calls[*at])).collect();
    assert_eq!(accepts.len(), sessions + 2, "every connection is one session");
    &calls[accepts[1]..accepts[sessions + 1]]
}

/// Counts the calls by name, without those that sessions share.
fn own(calls: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for call in calls.iter().filter(|call| !is_shared(call)) {
        *counts.entry(name(call)).or_default() += 1;
    }
    counts
}

fn is_shared(call: &str) -> bool {
    match name(call) {
        "accept4" => !accepted(call),
        // Checks that the socket is not connected to itself. Only backends with a port from the ephemeral
        // range need the check, as in this scenario.
        "getsockname" => true,
        // In a debug build the standard library and the runtime check their descriptors.
        "fcntl" => cfg!(debug_assertions) && (call.contains("F_GETFD") || call.contains("F_GETFL")),
        // Waits for events; which of the two calls is used depends on the oldest kernel that the build
        // supports.
        "epoll_pwait" | "epoll_pwait2" => true,
        // On a system without a vDSO clock.
        "clock_gettime" => true,
        // The allocator.
        "brk" | "madvise" | "mmap" | "mprotect" | "munmap" => true,
        _ => false,
    }
}

fn count(calls: &[String], wanted: &str) -> usize {
    calls.iter().filter(|call| name(call) == wanted).count()
}

/// Bounds the calls that sessions share.
fn bounded(calls: &[String], sessions: usize) {
    for (name, most) in [
        // Each accept may be followed by one that returns EAGAIN.
        ("accept4", 2 * sessions),
        ("getsockname", sessions),
    ] {
        let count = count(calls, name);
        assert!(count <= most, "{count} calls of {name} in {sessions} sessions");
    }
    let memory: usize =
        ["brk", "madvise", "mmap", "mprotect", "munmap"].map(|name| count(calls, name)).iter().sum();
    assert!(memory <= sessions / 4, "the allocator asked the kernel {memory} times in {sessions} sessions");
}

fn times(sessions: usize) -> BTreeMap<&'static str, usize> {
    SHORT_SESSION.into_iter().map(|(name, count)| (name, count * sessions)).collect()
}

#[tokio::test]
async fn a_short_session_makes_the_calls_of_the_table_and_no_others() {
    const SESSIONS: usize = 50;
    let traced = Traced::start().await;
    for _ in 0..SESSIONS + 2 {
        session(traced.entry, 1).await;
    }
    let calls = traced.calls().await;
    let calls = window(&calls, SESSIONS);
    assert_eq!(own(calls), times(SESSIONS), "the last one:\n{}", last_session(calls));
    bounded(calls, SESSIONS);
    // One wait each for the client, its bytes, the connect, the answer, the client's end and the backend's
    // end, and some for timer ticks.
    let waits = count(calls, "epoll_pwait") + count(calls, "epoll_pwait2");
    assert!(waits <= SESSIONS * 7, "{waits} waits in {SESSIONS} sessions");
}

#[tokio::test]
async fn concurrent_sessions_make_no_other_calls() {
    const SESSIONS: usize = 640;
    const AT_ONCE: usize = 64;
    let traced = Traced::start().await;
    session(traced.entry, 1).await;
    let mut clients = JoinSet::new();
    for _ in 0..AT_ONCE {
        let entry = traced.entry;
        clients.spawn(async move {
            for _ in 0..SESSIONS / AT_ONCE {
                session(entry, 1).await;
            }
        });
    }
    soon("all sessions end", clients.join_all()).await;
    session(traced.entry, 1).await;
    let calls = traced.calls().await;
    let calls = window(&calls, SESSIONS);
    // Under strace the worker is overloaded: it may hold a handshake back, and may have to complete it
    // without bytes.
    let switches = |held: &str| calls.iter().filter(|call| call.contains(held)).count();
    let (held, ended) = (switches("TCP_QUICKACK, [0]"), switches("TCP_QUICKACK, [1]"));
    assert!(ended <= held && held <= SESSIONS, "{held} handshakes held, {ended} ended without bytes");
    let mut all_else = own(calls);
    if let Some(count) = all_else.get_mut("setsockopt") {
        *count -= held + ended;
    }
    all_else.retain(|_, count| *count > 0);
    assert_eq!(all_else, times(SESSIONS));
    bounded(calls, SESSIONS);
}

/// Nagle's algorithm is switched off just before it could delay a packet, and not for sessions that it
/// cannot delay.
#[tokio::test]
async fn small_packets_are_never_delayed() {
    let traced = Traced::start().await;
    for requests in [1, 3, 1] {
        session(traced.entry, requests).await;
    }
    let calls = traced.calls().await;
    let names: Vec<&str> = window(&calls, 1)
        .iter()
        .map(|call| name(call))
        .filter(|name| ["sendto", "setsockopt"].contains(name))
        .collect();
    // The `sendto` calls alternate between the backend and the client.
    assert_eq!(names, ["sendto", "sendto", "setsockopt", "sendto", "sendto", "sendto", "sendto"]);
}

fn last_session(calls: &[String]) -> String {
    let start = calls.iter().rposition(|call| accepted(call)).unwrap_or(0);
    calls[start..].join("\n")
}
