//! Watches the snapshots of proxies all the time: of proxies in this process, and of one that is a program
//! and is restarted.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Signal;
use statera::balance::pool::Pool;
use tempfile::TempDir;
use tokio::runtime::Builder;
use tokio::time::Instant;

use super::{History, Observation, Program, Promise, Proxy, Table, get, sum_of};

/// A proxy whose snapshot is watched.
#[derive(Clone)]
pub enum Watched {
    /// A proxy in this process.
    Inside(Arc<Pool>),
    /// A program, by the address of its admin server; `None` while it does not run.
    Outside(Arc<Mutex<Option<SocketAddr>>>),
}

impl From<&Proxy> for Watched {
    fn from(proxy: &Proxy) -> Self {
        Self::Inside(Arc::clone(&proxy.running.observed.pools()[0].pool))
    }
}

impl Watched {
    /// Observes the proxy; `None` if it does not answer. For a program it takes two scrapes, so that the
    /// snapshot and its age belong together.
    pub async fn observe(&self) -> Option<Observation> {
        match self {
            Self::Inside(pool) => {
                // Age before snapshot: if a new snapshot comes in between, it is newer than the age says,
                // not older.
                let at = Instant::now();
                let (age, snapshot) = (pool.cell.age(), pool.cell.load());
                let members = snapshot.members().iter();
                let table = members.map(|m| (m.backend.id().to_string(), m.weight.get())).collect();
                Some(Observation { at, age, table, has_zeros: true })
            }
            Self::Outside(address) => {
                let address = (*address.lock().unwrap_or_else(PoisonError::into_inner))?;
                let at = Instant::now();
                let before = get(address, "/metrics").await.ok()?.body;
                let after = get(address, "/metrics").await.ok()?.body;
                let version = |text| sum_of(text, "statera_snapshot_version", "web");
                // Within a scrape the table is encoded before the version, and the age after it.
                (version(&before) == version(&after)).then(|| Observation {
                    at,
                    age: age_in(&before),
                    table: table_in(&after),
                    has_zeros: false,
                })
            }
        }
    }
}

fn age_in(metrics: &str) -> Option<Duration> {
    let name = "statera_snapshot_age_seconds";
    metrics.contains(&format!("\n{name}{{")).then(|| Duration::from_secs_f64(sum_of(metrics, name, "web")))
}

/// The table without members at weight zero: such a series may be of a removed backend whose sessions have
/// not ended.
fn table_in(metrics: &str) -> Table {
    let rows = metrics.lines().filter_map(|line| {
        let (labels, weight) = line.strip_prefix("statera_backend_weight{")?.split_once("} ")?;
        let backend = labels.split_once("backend=\"")?.1.split_once('"')?.0;
        Some((backend.to_owned(), weight.parse().expect("a number")))
    });
    rows.filter(|(_, weight)| *weight > 0.0).collect()
}

/// Observes proxies until it is ended, each in its own thread.
pub struct Watcher {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<u64, String>>>,
}

impl Watcher {
    pub fn start(watched: &[Watched], history: &History, promise: Promise) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let threads = watched.iter().enumerate().map(|(number, proxy)| {
            let (proxy, history, ends) = (proxy.clone(), history.clone(), Arc::clone(&ends));
            thread::spawn(move || {
                let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
                let pause = match proxy {
                    Watched::Inside(_) => Duration::from_millis(2),
                    // Two scrapes for each observation: at this pace they cost a tenth of a CPU.
                    Watched::Outside(_) => Duration::from_millis(20),
                };
                let mut fresh = 0;
                while !ends.load(Relaxed) {
                    if let Some(observation) = runtime.block_on(proxy.observe()) {
                        let judged = history.judge(&observation, &promise);
                        fresh += u64::from(judged.map_err(|broken| format!("proxy {number}: {broken}"))?);
                    }
                    thread::sleep(pause);
                }
                Ok(fresh)
            })
        });
        Self { threads: threads.collect(), ends }
    }

    /// True if a promise was broken.
    pub fn has_seen_enough(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends the watch. Returns how often each proxy was seen with a fresh snapshot.
    ///
    /// # Errors
    /// The promises that were broken.
    pub fn end(self) -> Result<Vec<u64>, String> {
        self.ends.store(true, Relaxed);
        let all = self.threads.into_iter().map(|thread| thread.join().expect("it does not panic"));
        all.collect()
    }
}

/// A proxy as a program, which is ended and started again with the state that it kept in its `state_dir`.
pub struct RestartingProxy {
    program: Option<Program>,
    redis: String,
    folder: TempDir,
    address: Arc<Mutex<Option<SocketAddr>>>,
}

impl RestartingProxy {
    /// Starts the program; `redis` is that section of its config.
    pub async fn start(redis: String) -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut restarted = Self { program: None, redis, folder, address: Arc::default() };
        restarted.launch().await;
        restarted
    }

    pub fn watched(&self) -> Watched {
        Watched::Outside(Arc::clone(&self.address))
    }

    fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    async fn launch(&mut self) {
        let state = self.state_dir();
        std::fs::create_dir_all(&state).expect("a folder");
        let program = Program::run_by(
            Command::new(Program::path()),
            &format!(
                "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
                 pools: {{web: {{weights_key: servers}}}}\n\
                 admin: {{bind: \"127.0.0.1:0\"}}\nshutdown: {{timeout: 1s}}\nstate_dir: {}\nredis: {{{}}}\n",
                state.display(),
                self.redis
            ),
        );
        self.set_address(Some(program.addresses().await.1));
        self.program = Some(program);
    }

    fn set_address(&self, address: Option<SocketAddr>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Ends the program by a signal, and starts it again.
    pub async fn restart(&mut self, signal: Signal) {
        self.set_address(None);
        if let Some(mut program) = self.program.take() {
            program.signal(signal);
            program.wait();
        }
        self.launch().await;
    }
}
