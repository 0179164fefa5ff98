//! What the kernel says about time and memory: of the proxy, of this process, of the whole machine.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::Instant;

/// Clock ticks a second in /proc: the same on every Linux.
const TICKS: f64 = 100.0;

/// A process and its children (nginx's workers), as they were when it had started.
#[derive(Debug, Clone, Default)]
pub struct Processes(pub Vec<u32>);

impl Processes {
    /// `pid` and everything below it.
    pub fn of(pid: u32) -> Self {
        let mut found = vec![pid];
        let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Some((pid, stat(pid)?.get(1)?.parse().ok()?)))
            .collect();
        let mut next = 0;
        while let Some(&parent) = found.get(next) {
            found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
            next += 1;
        }
        Self(found)
    }

    /// CPU time, user and kernel, of all threads. The scheduler's own nanoseconds where it shows them (the
    /// sum that utime and stime are cut from), else those two, in ticks of 10 ms.
    pub fn cpu(&self) -> Duration {
        self.0.iter().map(|&pid| scheduled(pid).unwrap_or_else(|| ticked(pid))).sum()
    }

    /// The same for each thread, by its number; empty where the scheduler does not show it.
    fn cpu_of_threads(&self) -> BTreeMap<OsString, Duration> {
        let threads = self.0.iter().filter_map(|&pid| tasks(pid)).flatten();
        threads.filter_map(|task| Some((task.file_name()?.to_owned(), of_thread(&task)?))).collect()
    }

    /// Resident memory.
    pub fn resident_bytes(&self) -> u64 {
        let of = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        1024 * self.0.iter().filter_map(of).sum::<u64>()
    }

    /// Whether a tracer has attached to every thread.
    pub fn all_traced(&self) -> bool {
        let traced = |folder: std::path::PathBuf| {
            let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        };
        self.0.iter().all(|&pid| tasks(pid).is_some_and(|mut tasks| tasks.all(traced)))
    }
}

/// The fields of /proc/PID/stat from the third (the state) on; the second, in brackets, may hold blanks.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(')')?.1.split_whitespace().map(String::from).collect())
}

fn tasks(pid: u32) -> Option<impl Iterator<Item = std::path::PathBuf>> {
    Some(fs::read_dir(format!("/proc/{pid}/task")).ok()?.filter_map(|entry| Some(entry.ok()?.path())))
}

fn scheduled(pid: u32) -> Option<Duration> {
    tasks(pid)?.map(|task| of_thread(&task)).sum()
}

fn of_thread(task: &Path) -> Option<Duration> {
    let text = fs::read_to_string(task.join("schedstat")).ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

fn ticked(pid: u32) -> Duration {
    let ticks = |fields: Vec<String>| -> Option<f64> {
        Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
    };
    Duration::from_secs_f64(stat(pid).and_then(ticks).unwrap_or(0.0) / TICKS)
}

/// One look at everything.
#[derive(Debug, Clone)]
pub struct Reading {
    pub at: Instant,
    /// Of the proxy.
    pub cpu: Duration,
    /// Of each of its threads.
    of_threads: BTreeMap<OsString, Duration>,
    /// Of the whole machine, in ticks: all, stolen by the hypervisor, and spent in programs.
    all: f64,
    stolen: f64,
    in_programs: f64,
    /// What of `in_programs` was ours: the proxy's and this process's.
    ours: f64,
}

impl Reading {
    pub fn now(proxy: &Processes) -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let fields: Vec<f64> = text
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .map(|field| field.parse().unwrap_or(0.0))
            .collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or(0.0);
        let user = |pid: u32| stat(pid).and_then(|f| f.get(11)?.parse::<f64>().ok()).unwrap_or(0.0);
        let ours = proxy.0.iter().map(|&pid| user(pid)).sum::<f64>() + user(std::process::id());
        Self {
            at: Instant::now(),
            cpu: proxy.cpu(),
            of_threads: proxy.cpu_of_threads(),
            all: (0..8).map(field).sum(),
            stolen: field(7),
            in_programs: field(0) + field(1),
            ours,
        }
    }

    /// What the busiest of the proxy's two workers did since `before`, in units of what both did on average:
    /// 1 is an even share, 2 is all. The workers are its two busiest threads or processes; the others hardly
    /// work.
    pub fn evenness_since(&self, before: &Self) -> Option<f64> {
        let mut spent: Vec<f64> = self
            .of_threads
            .iter()
            .map(|(thread, cpu)| {
                (*cpu - before.of_threads.get(thread).copied().unwrap_or_default()).as_secs_f64()
            })
            .collect();
        spent.sort_by(|a, b| b.total_cmp(a));
        match spent[..] {
            [first, second, ..] if first > 0.0 => Some(first / first.midpoint(second)),
            _ => None,
        }
    }

    /// The shares of the machine, since `before`, that the hypervisor took and that other programs took. The
    /// latter in user mode only: the kernel's time cannot be assigned to programs.
    pub fn disturbance_since(&self, before: &Self) -> Disturbance {
        let all = (self.all - before.all).max(1.0);
        let others = (self.in_programs - before.in_programs) - (self.ours - before.ours);
        Disturbance { stolen: (self.stolen - before.stolen) / all, others: others.max(0.0) / all }
    }
}

/// Shares of 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disturbance {
    pub stolen: f64,
    pub others: f64,
}

/// Raises the limit of descriptors to `wanted`, or as far as it goes; the result is what there is.
pub fn raise_descriptors(wanted: u64) -> Result<u64> {
    let set = |limit: u64| setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) });
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(wanted);
    let limit = if hard < wanted && set(wanted).is_ok() { wanted } else { hard.min(wanted) };
    let rest = Rlimit { current: Some(limit), maximum: Some(hard.max(limit)) };
    setrlimit(Resource::Nofile, rest).with_context(|| format!("cannot raise the descriptors to {limit}"))?;
    Ok(limit)
}

/// A line of /proc/sys, for the report.
pub fn sysctl(name: &str) -> String {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    fs::read_to_string(path)
        .map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "))
        .unwrap_or_default()
}
