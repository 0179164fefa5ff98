//! What `least_conn` is worth beside `weighted_random`: one slow backend, and how evenly sessions that stay
//! are spread.
//!
//! `make bench-balance` (or `cargo bench --bench balance`) runs the program as it ships, once with each
//! balance, and asks them in turn. The backends are this process's: in the first case threads that serve one
//! session at a time, one of them ten times slower than the others and with less room than its share of the
//! load takes; in the second, tasks that keep their sessions and count them.

mod shipped;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

const BALANCES: [&str; 2] = ["weighted_random", "least_conn"];
const LIMIT: Duration = Duration::from_secs(30);

/// Sessions per second in the first case. A fast backend can serve 900 of them, the slow one 95 of the 150
/// that are its share.
const SERVICE: [Duration; 4] =
    [Duration::from_millis(1), Duration::from_millis(1), Duration::from_millis(1), Duration::from_millis(10)];
const ROUNDS: usize = 5;
const SESSIONS: u32 = 2_400;
const PACE: Duration = Duration::from_micros(1_667);
/// Sessions that wait for the slow backend wait in its accept queue.
const BACKLOG: i32 = 4_096;

/// Backends in the second case.
const BACKENDS: usize = 100;
const SESSIONS_EACH: usize = 50;
/// In each, as many sessions end and begin as there are.
const LOOKS: usize = 8;

struct Running {
    child: Child,
    address: SocketAddr,
    _folder: TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All backends at one weight.
async fn start(statera: &Path, balance: &str, backends: &[SocketAddr]) -> Result<Running> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut table = String::new();
    for backend in backends {
        write!(table, "\"{backend}\": 1, ")?;
    }
    let folder = TempDir::new()?;
    let config = folder.path().join("config.yaml");
    fs::write(
        &config,
        format!(
            "listeners: {{web: {{bind: \"127.0.0.1:{port}\", pool: web}}}}\n\
             pools: {{web: {{balance: {balance}, backends: {{{table}}}}}}}\nlog: {{access: false}}\n"
        ),
    )?;
    let log = File::create(folder.path().join("log"))?;
    let child = Command::new(statera)
        .arg("run")
        .arg("-c")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let running = Running { child, address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)), _folder: folder };
    let begun = Instant::now();
    while session(running.address).await.is_err() {
        let log = || fs::read_to_string(config.with_file_name("log"));
        ensure!(begun.elapsed() < LIMIT, "statera does not serve: {}", log()?);
        sleep(Duration::from_millis(10)).await;
    }
    Ok(running)
}

/// Begins a session that lasts as long as the stream; its backend has sent a byte.
async fn session(proxy: SocketAddr) -> Result<TcpStream> {
    let greeted = async {
        let mut stream = TcpStream::connect(proxy).await?;
        stream.read_u8().await?;
        anyhow::Ok(stream)
    };
    timeout(LIMIT, greeted).await.context("a session got no answer")?
}

/// Serves one session at a time, each for so long, and closes.
fn serve_slowly(service: Duration) -> Result<SocketAddr> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    let address = listener.local_addr()?;
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::sleep(service);
            // The client may have gone.
            let _ = stream.write_all(b"x");
        }
    });
    Ok(address)
}

/// The durations of sessions that begin at a fixed pace, whether or not earlier ones have ended. Each is
/// timed from the moment when it was due.
async fn open_loop(proxy: SocketAddr) -> Result<Vec<Duration>> {
    let begun = Instant::now();
    let mut sessions = JoinSet::new();
    for n in 0..SESSIONS {
        let due = begun + PACE * n;
        sleep_until(due).await;
        sessions.spawn(async move {
            session(proxy).await?;
            anyhow::Ok(due.elapsed())
        });
    }
    let mut times = Vec::new();
    while let Some(time) = sessions.join_next().await {
        times.push(time??);
    }
    times.sort_unstable();
    Ok(times)
}

