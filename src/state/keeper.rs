//! Restores the saved tables at the start and saves new ones, with one task for each pool.
//!
//! The tasks run on the control plane. All work on the disk runs on threads that may wait, so a disk that
//! hangs delays Redis not at all and the start by a limited time. One write runs at a time, and each pool
//! pauses after a write; of the tables that come meanwhile, only the newest is saved. A failed write is
//! retried until it works. At the end of the process each keeper tries once to write a table that is not
//! saved yet.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use tracing::{error, info, warn};

use super::failures::WriteFailures;
use super::file::{self, WriteError};
use super::format::{self, Saved};
use super::{SavedPool, Unusable};
use crate::balance::snapshot::Snapshot;
use crate::config::OnEmpty;
use crate::control::backoff::Backoff;
use crate::control::blocking::{self, Panicked};

/// How long the start waits for a thread, and then for its work on the disk.
const READ_TIME: Duration = Duration::from_secs(1);
/// A write that takes longer is logged and counted as failed, but still awaited.
const WRITE_TIME: Duration = Duration::from_secs(10);
/// The pause between two writes of one pool's file.
const REST: Duration = Duration::from_millis(100);
/// The pauses after failed writes.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// After this long without a failure, the pauses begin with the first one again. A disk that is full every
/// other moment fails more often, so its pauses stay long.
const CALM: Duration = Duration::from_secs(60);

/// Permits for threads that touch the disk, for the whole process. A thread that hangs keeps its permit,
/// so there are more than one write needs.
static THREADS: Semaphore = Semaphore::const_new(8);

/// How long the end of the process waits for the newest tables to be written.
const LAST_WRITES: Duration = Duration::from_secs(1);

/// Saves the tables of pools in one folder. When this is dropped, its keepers stop, and the newest tables
/// may not be saved.
#[derive(Debug)]
pub struct StateDir {
    shared: Arc<Shared>,
    /// True when the process ends. Each keeper keeps a receiver until the keeper has ended.
    ends: watch::Sender<bool>,
}

/// Saves the tables of one pool.
#[derive(Debug)]
pub struct Keeper {
    kept: SavedPool,
    published: watch::Receiver<SystemTime>,
    ends: watch::Receiver<bool>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    /// One permit: the folder is on one disk, which gets one write at a time.
    write_permit: Semaphore,
    failures: Mutex<WriteFailures>,
}

impl StateDir {
    /// Makes the object for the files in `folder`. Reads and writes nothing yet.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        let (write_permit, failures) = (Semaphore::new(1), Mutex::default());
        let shared = Shared { folder: folder.to_owned(), write_permit, failures };
        Self { shared: Arc::new(shared), ends: watch::Sender::default() }
    }

    /// Restores the saved tables of the pools and prepares the folder for writes. Problems with the folder
    /// or a file are logged. A disk that hangs delays this by two seconds, four if threads are short too.
    ///
    /// Call this before Redis is followed, because the tables from Redis are newer.
    pub async fn restore(&self, on_empty: OnEmpty, kept: &[SavedPool]) {
        self.shared.restore(on_empty, kept).await;
        self.shared.prepare().await;
    }

    /// Returns the keeper of one pool. It saves the tables published from now on; a restored table is
    /// saved already.
    #[must_use]
    pub fn keeper(&self, kept: SavedPool) -> Keeper {
        let (published, ends) = (kept.cell.published(), self.ends.subscribe());
        Keeper { kept, published, ends, shared: Arc::clone(&self.shared) }
    }

    /// Waits at most a second until the keepers have written the newest tables. Call this when nothing is
    /// published any more.
    pub async fn finish(&self) {
        self.ends.send_replace(true);
        if timeout(LAST_WRITES, self.ends.closed()).await.is_err() {
            warn!("the disk of state_dir is too slow: ending without the newest tables in it");
        }
    }
}

