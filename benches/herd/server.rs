//! A redis-server, a fleet of proxies on it, and what the server counts of them.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redis::{Connection, cmd};
use tempfile::TempDir;
use tokio::time::Instant;

/// How long anything may take to come up.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A program that is killed when this is dropped.
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the server has counted since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    pub cpu_seconds: f64,
    pub commands: f64,
    pub connections: f64,
    pub reads: f64,
    pub picks: f64,
}

/// A redis-server on a free port.
pub struct Redis {
    pub port: u16,
    folder: TempDir,
    arguments: Vec<String>,
    /// `None` while it is down.
    pub server: Option<Running>,
}

impl Redis {
    /// Starts it with more arguments.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut redis = Self { port, folder: TempDir::new()?, arguments, server: None };
        redis.launch()?;
        Ok(redis)
    }

    /// Starts it again, with the data that was saved.
    pub fn launch(&mut self) -> Result<Connection> {
        let mut server = Command::new("redis-server");
        server.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
        server.arg("--dir").arg(self.folder.path()).args(&self.arguments);
        let started = server.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        self.server =
            Some(Running(started.context("redis-server is missing: apt-get install redis-server")?));
        let begun = Instant::now();
        loop {
            if let Ok(mut connection) = self.connect()
                && cmd("PING").exec(&mut connection).is_ok()
            {
                return Ok(connection);
            }
            ensure!(begun.elapsed() < LIMIT, "redis-server does not answer");
            sleep(Duration::from_millis(1));
        }
    }

    pub fn connect(&self) -> Result<Connection> {
        Ok(redis::Client::open(("127.0.0.1", self.port))?.get_connection()?)
    }
}

pub fn counted(connection: &mut Connection) -> Result<Counted> {
    let info: String = cmd("INFO").arg("all").query(connection)?;
    let number = |name: &str| number(&info, name);
    // Our own questions are no part of it.
    let own = info.lines().find_map(|line| line.strip_prefix("cmdstat_info:calls=")?.split_once(",usec="));
    let own_micros = own.map_or(0.0, |(_, rest)| number_at(rest));
    Ok(Counted {
        cpu_seconds: number("used_cpu_user:") + number("used_cpu_sys:") - own_micros / 1e6,
        commands: number("total_commands_processed:") - number("cmdstat_info:calls="),
        connections: number("total_connections_received:"),
        reads: number("cmdstat_zrange:calls="),
        picks: number("cmdstat_evalsha_ro:calls="),
    })
}

pub fn connections(connection: &mut Connection) -> Result<f64> {
    let info: String = cmd("INFO").arg("stats").query(connection)?;
    Ok(number(&info, "total_connections_received:"))
}

pub fn number(info: &str, name: &str) -> f64 {
    info.lines().find_map(|line| line.strip_prefix(name)).map_or(0.0, number_at)
}

pub fn number_at(text: &str) -> f64 {
    text.split(',').next().and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
}

/// Starts `proxies` programs with the configuration `yaml`.
pub fn start_fleet(program: &Path, folder: &Path, yaml: &str, proxies: u32) -> Result<Vec<Running>> {
    let config = folder.join("config.yaml");
    fs::write(&config, yaml)?;
    let start = |number: u32| -> Result<Running> {
        let log = File::create(folder.join(format!("log{number}")))?;
        let mut statera = Command::new(program);
        statera.args(["run", "-c"]).arg(&config).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Running(statera.spawn()?))
    };
    (0..proxies).map(start).collect()
}

/// Waits until all proxies watch and report.
pub fn all_report(connection: &mut Connection, applied: &str, proxies: u32) -> Result<()> {
    let begun = Instant::now();
    // One field of the hash belongs to no proxy.
    while cmd("HLEN").arg(applied).query::<u32>(connection)? <= proxies {
        ensure!(begun.elapsed() < LIMIT, "not all proxies report");
        sleep(Duration::from_millis(50));
    }
    Ok(())
}