async fn one_is_slow(statera: &Path) -> Result<()> {
    let backends = SERVICE.map(serve_slowly).into_iter().collect::<Result<Vec<_>>>()?;
    let mut proxies = Vec::new();
    for balance in BALANCES {
        proxies.push(start(statera, balance, &backends).await?);
    }
    let (mut p50, mut p99) = ([const { Vec::new() }; 2], [const { Vec::new() }; 2]);
    for round in 0..ROUNDS {
        for place in [round % 2, (round + 1) % 2] {
            let times = open_loop(proxies[place].address).await?;
            p50[place].push(times[times.len() / 2].as_secs_f64() * 1e3);
            p99[place].push(times[times.len() * 99 / 100].as_secs_f64() * 1e3);
        }
    }
    println!("one of four backends is ten times slower; 600 sessions a second for 4 s, {ROUNDS} rounds");
    println!("{:<18} {:>9} {:>9}   p99 of each round", "", "p50 ms", "p99 ms");
    for (place, balance) in BALANCES.iter().enumerate() {
        let rounds: Vec<String> = p99[place].iter().map(|value| format!("{value:.0}")).collect();
        println!(
            "{balance:<18} {:>9.1} {:>9.1}   {}",
            median(&mut p50[place]),
            median(&mut p99[place]),
            rounds.join(", ")
        );
    }
    println!("p99 of least_conn / weighted_random: {:.3}\n", median(&mut p99[1]) / median(&mut p99[0]));
    Ok(())
}

/// Backends on a runtime of their own, each with the number of sessions that it has.
fn keep_sessions() -> Result<(Vec<SocketAddr>, Arc<[AtomicU32]>)> {
    let counts: Arc<[AtomicU32]> = (0..BACKENDS).map(|_| AtomicU32::new(0)).collect();
    let (listeners, addresses): (Vec<_>, Vec<_>) = (0..BACKENDS)
        .map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        })
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .unzip();
    let shared = Arc::clone(&counts);
    let runtime = runtime()?;
    thread::spawn(move || runtime.block_on(keep(listeners, shared)));
    Ok((addresses, counts))
}

async fn keep(listeners: Vec<TcpListener>, counts: Arc<[AtomicU32]>) -> Result<()> {
    let mut tasks = JoinSet::new();
    for (place, listener) in listeners.into_iter().enumerate() {
        let (listener, counts) = (tokio::net::TcpListener::from_std(listener)?, Arc::clone(&counts));
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let counts = Arc::clone(&counts);
                counts[place].fetch_add(1, Relaxed);
                tokio::spawn(async move {
                    if stream.write_u8(b'x').await.is_ok() {
                        // Until the client's connection ends.
                        let _ = stream.read_u8().await;
                    }
                    counts[place].fetch_sub(1, Relaxed);
                });
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

/// The busiest backend's sessions ÷ the mean of all, at several moments.
async fn spread(statera: &Path, balance: &str) -> Result<Vec<f64>> {
    let (backends, counts) = keep_sessions()?;
    let proxy = start(statera, balance, &backends).await?;
    let (mut open, mut rng, mut ratios) = (Vec::new(), Rng::with_seed(7), Vec::new());
    for look in 0..=LOOKS {
        for _ in 0..BACKENDS * SESSIONS_EACH {
            if look > 0 {
                drop(open.swap_remove(rng.usize(..open.len())));
            }
            open.push(session(proxy.address).await?);
        }
        let active = counts.iter().map(|count| count.load(Relaxed));
        let (sum, most) = active.fold((0, 0), |(sum, most), active| (sum + active, active.max(most)));
        ratios.push(f64::from(most) * BACKENDS as f64 / f64::from(sum));
    }
    Ok(ratios)
}

async fn sessions_stay(statera: &Path) -> Result<()> {
    println!("{BACKENDS} backends, {SESSIONS_EACH} sessions each, which end at random as others begin");
    println!("{:<18} {:>14} {:>8}", "max / mean:", "median", "most");
    for balance in BALANCES {
        let mut ratios = spread(statera, balance).await?;
        println!("{balance:<18} {:>14.2} {:>8.2}", median(&mut ratios), ratios[ratios.len() - 1]);
    }
    Ok(())
}

/// The median of `values`, which it sorts.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("no runtime")
}

fn main() -> Result<()> {
    let statera = shipped::build()?;
    runtime()?.block_on(async {
        one_is_slow(&statera).await?;
        sessions_stay(&statera).await
    })
}
