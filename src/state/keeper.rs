//! Reads the saved tables at the start, and saves new ones, one task a pool.
//!
//! Runs on the control plane, and leaves everything that touches the disk to a thread that may wait for it: a disk that
//! hangs holds back neither a start nor Redis. Writes take turns, and a pool rests after each; of the tables that come
//! meanwhile the newest counts. A write that failed is tried again for as long as the process lives, and what is newest when
//! it ends is written before.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use tracing::{error, info, warn};

use super::file::{self, WriteError};
use super::format::{self, Saved};
use super::health::Health;
use super::{Kept, Unusable};
use crate::balance::snapshot::Snapshot;
use crate::config::OnEmpty;
use crate::control::backoff::Backoff;
use crate::control::blocking::{self, Panicked};

/// How long a start waits for the saved tables: a disk that is slower has failed.
const READ_TIME: Duration = Duration::from_secs(1);
/// A write that takes longer is told of, and waited for.
const WRITE_TIME: Duration = Duration::from_secs(10);
/// Between two writes of one pool's file.
const REST: Duration = Duration::from_millis(100);
/// After a failed write.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Without a failure for this long, the next one is a first one. A disk that is full every other moment is not.
const CALM: Duration = Duration::from_secs(60);

/// Threads that touch the disk, of the whole process. One that hangs keeps its place, so there are some to spare.
static THREADS: Semaphore = Semaphore::const_new(8);

/// How long the end waits for the newest tables to be written.
const LAST_WRITES: Duration = Duration::from_secs(1);

/// Saves the tables of pools in one folder. Dropped, its keepers stop, and what is newest may not be saved.
#[derive(Debug)]
pub struct StateDir {
    shared: Arc<Shared>,
    /// True when the process ends. Each keeper has a receiver until it has ended.
    ends: watch::Sender<bool>,
}

/// Saves the tables of one pool.
#[derive(Debug)]
pub struct Keeper {
    kept: Kept,
    published: watch::Receiver<SystemTime>,
    ends: watch::Receiver<bool>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    /// One disk, one write at a time.
    turn: Semaphore,
    health: Mutex<Health>,
}

impl StateDir {
    /// Reads and writes nothing yet.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        let shared = Shared { folder: folder.to_owned(), turn: Semaphore::new(1), health: Mutex::default() };
        Self { shared: Arc::new(shared), ends: watch::Sender::default() }
    }

    /// Gives the pools what was saved of them, and prepares the folder for what is to be saved. Whatever is
    /// wrong with the folder or with a file is said in the log; at most two seconds go by.
    ///
    /// To be called before Redis is followed, whose tables are newer.
    pub async fn restore(&self, on_empty: OnEmpty, kept: &[Kept]) {
        self.shared.restore(on_empty, kept).await;
        self.shared.prepare().await;
    }

    /// The keeper of one pool. It saves what is published from now on: what was restored is saved already.
    #[must_use]
    pub fn keeper(&self, kept: Kept) -> Keeper {
        let (published, ends) = (kept.cell.published(), self.ends.subscribe());
        Keeper { kept, published, ends, shared: Arc::clone(&self.shared) }
    }

    /// Lets the keepers write what is not written yet, for a second at most. To be called when nothing is
    /// published any more.
    pub async fn finish(&self) {
        self.ends.send_replace(true);
        if timeout(LAST_WRITES, self.ends.closed()).await.is_err() {
            warn!("the disk of state_dir is too slow: ending without the newest tables in it");
        }
    }
}

impl Shared {
    async fn restore(&self, on_empty: OnEmpty, kept: &[Kept]) {
        let (folder, wanted) = (self.folder.clone(), kept.to_vec());
        let read = move || -> Vec<_> { wanted.iter().map(|kept| read(&folder, kept)).collect() };
        let state_dir = self.folder.display();
        let results = match within(READ_TIME, read).await {
            Ok(results) => results,
            Err(NoResult::Panicked(panicked)) => {
                return error!(error = %panicked, "reading the saved tables failed: starting without them");
            }
            Err(NoResult::Silent) => {
                return warn!(%state_dir, "state_dir does not answer: starting without the saved tables");
            }
            Err(NoResult::NoThread) => {
                return warn!(%state_dir, "no thread to read state_dir: starting without the saved tables");
            }
        };
        for (kept, result) in kept.iter().zip(results) {
            let file = self.folder.join(file::name_of(&kept.pool));
            let (pool, file) = (&*kept.pool, file.display());
            match result {
                Ok(None) => {}
                Ok(Some(saved)) if saved.table.is_empty() && on_empty == OnEmpty::KeepLast => {
                    // Left there by an `on_empty: refuse` that no longer holds.
                    info!(pool, %file, "the saved table has no members: starting with the configured backends");
                }
                Ok(Some(Saved { table, time })) => {
                    let (backends, saved) = (table.members().len(), humantime::format_rfc3339_seconds(time));
                    kept.cell.restore(table);
                    info!(pool, %file, backends, %saved, "starting with the saved table, until redis answers");
                }
                Err(reason) => warn!(pool, %file, %reason, "the saved table is ignored"),
            }
        }
    }

