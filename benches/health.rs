//! What health checks cost: 10,000 backends checked every two seconds, and what becomes of the sessions
//! beside them.
//!
//! `make bench-health` (or `cargo bench --bench health`) runs the program as it ships with 10,000 backends,
//! once with checks and once without, in turn. CPU time is that of the proxy's process, from /proc; sessions
//! come at a fixed pace (open loop: each is timed from when it should have begun).
//!
//! Ten of the backends have weight, so the sessions are theirs. The others are at weight 0, and checked
//! alike: all of them are one thread that listens (127.0.0.0/8 is this machine's), and what it does for 5,000
//! checks a second is done by 10,000 other machines in the field. So it runs as SCHED_IDLE, where it takes no
//! time from the proxy. What the kernel does for both ends of a connection on loopback stays, though, and
//! stands in the proxy's account.

mod shipped;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::thread::gettid;
use tempfile::TempDir;
use tokio::time::Instant;

const BACKENDS: u32 = 10_000;
const SERVING: u32 = 10;
const ROUNDS: usize = 7;
const SETTLE: Duration = Duration::from_secs(4);
const REST: Duration = Duration::from_secs(6);
const SESSIONS: u32 = 4_000;
const PACE: Duration = Duration::from_millis(1);
const CLIENTS: u32 = 4;
const LIMIT: Duration = Duration::from_secs(20);

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A backend that sends one byte and closes.
fn serve(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept() {
        // A check has closed its connection by then.
        let _ = stream.write_all(b"x");
    }
}

/// Counts what it accepts, in time that no other thread wants.
fn count(listener: TcpListener, accepted: &AtomicU64) -> Result<()> {
    let thread = gettid().as_raw_nonzero().to_string();
    let status = Command::new("chrt").args(["--idle", "--pid", "0", &thread]).status().context("chrt")?;
    ensure!(status.success(), "chrt of util-linux cannot make a thread SCHED_IDLE: {status}");
    while listener.accept().is_ok() {
        accepted.fetch_add(1, Relaxed);
    }
    Ok(())
}

fn listen() -> Result<(TcpListener, u16)> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

fn start(statera: &Path, folder: &Path, backends: &str, checks: &str) -> Result<(Running, SocketAddr)> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let config = folder.join("config.yaml");
    fs::write(
        &config,
        format!(
            "listeners: {{web: {{bind: \"127.0.0.1:{port}\", pool: web}}}}\n\
             pools: {{web: {{backends: {{{backends}}}{checks}}}}}\nlog: {{access: false}}\n"
        ),
    )?;
    let log = File::create(folder.join("log"))?;
    let child = Command::new(statera)
        .arg("run")
        .arg("-c")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let (running, address) = (Running(child), SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let begun = Instant::now();
    while session(address).is_err() {
        ensure!(
            begun.elapsed() < LIMIT,
            "statera does not serve: {}",
            fs::read_to_string(folder.join("log"))?
        );
        sleep(Duration::from_millis(10));
    }
    Ok((running, address))
}

fn session(proxy: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(proxy)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer == b"x", "no answer");
    Ok(())
}

/// CPU time of all threads of the process so far.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().context("schedstat is empty")?.parse::<u64>()?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// The median and the 99th percentile of sessions that begin at a fixed pace.
fn latencies(proxy: SocketAddr) -> Result<(Duration, Duration)> {
    let begun = Instant::now();
    let client = |number: u32| {
        thread::spawn(move || -> Result<Vec<Duration>> {
            let mut taken = Vec::new();
            for n in (number..SESSIONS).step_by(CLIENTS as usize) {
                let due = begun + PACE * n;
                sleep(due.saturating_duration_since(Instant::now()));
                session(proxy)?;
                taken.push(due.elapsed());
            }
            Ok(taken)
        })
    };
    let clients: Vec<_> = (0..CLIENTS).map(client).collect();
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.join().map_err(|_| anyhow::anyhow!("a client died"))??);
    }
    all.sort_unstable();
    Ok((all[all.len() / 2], all[all.len() * 99 / 100]))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let statera = shipped::build()?;
    let ((serving, serving_port), (checked, checked_port)) = (listen()?, listen()?);
    let accepted = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&accepted);
    thread::spawn(move || serve(serving));
    thread::spawn(move || count(checked, &counted).expect("it counts"));
    let first = u32::from(Ipv4Addr::new(127, 1, 0, 1));
    let mut backends = String::new();
    for n in 0..BACKENDS {
        let (port, weight) = if n < SERVING { (serving_port, 1) } else { (checked_port, 0) };
        write!(backends, "\"{}:{port}\": {weight}, ", Ipv4Addr::from_bits(first + n))?;
    }

    let settings = [("without checks", ""), ("checked every 2 s", ", health_check: {interval: 2s}")];
    let (mut idle, mut p50, mut p99) =
        ([const { Vec::new() }; 2], [const { Vec::new() }; 2], [const { Vec::new() }; 2]);
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        for (place, (_, checks)) in settings.iter().enumerate() {
            let folder = TempDir::new()?;
            let (running, proxy) = start(&statera, folder.path(), &backends, checks)?;
            sleep(SETTLE);
            let (cpu, asked, begun) = (cpu_seconds(running.0.id())?, accepted.load(Relaxed), Instant::now());
            sleep(REST);
            let seconds = begun.elapsed().as_secs_f64();
            idle[place].push((cpu_seconds(running.0.id())? - cpu) / seconds);
            if place == 1 {
                rates.push((accepted.load(Relaxed) - asked) as f64 / seconds);
            }
            let (middle, most) = latencies(proxy)?;
            p50[place].push(middle.as_secs_f64() * 1e3);
            p99[place].push(most.as_secs_f64() * 1e3);
        }
    }
    println!("{BACKENDS} backends, {ROUNDS} rounds; {:.0} checks a second", median(&mut rates));
    println!("{:<18} {:>14} {:>10} {:>10}", "", "of a core", "p50 ms", "p99 ms");
    for (place, (name, _)) in settings.iter().enumerate() {
        println!(
            "{name:<18} {:>12.1} % {:>10.2} {:>10.2}",
            100.0 * median(&mut idle[place]),
            median(&mut p50[place]),
            median(&mut p99[place])
        );
    }
    println!("p99 with checks / without: {:.2}", median(&mut p99[1]) / median(&mut p99[0]));
    Ok(())
}
