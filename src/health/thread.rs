//! The thread of the health checks.
//!
//! Thousands of checks a second are some tens of µs of work each, and whoever has to wait for a core while many are done in a row
//! is a session. So the thread gives way after each (`active.rs`), which is why it is no other task's: on a machine without a free
//! core it would have to wait as often.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::error;

use super::active::Checks;
use crate::control::runtime;

/// The running thread. Dropped, it has ended.
#[derive(Debug)]
pub struct CheckThread {
    /// The thread ends when this is dropped.
    runs: Option<oneshot::Sender<()>>,
    /// Nothing is ever sent: the thread's end of the channel goes with it.
    died: oneshot::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread, which runs `checks`.
///
/// # Errors
/// The system gives no thread or no descriptors.
pub fn start(checks: Vec<Checks>) -> io::Result<CheckThread> {
    let (runs, dropped) = oneshot::channel::<()>();
    let (alive, died) = oneshot::channel::<()>();
    let (tell, has_started) = sync_channel(1);
    let thread = Builder::new().name("statera-checks".to_owned()).spawn(move || {
        let _alive = alive;
        let runtime = match runtime::new() {
            Ok(runtime) => runtime,
            Err(error) => return tell.send(Err(error)).unwrap_or_default(),
        };
        // The caller waits for it.
        let _ = tell.send(Ok(()));
        runtime.block_on(async {
            let mut running: JoinSet<()> = checks.into_iter().map(Checks::run).collect();
            tokio::select! {
                _ = dropped => {}
                Some(ended) = running.join_next() => error!(?ended, "health checks ended"),
            }
        });
    })?;
    let started = CheckThread { runs: Some(runs), died, thread: Some(thread) };
    has_started.recv().unwrap_or_else(|_| Err(io::Error::other("the thread of the health checks died")))?;
    Ok(started)
}

impl CheckThread {
    /// Waits until the thread ends by itself, which is a defect.
    ///
    /// # Cancel safety
    /// Dropping the future ends the thread.
    pub async fn ended(mut self) {
        let _ = (&mut self.died).await;
    }
}

impl Drop for CheckThread {
    fn drop(&mut self) {
        drop(self.runs.take());
        if let Some(thread) = self.thread.take() {
            // Takes as long as one look at one check. That it died was seen by `ended`.
            let _ = thread.join();
        }
    }
}