    async fn prepare(&self) {
        let folder = self.folder.clone();
        match within(READ_TIME, move || file::prepare(&folder)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.fails(None, &error.to_string(), error.cure()),
            Err(reason) => self.fails(None, &reason.to_string(), reason.cure()),
        }
    }

    fn fails(&self, pool: Option<&Arc<str>>, reason: &str, cure: &str) {
        if self.health.lock().unwrap_or_else(PoisonError::into_inner).fails(pool, reason) {
            let state_dir = self.folder.display();
            warn!(%state_dir, reason, cure, "cannot save tables: it is tried again until it works");
        }
    }

    fn works(&self, pool: &Arc<str>) {
        if self.health.lock().unwrap_or_else(PoisonError::into_inner).works(pool) {
            let state_dir = self.folder.display();
            info!(%state_dir, "tables are saved again");
        }
    }
}

/// Why work that touches the disk gave no result.
#[derive(Debug, thiserror::Error)]
enum NoResult {
    #[error("the system gives no thread")]
    NoThread,
    #[error("the folder does not answer")]
    Silent,
    #[error(transparent)]
    Panicked(Panicked),
}

impl NoResult {
    fn cure(&self) -> &'static str {
        match self {
            Self::NoThread => "raise TasksMax (systemd), pids.max (containers) or `ulimit -u`",
            Self::Silent => "look after its disk",
            Self::Panicked(_) => "report this: it is a bug",
        }
    }
}

/// Runs `work` on a thread. Gives it `limit` to get one, and as long to end.
async fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoResult> {
    let job = timeout(limit, blocking::start(&THREADS, work)).await.map_err(|_| NoResult::NoThread)?;
    timeout(limit, job).await.map_err(|_| NoResult::Silent)?.map_err(NoResult::Panicked)
}

fn read(folder: &Path, kept: &Kept) -> Result<Option<Saved>, Unusable> {
    let bytes = file::read(&folder.join(file::name_of(&kept.pool)))?;
    bytes.map(|bytes| format::decode(&bytes, &kept.pool, &kept.key)).transpose()
}

fn write(folder: &Path, kept: &Kept, time: SystemTime, snapshot: &Snapshot) -> Result<(), WriteError> {
    let text = format::encode(&kept.pool, &kept.key, time, snapshot.members());
    file::write(folder, &file::name_of(&kept.pool), text.as_bytes())
}

impl Keeper {
    /// Saves each new table from Redis, or the newest of those that came during the last write, until the process ends.
    ///
    /// # Cancel safety
    /// Dropping the future lets a write that is under way go on; whether or not it ends, the file is whole.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut failed: Option<Instant> = None;
        let mut ends = self.ends.clone();
        loop {
            tokio::select! {
                // First what is to be written, also at the end.
                biased;
                // The cell is held here, so it is not gone.
                published = self.published.changed() => if published.is_err() { return },
                _ = ends.wait_for(|ends| *ends) => return,
            }
            while !self.save().await {
                if *self.ends.borrow() {
                    return;
                }
                if failed.replace(Instant::now()).is_some_and(|failed| failed.elapsed() > CALM) {
                    backoff.reset();
                }
                self.rest(backoff.pause()).await;
            }
            self.rest(REST).await;
        }
    }

    /// Not longer than the process lives.
    async fn rest(&mut self, pause: Duration) {
        // An error means that it has ended.
        let _ = timeout(pause, self.ends.wait_for(|ends| *ends)).await;
    }

    /// Returns true if the newest table was saved.
    async fn save(&mut self) -> bool {
        // Never closed; held until the write has ended, however long that takes.
        let _turn = self.shared.turn.acquire().await;
        let time = *self.published.borrow_and_update();
        let snapshot = Arc::clone(&self.kept.cell.load());
        let (shared, kept) = (Arc::clone(&self.shared), self.kept.clone());
        // Where the system gives no thread, the table is saved once it does.
        let mut write =
            blocking::start(&THREADS, move || write(&shared.folder, &kept, time, &snapshot)).await;
        let ended = match timeout(WRITE_TIME, &mut write).await {
            Ok(ended) => ended,
            Err(_) => {
                self.fails("the disk takes longer than 10 s for a write", "look after it");
                write.await
            }
        };
        match &ended {
            Ok(Ok(())) => self.shared.works(&self.kept.pool),
            Ok(Err(error)) => self.fails(&error.to_string(), error.cure()),
            Err(panicked) => self.fails(&panicked.to_string(), "it is a defect"),
        }
        matches!(ended, Ok(Ok(())))
    }

    fn fails(&self, reason: &str, cure: &str) {
        self.kept.status.failed_writes.add(1);
        self.shared.fails(Some(&self.kept.pool), reason, cure);
    }
}
