//! What a scenario learns of a running program: its log (JSON lines on standard output), and from the kernel
//! its memory, CPU time and descriptors. It can also limit the descriptors.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use super::{Program, eventually, require};

/// A field of a log line; empty if the field is missing or not a text.
pub fn text<'a>(line: &'a serde_json::Value, field: &str) -> &'a str {
    line[field].as_str().unwrap_or_default()
}

impl Program {
    /// The log lines so far, with the session lines. A last line that is not complete is left out.
    pub fn lines(&self) -> Vec<serde_json::Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The log lines so far whose message begins with `message`.
    pub fn messages(&self, message: &str) -> Vec<serde_json::Value> {
        let mut lines = self.lines();
        lines.retain(|line| line["message"].as_str().is_some_and(|text| text.starts_with(message)));
        lines
    }

    /// Waits for a log line whose message begins with `message`, and returns the first one.
    pub async fn says(&self, message: &str) -> serde_json::Value {
        eventually(message, || async {
            let is_logged = !self.messages(message).is_empty();
            assert!(is_logged || self.is_alive(), "it ended and did not log {message:?}:\n{}", self.log());
            is_logged
        })
        .await;
        self.messages(message).remove(0)
    }

    /// The first address of the first listener, once the program accepts sessions.
    pub async fn address(&self) -> SocketAddr {
        let line = self.says("listener accepting connections").await;
        let addresses = line["addresses"].as_str().expect("a text").trim_matches(['[', ']']);
        let first = addresses.split(", ").next().expect("split yields at least one");
        first.parse().unwrap_or_else(|error| panic!("{error}: {addresses}"))
    }

    fn is_alive(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    /// True once all threads are stopped by a SIGSTOP.
    pub fn is_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        threads.into_iter().all(|thread| {
            let stat = std::fs::read_to_string(thread.expect("a thread").path().join("stat"));
            stat.is_ok_and(|stat| stat.contains(") T "))
        })
    }

    /// The numbers of the open descriptors.
    pub fn descriptors(&self) -> HashSet<usize> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs");
        let numbers = entries.map(|entry| entry.expect("an entry").file_name());
        numbers.map(|name| name.to_str().and_then(|name| name.parse().ok()).expect("a number")).collect()
    }

    /// Limits the descriptors so that the program can open `count` more.
    pub fn leave_descriptors(&self, count: usize) {
        require("prlimit", "util-linux");
        let open = self.descriptors();
        // The limit is on the highest number, not on the count, and the kernel takes the lowest free number
        // next.
        let limit = (0..).filter(|number| !open.contains(number)).nth(count).expect("there are many");
        let status = Command::new("prlimit")
            .args(["--pid", &self.pid().to_string(), &format!("--nofile={limit}:")])
            .status()
            .expect("prlimit starts");
        assert!(status.success());
    }

    /// The resident memory of the program now.
    pub fn resident_kilobytes(&self) -> u64 {
        self.kilobytes("VmRSS:")
    }

    /// The most resident memory that the program has had.
    pub fn peak_kilobytes(&self) -> u64 {
        self.kilobytes("VmHWM:")
    }

    fn kilobytes(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("Linux reports it");
        value.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// The CPU time that the program has used.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("it runs");
        let (_, fields) = stat.rsplit_once(") ").expect("the name is in parentheses");
        // Fields 14 and 15: user and system time in hundredths of a second.
        let ticks = fields.split(' ').skip(11).take(2).map(|n| n.parse::<u64>().expect("a number"));
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }
}
