//! The thread of the health checks.
//!
//! Thousands of checks a second are some tens of µs of work each. A session that has to wait for a core
//! while many of them are done in a row is slow. So the thread gives way to other threads after each
//! check (`active.rs`), and no other task runs on it: on a machine without a free core that task would
//! have to wait as often.

use std::io;
use std::panic::resume_unwind;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::control::runtime;

/// The running thread. Dropped, it has ended.
#[derive(Debug)]
pub struct CheckThread {
    /// The thread ends when this is dropped.
    runs: Option<oneshot::Sender<()>>,
    runner: CheckRunner,
    thread: Option<JoinHandle<()>>,
}

/// Runs checks on the thread.
#[derive(Clone, Debug)]
pub struct CheckRunner(Handle);

/// Starts the thread, without checks.
///
/// # Errors
/// The system gives no thread or no descriptors.
pub fn start() -> io::Result<CheckThread> {
    let (runs, dropped) = oneshot::channel::<()>();
    let (tell, has_started) = sync_channel(1);
    let thread = Builder::new().name("statera-checks".to_owned()).spawn(move || {
        let runtime = match runtime::new() {
            Ok(runtime) => runtime,
            Err(error) => return tell.send(Err(error)).unwrap_or_default(),
        };
        // The caller waits for it.
        let _ = tell.send(Ok(runtime.handle().clone()));
        // An error, too, says that it was dropped.
        let _ = runtime.block_on(dropped);
    })?;
    let handle = has_started
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the thread of the health checks died")))?;
    Ok(CheckThread { runs: Some(runs), runner: CheckRunner(handle), thread: Some(thread) })
}

impl CheckThread {
    /// Runs checks on it.
    #[must_use]
    pub fn runner(&self) -> CheckRunner {
        self.runner.clone()
    }
}

impl CheckRunner {
    /// Runs `checks` on the thread, and returns when they or the thread have ended.
    ///
    /// # Panics
    /// As the checks do.
    ///
    /// # Cancel safety
    /// Dropping the future ends the checks.
    pub async fn run(self, checks: impl Future<Output = ()> + Send + 'static) {
        let running = self.0.spawn(checks);
        let _ends = AbortOnDrop(running.abort_handle());
        if let Err(error) = running.await
            && let Ok(panic) = error.try_into_panic()
        {
            resume_unwind(panic);
        }
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for CheckThread {
    fn drop(&mut self) {
        drop(self.runs.take());
        if let Some(thread) = self.thread.take() {
            // Takes as long as one look at one check. If the thread died, the tasks that ran checks on it
            // have heard of that.
            let _ = thread.join();
        }
    }
}
