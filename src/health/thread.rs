//! The thread of the health checks.
//!
//! Thousands of checks a second are some tens of µs of work each. A session that has to wait for a core
//! while many of them are done in a row is slow. So the thread gives way to other threads after each
//! check (`active.rs`), and no other task runs on it: on a machine without a free core that task would
//! have to wait as often.

use std::io;
use std::panic::resume_unwind;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::control::runtime;
use crate::control::watchdog::Pulse;
use crate::fault;

/// The owner of the thread. The thread starts with the first checks, and again with the next ones if it has
/// died. Dropping the owner ends the thread for good.
#[derive(Debug)]
pub struct CheckThread(CheckRunner);

/// Runs checks on the thread.
#[derive(Clone, Debug)]
pub struct CheckRunner(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    pulse: Arc<Pulse>,
}

#[derive(Debug)]
enum State {
    NotStarted,
    Started(Started),
    /// The [`CheckThread`] was dropped.
    Over,
}

/// The running thread. Dropping this ends the thread and waits for it.
#[derive(Debug)]
struct Started {
    handle: Handle,
    /// The thread ends when this is dropped.
    runs: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl CheckThread {
    /// Starts no thread yet. `pulse` beats on the thread while it runs.
    #[must_use]
    pub fn new(pulse: Arc<Pulse>) -> Self {
        Self(CheckRunner(Arc::new(Shared { state: Mutex::new(State::NotStarted), pulse })))
    }

    /// Returns what runs checks on the thread.
    #[must_use]
    pub fn runner(&self) -> &CheckRunner {
        &self.0
    }
}

impl CheckRunner {
    /// Runs `checks` on the thread, and returns when they or the thread have ended.
    ///
    /// # Errors
    /// The system gives no thread or no descriptors, the thread has died, or [`CheckThread`] was dropped.
    ///
    /// # Panics
    /// As the checks do.
    ///
    /// # Cancel safety
    /// Dropping the future ends the checks.
    pub async fn run(self, checks: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        let running = self.0.handle()?.spawn(checks);
        let _ends = AbortOnDrop(running.abort_handle());
        match running.await.map_err(tokio::task::JoinError::try_into_panic) {
            Ok(()) => Ok(()),
            Err(Ok(panic)) => resume_unwind(panic),
            Err(Err(_)) => Err(io::Error::other("the thread of the health checks has ended")),
        }
    }
}

impl Shared {
    /// Returns the runtime of the thread, which is started if it does not run.
    fn handle(&self) -> io::Result<Handle> {
        let mut state = self.state();
        match &*state {
            State::Started(started) if started.is_alive() => return Ok(started.handle.clone()),
            State::Over => return Err(io::Error::other("the proxy ends")),
            State::Started(_) | State::NotStarted => {}
        }
        let started = Started::start(Arc::clone(&self.pulse))?;
        let handle = started.handle.clone();
        *state = State::Started(started);
        Ok(handle)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Started {
    fn start(pulse: Arc<Pulse>) -> io::Result<Self> {
        fault::fallible("check_thread", "")?;
        let (runs, dropped) = oneshot::channel::<()>();
        let (tell, has_started) = sync_channel(1);
        let thread = Builder::new().name("statera-checks".to_owned()).spawn(move || {
            let runtime = match runtime::new() {
                Ok(runtime) => runtime,
                Err(error) => return tell.send(Err(error)).unwrap_or_default(),
            };
            // Cannot fail: the caller waits for the handle.
            let _ = tell.send(Ok(runtime.handle().clone()));
            runtime.block_on(async {
                tokio::select! {
                    // Ready with an error when `runs` is dropped.
                    _ = dropped => {}
                    () = pulse.beat() => {}
                }
            });
        })?;
        let handle = has_started
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread of the health checks died")))?;
        Ok(Self { handle, runs: Some(runs), thread: Some(thread) })
    }

    fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        drop(self.runs.take());
        if let Some(thread) = self.thread.take() {
            // Waits at most for one poll of one check. The checks end with the thread, and
            // `CheckRunner::run` returns an error.
            let _ = thread.join();
        }
    }
}

impl Drop for CheckThread {
    fn drop(&mut self) {
        let before = std::mem::replace(&mut *self.0.0.state(), State::Over);
        // Waits for the thread. The lock is free by now, so other callers do not wait.
        drop(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::control::watchdog::Watchdog;

    #[tokio::test]
    async fn a_thread_that_died_is_started_again_until_its_owner_is_gone() {
        let thread = CheckThread::new(Watchdog::default().pulse("a test"));
        let name = || {
            let (tell, told) = oneshot::channel();
            let name = async move {
                let _ = tell.send(std::thread::current().name().map(str::to_owned));
            };
            let running = thread.runner().clone().run(name);
            async { (running.await.is_ok(), told.await.ok().flatten()) }
        };
        let alive = (true, Some("statera-checks".to_owned()));
        assert_eq!(name().await, alive);
        // As if it had died: its runtime ends.
        if let State::Started(started) = &mut *thread.0.0.state() {
            started.runs.take();
        }
        while matches!(&*thread.0.0.state(), State::Started(started) if started.is_alive()) {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(name().await, alive);
        let runner = thread.runner().clone();
        drop(thread);
        assert!(runner.run(async {}).await.is_err(), "it does not start again");
    }
}