impl Shared {
    async fn restore(&self, on_empty: OnEmpty, kept: &[SavedPool]) {
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
                    // The table was saved under `on_empty: refuse`, and the config has changed since.
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
        if self.failures.lock().unwrap_or_else(PoisonError::into_inner).record_failure(pool, reason) {
            let state_dir = self.folder.display();
            warn!(%state_dir, reason, cure, "cannot save tables: retrying until it works");
        }
    }

    fn works(&self, pool: &Arc<str>) {
        if self.failures.lock().unwrap_or_else(PoisonError::into_inner).record_success(pool) {
            let state_dir = self.folder.display();
            info!(%state_dir, "tables are saved again");
        }
    }
}

/// Why work on the disk gave no result.
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
            Self::Silent => "check its disk",
            Self::Panicked(_) => "report this: it is a bug",
        }
    }
}

/// Runs `work` on a thread. Waits at most `limit` for the thread, and at most `limit` again for the work.
async fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoResult> {
    let job = timeout(limit, blocking::start(&THREADS, work)).await.map_err(|_| NoResult::NoThread)?;
    timeout(limit, job).await.map_err(|_| NoResult::Silent)?.map_err(NoResult::Panicked)
}

fn read(folder: &Path, kept: &SavedPool) -> Result<Option<Saved>, Unusable> {
    let bytes = file::read(&folder.join(file::name_of(&kept.pool)))?;
    bytes.map(|bytes| format::decode(&bytes, &kept.pool, &kept.key)).transpose()
}

fn write(folder: &Path, kept: &SavedPool, time: SystemTime, snapshot: &Snapshot) -> Result<(), WriteError> {
    let text = format::encode(&kept.pool, &kept.key, time, snapshot.members());
    file::write(folder, &file::name_of(&kept.pool), text.as_bytes())
}

impl Keeper {
    /// Makes [`Keeper::run`] begin with the present table, which may not be saved yet.
    #[must_use]
    pub fn behind(mut self) -> Self {
        self.published.mark_changed();
        self
    }

    /// Saves each new table, or the newest of those that came during the last write, until the process
    /// ends.
    ///
    /// # Cancel safety
    /// If the future is dropped, a write that is under way goes on. The file is complete at any moment.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut failed: Option<Instant> = None;
        let mut ends = self.ends.clone();
        loop {
            tokio::select! {
                // A new table comes first, so that it is saved at the end too.
                biased;
                // Never an error: `self.kept` keeps the cell alive.
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

    /// Sleeps for `pause`, or until the process ends.
    async fn rest(&mut self, pause: Duration) {
        // An error means that the `StateDir` was dropped, which ends the pause too.
        let _ = timeout(pause, self.ends.wait_for(|ends| *ends)).await;
    }

    /// Saves the newest table, and waits until the write has ended. Returns true if it worked.
    async fn save(&mut self) -> bool {
        // The permit is held until the write has ended, however long that takes. The semaphore is never
        // closed.
        let _permit = self.shared.write_permit.acquire().await;
        let time = *self.published.borrow_and_update();
        let snapshot = Arc::clone(&self.kept.cell.load());
        let (shared, kept) = (Arc::clone(&self.shared), self.kept.clone());
        // Waits for a thread without a limit.
        let mut write =
            blocking::start(&THREADS, move || write(&shared.folder, &kept, time, &snapshot)).await;
        let ended = match timeout(WRITE_TIME, &mut write).await {
            Ok(ended) => ended,
            Err(_) => {
                self.fails("the disk takes longer than 10 s for a write", "check it");
                write.await
            }
        };
        match &ended {
            Ok(Ok(())) => self.shared.works(&self.kept.pool),
            Ok(Err(error)) => self.fails(&error.to_string(), error.cure()),
            Err(panicked) => self.fails(&panicked.to_string(), "report this: it is a bug"),
        }
        matches!(ended, Ok(Ok(())))
    }

    fn fails(&self, reason: &str, cure: &str) {
        self.kept.status.failed_writes.add(1);
        self.shared.fails(Some(&self.kept.pool), reason, cure);
    }
}
