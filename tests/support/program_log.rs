//! What a started program tells of itself: its log, in JSON on standard output, and what the kernel knows of it. And the one
//! limit that the kernel can be told: how many descriptors it may open.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use super::{Program, eventually, require};

/// A field of a log line; empty where it is not there, or no text.
pub fn text<'a>(line: &'a serde_json::Value, field: &str) -> &'a str {
    line[field].as_str().unwrap_or_default()
}

impl Program {
    /// Its log lines so far, session lines among them. The last one may still be on its way.
    pub fn lines(&self) -> Vec<serde_json::Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Those whose message begins like this.
    pub fn messages(&self, message: &str) -> Vec<serde_json::Value> {
        let mut lines = self.lines();
        lines.retain(|line| line["message"].as_str().is_some_and(|text| text.starts_with(message)));
        lines
    }

    /// Waits for a message, and returns the first of its kind.
    pub async fn says(&self, message: &str) -> serde_json::Value {
        eventually(message, || async {
            let said = !self.messages(message).is_empty();
            assert!(said || self.is_alive(), "it ended without a word of {message:?}:\n{}", self.log());
            said
        })
        .await;
        self.messages(message).remove(0)
    }

    /// The address of its first listener, the first of several, once it accepts.
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

    /// True once all its threads have heard a SIGSTOP.
    pub fn is_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        threads.into_iter().all(|thread| {
            let stat = std::fs::read_to_string(thread.expect("a thread").path().join("stat"));
            stat.is_ok_and(|stat| stat.contains(") T "))
        })
    }

    /// The numbers of the descriptors that it has open.
    pub fn descriptors(&self) -> HashSet<usize> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs");
        let numbers = entries.map(|entry| entry.expect("an entry").file_name());
        numbers.map(|name| name.to_str().and_then(|name| name.parse().ok()).expect("a number")).collect()
    }

    /// Leaves it so many descriptors to open.
    pub fn leave_descriptors(&self, count: usize) {
        require("prlimit", "util-linux");
        let open = self.descriptors();
        // The limit is one of numbers, not of a count, and the lowest free number is taken next.
        let limit = (0..).filter(|number| !open.contains(number)).nth(count).expect("there are many");
        let status = Command::new("prlimit")
            .args(["--pid", &self.pid().to_string(), &format!("--nofile={limit}:")])
            .status()
            .expect("prlimit starts");
        assert!(status.success());
    }

    /// How much memory it occupies.
    pub fn resident_kilobytes(&self) -> u64 {
        self.kilobytes("VmRSS:")
    }

    /// How much it has occupied at most.
    pub fn peak_kilobytes(&self) -> u64 {
        self.kilobytes("VmHWM:")
    }

    fn kilobytes(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("Linux tells it");
        value.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// The CPU time that it has used.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("it runs");
        let (_, fields) = stat.rsplit_once(") ").expect("the name stands in parentheses");
        // The 14th and 15th field, user and system time in hundredths of a second.
        let ticks = fields.split(' ').skip(11).take(2).map(|n| n.parse::<u64>().expect("a number"));
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }
}
