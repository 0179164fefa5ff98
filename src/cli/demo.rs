//! `statera demo`: a proxy with three small backends, a private Redis if redis-server is installed, and
//! clients.
//!
//! It prints the share of sessions that each backend gets, again and again.

use std::io::IsTerminal as _;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::Args;
use rustix::termios::tcgetwinsize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::print;
use crate::config::Config;
use crate::supervisor::{self, Running};

const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
const KEY: &str = "servers";
const SESSIONS_PER_SECOND: u32 = 200;
const BAR_CELLS: f64 = 40.0;

/// Options of `statera demo`.
#[derive(Args, Debug)]
pub(super) struct DemoArguments {
    /// End the demo after N seconds. Without this, Ctrl-C ends it.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Run without Redis, even if it is installed.
    #[arg(long)]
    no_redis: bool,
}

/// Runs the demo.
pub(super) fn demo(arguments: &DemoArguments) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(show(arguments))
}

async fn show(arguments: &DemoArguments) -> anyhow::Result<()> {
    // Handled before anything is started: a signal that ends the process would leave redis-server running.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // HUP is sent when the terminal is closed.
    let mut hang_up = signal(SignalKind::hangup())?;
    let result = tokio::select! {
        result = perform(arguments) => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        _ = hang_up.recv() => return Ok(()),
    };
    // The shell's prompt is to begin on a line of its own.
    result.and_then(|()| print("\n"))
}

async fn perform(arguments: &DemoArguments) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    let mut backends = Vec::new();
    for name in NAMES {
        let listener =
            tokio::net::TcpListener::bind("127.0.0.1:0").await.context("no free port for a backend")?;
        backends.push(listener.local_addr()?);
        tasks.spawn(greet(name, listener));
    }
    let redis = if arguments.no_redis { None } else { PrivateRedis::start(&backends).await? };
    let config = Config::from_yaml(&yaml(&backends, redis.as_ref())).map_err(|error| anyhow!("{error}"))?;
    let running = supervisor::start(&config, None)?;
    let entry = running.addresses[0].1[0];
    tasks.spawn(connect_again_and_again(entry));

    print(&introduction(entry, &running, &backends, redis.as_ref()))?;
    let end = async {
        match arguments.seconds {
            Some(seconds) => sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        result = watch_shares(&running, &backends) => result,
        () = end => Ok(()),
    }
}

/// A backend: sends its name, and closes the connection.
async fn greet(name: &'static str, listener: tokio::net::TcpListener) {
    loop {
        match listener.accept().await {
            Ok((mut client, _)) => {
                // The client may have closed the connection, which must not end this task.
                let _ = client.write_all(format!("hello from {name}\n").as_bytes()).await;
            }
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn connect_again_and_again(entry: SocketAddr) {
    let mut ticks = interval(Duration::from_secs(1) / SESSIONS_PER_SECOND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let session = async {
            let mut stream = TcpStream::connect(entry).await?;
            let mut greeting = Vec::new();
            stream.read_to_end(&mut greeting).await
        };
        // A session that is refused (all weights are 0) is counted by the listener (`refusals`).
        let _ = timeout(Duration::from_secs(1), session).await;
    }
}

fn yaml(backends: &[SocketAddr], redis: Option<&PrivateRedis>) -> String {
    let redis = redis
        .map(|redis| format!("redis: {{url: \"redis://127.0.0.1:{}/0\"}}\n", redis.port))
        .unwrap_or_default();
    let weights: Vec<String> = backends.iter().map(|backend| format!("\"{backend}\": 100")).collect();
    format!(
        "{redis}listeners: {{demo: {{bind: \"127.0.0.1:0\", pool: demo}}}}\n\
         pools: {{demo: {{weights_key: {KEY}, balance: weighted_round_robin, backends: {{{}}}}}}}\n\
         admin: {{bind: \"127.0.0.1:0\"}}\nworkers: 2\nlog: {{access: false}}\n",
        weights.join(", ")
    )
}

fn introduction(
    entry: SocketAddr,
    running: &Running,
    backends: &[SocketAddr],
    redis: Option<&PrivateRedis>,
) -> String {
    let metrics = running.admin.map(|admin| format!("http://{admin}/metrics")).unwrap_or_default();
    let [alpha, beta, gamma] = [backends[0], backends[1], backends[2]];
    let head = format!(
        "Statera listens on {entry}; {SESSIONS_PER_SECOND} clients a second connect to it. \
         Ctrl-C ends everything.\n\n\
         Try, in another terminal:\n"
    );
    let tries = match redis {
        Some(PrivateRedis { port, .. }) => [
            (format!("redis-cli -p {port} ZADD {KEY} 300 {alpha}"), "three times the share for alpha"),
            (format!("redis-cli -p {port} ZADD {KEY} 0 {beta}"), "drain beta: no new sessions"),
            (format!("redis-cli -p {port} ZREM {KEY} {gamma}"), "take gamma out"),
        ],
        None => [
            (format!("nc {} {}", entry.ip(), entry.port()), "be a client yourself"),
            (format!("curl -s {metrics}"), "what the proxy counts"),
            (
                "apt-get install redis-server".to_owned(),
                "then run the demo again, to change the weights live",
            ),
        ],
    };
    let width = tries.iter().map(|(command, _)| command.len()).max().unwrap_or_default();
    let lines: String = tries
        .iter()
        .enumerate()
        .map(|(n, (command, effect))| format!("  {}  {command:width$}   # {effect}\n", n + 1))
        .collect();
    let without =
        if redis.is_some() { "" } else { "Without Redis the weights are those of the config alone.\n" };
    format!("{head}{lines}\n{without}metrics: {metrics}\n\n")
}

/// Prints the shares of the last second for ever. On a terminal the table is drawn over; elsewhere one line
/// is printed each second.
async fn watch_shares(running: &Running, backends: &[SocketAddr]) -> anyhow::Result<()> {
    let in_place = std::io::stdout().is_terminal();
    let pace = if in_place { Duration::from_millis(200) } else { Duration::from_secs(1) };
    // The counts of the last second, each with its time.
    let mut history = std::collections::VecDeque::new();
    let mut drawn = false;
    loop {
        history.push_back((Instant::now(), counts(running, backends), refusals(running)));
        while history.len() > 1 && history[0].0.elapsed() > Duration::from_millis(1100) {
            history.pop_front();
        }
        let (before, now) = (&history[0].1, &history[history.len() - 1].1);
        let refused = history[history.len() - 1].2 - history[0].2;
        let sessions: Vec<u64> =
            now.iter().zip(before).map(|(now, before)| now.saturating_sub(*before)).collect();
        let text = if in_place {
            let up = if drawn { format!("\x1b[{}A\x1b[J", backends.len() + 1) } else { String::new() };
            format!("{up}{}", table(running, backends, &sessions, refused))
        } else {
            line(backends, &sessions, refused)
        };
        print(&text)?;
        drawn = true;
        sleep(pace).await;
    }
}

fn counts(running: &Running, backends: &[SocketAddr]) -> Vec<u64> {
    let pools = running.observed.pools();
    let living = pools.first().map(|observed| observed.pool.registry.living()).unwrap_or_default();
    let count = |address: &SocketAddr| {
        let text = address.to_string();
        living.iter().find(|b| b.id().as_str() == text).map_or(0, |b| b.counters.sum(|c| &c.connections))
    };
    backends.iter().map(count).collect()
}

fn refusals(running: &Running) -> u64 {
    running.observed.listeners().iter().map(|listener| listener.counters.sum(|c| &c.no_backend)).sum()
}

fn weight(running: &Running, backend: SocketAddr) -> String {
    let text = backend.to_string();
    let weight = || {
        let snapshot = running.observed.pools().first()?.pool.cell.load();
        let member = snapshot.members().iter().find(|member| member.backend.id().as_str() == text)?;
        Some(member.weight.to_string())
    };
    weight().unwrap_or_else(|| "-".to_owned())
}

/// The table. Every line fits into the terminal's width, since a line that wraps would not be drawn over.
fn table(running: &Running, backends: &[SocketAddr], sessions: &[u64], refused: u64) -> String {
    // A terminal that does not know its width reports 0.
    let width = tcgetwinsize(std::io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    let width = if width == 0 { 80 } else { width.max(20) } - 1;
    let total = sessions.iter().sum::<u64>();
    let refused = if refused == 0 { String::new() } else { format!(", {refused} refused") };
    let head = format!(
        "{:8} {:18} {:>8}  share of the last second's {total}{refused}",
        "backend", "address", "weight"
    );
    let mut lines = vec![head];
    for ((name, backend), count) in NAMES.iter().zip(backends).zip(sessions) {
        let share = share(*count, total);
        let bar = "█".repeat((share / 100.0 * BAR_CELLS).round() as usize);
        let (address, weight) = (backend.to_string(), weight(running, *backend));
        lines.push(format!("{name:8} {address:18} {weight:>8}  {share:5.1} %  {bar}"));
    }
    lines.iter().flat_map(|line| line.chars().take(width).chain(['\n'])).collect()
}

fn line(backends: &[SocketAddr], sessions: &[u64], refused: u64) -> String {
    let total = sessions.iter().sum();
    let shares: Vec<String> = NAMES
        .iter()
        .zip(backends)
        .zip(sessions)
        .map(|((name, _), count)| format!("{name} {:.1} %", share(*count, total)))
        .collect();
    let refused = if refused == 0 { String::new() } else { format!(", {refused} refused") };
    format!("{} of {total} sessions{refused}\n", shares.join("  "))
}

fn share(count: u64, total: u64) -> f64 {
    if total == 0 { 0.0 } else { count as f64 * 100.0 / total as f64 }
}

/// The demo's own redis-server. It is ended when this is dropped.
struct PrivateRedis {
    server: Child,
    port: u16,
}

impl PrivateRedis {
    /// Starts redis-server with the first weights. `None` where it is not installed.
    async fn start(backends: &[SocketAddr]) -> anyhow::Result<Option<Self>> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let spawned = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .args(["--notify-keyspace-events", "KA", "--dir", "/"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let server = match spawned {
            Ok(server) => server,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("cannot start redis-server"),
        };
        let redis = Self { server, port };
        let client = redis::Client::open(("127.0.0.1", port))?;
        let ready = async {
            loop {
                if let Ok(connection) = client.get_multiplexed_async_connection().await {
                    return connection;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        let mut connection =
            timeout(Duration::from_secs(5), ready).await.context("redis-server does not answer")?;
        let mut command = redis::cmd("ZADD");
        command.arg(KEY);
        for backend in backends {
            command.arg(100).arg(backend.to_string());
        }
        command.query_async::<()>(&mut connection).await.context("cannot write the first weights")?;
        Ok(Some(redis))
    }
}

impl Drop for PrivateRedis {
    fn drop(&mut self) {
        // The server may have ended already. Until `wait` no other process gets its pid, so `kill` is safe.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
