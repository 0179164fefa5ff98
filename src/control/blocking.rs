//! Runs work that may block (files, the system's resolver, encoding of long texts) on a thread of its own.
//!
//! tokio's `spawn_blocking`, and what is built on it (`lookup_host`, connecting by name, `fs`), panics where
//! the system gives no thread (TasksMax, RLIMIT_NPROC, memory). Such a shortage passes, so [`start`] asks
//! again until it gets a thread. All blocking work of the control plane goes through this module.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread::Builder;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::backoff::Backoff;
use super::log_limiter::LogLimiter;

/// The pauses between two requests for a thread while the system gives none.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Log lines about shortages in each window of a [`LogLimiter`].
const MOST_LINES: u32 = 2;

/// Work that runs on a thread. Ready with the work's result. When this is dropped, the work goes on and its
/// result is lost.
#[derive(Debug)]
pub struct Job<T>(oneshot::Receiver<T>);

/// The error of work that panicked. The panic's message is on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the thread panicked, which is a defect")]
pub struct Panicked;

impl<T> Future for Job<T> {
    type Output = Result<T, Panicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Only a panic drops the sender before it has sent a value.
        Pin::new(&mut self.0).poll(cx).map(|result| result.map_err(|_| Panicked))
    }
}

/// Starts `work` on a thread of its own. Waits without limit for one of `permits` and for a thread: callers
/// that have a limit put a timeout around the call. The thread keeps its permit until the work has ended.
///
/// # Cancel safety
/// If the future is dropped, `work` never begins.
pub async fn start<T, F>(permits: &'static Semaphore, work: F) -> Job<T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (work, job) = prepare(permits, work).await;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while work.spawn().is_err() {
        sleep(backoff.pause()).await;
    }
    job
}

/// Does `work`, which only computes, on a thread once one of `permits` is free. Where the system gives no
/// thread, the work runs on the caller's.
///
/// # Errors
/// The work panicked on its thread. If it runs on the caller's thread, its panic reaches the caller.
///
/// # Cancel safety
/// If the future is dropped, the result is lost.
pub async fn compute<T, F>(permits: &'static Semaphore, work: F) -> Result<T, Panicked>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (work, job) = prepare(permits, work).await;
    if work.spawn().is_err() {
        work.run();
    }
    job.await
}

/// Work that holds its permit and sends its result. `Builder::spawn` drops its closure when it gets no
/// thread, so the work stays here until it begins.
struct Work<F>(Arc<Mutex<Option<F>>>);

async fn prepare<T, F>(permits: &'static Semaphore, work: F) -> (Work<impl FnOnce() + Send + 'static>, Job<T>)
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let permit = permits.acquire().await.expect("these semaphores are never closed");
    let (answer, answered) = oneshot::channel();
    let work = move || {
        let result = work();
        drop(permit);
        // The caller may have given up.
        let _ = answer.send(result);
    };
    (Work(Arc::new(Mutex::new(Some(work)))), Job(answered))
}

impl<F: FnOnce() + Send + 'static> Work<F> {
    fn run(self) {
        let work = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            work();
        }
    }

    /// Begins the work on a thread, if the system gives one.
    fn spawn(&self) -> io::Result<()> {
        let work = Self(Arc::clone(&self.0));
        let spawned = spawn(move || work.run());
        match &spawned {
            Ok(()) => shortage(Shortage::end),
            Err(error) => shortage(|shortage| shortage.report(error)),
        }
        spawned
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    #[cfg(test)]
    refusals::next()?;
    // The thread is not joined: it sends its result when it ends.
    Builder::new().name("statera-blocking".to_owned()).spawn(run).map(drop)
}

/// A time in which the system gives no threads. All callers in the process share one value.
struct Shortage {
    /// `None` while the system gives threads.
    since: Option<Instant>,
    /// The log has a line about the beginning, so it gets one about the end.
    is_logged: bool,
    lines: LogLimiter,
}

fn shortage(change: impl FnOnce(&mut Shortage)) {
    static SHORTAGE: LazyLock<Mutex<Shortage>> = LazyLock::new(|| {
        Mutex::new(Shortage { since: None, is_logged: false, lines: LogLimiter::new(MOST_LINES) })
    });
    change(&mut SHORTAGE.lock().unwrap_or_else(PoisonError::into_inner));
}

impl Shortage {
    fn report(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.since.is_none() {
            self.since = Some(now);
            if let Some(held_back) = self.lines.permit(now) {
                self.is_logged = true;
                warn!(
                    %error, held_back,
                    "the system gives no thread for lookups, saved tables and metrics: retrying; \
                     raise TasksMax (systemd), pids.max (containers) or `ulimit -u`"
                );
            }
        }
    }

    fn end(&mut self) {
        if let Some(since) = self.since.take()
            && std::mem::take(&mut self.is_logged)
        {
            info!(shortage = ?since.elapsed(), "the system gives threads again");
        }
    }
}

/// Lets unit tests refuse threads to [`start`](super::start) and [`compute`](super::compute) when they are
/// called on the test's own thread.
#[cfg(test)]
pub mod refusals {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static LEFT: Cell<u32> = const { Cell::new(0) };
    }

    /// Refuses the next `count` requests of this thread.
    pub fn refuse(count: u32) {
        LEFT.set(count);
    }

    /// How many requests will still be refused.
    #[must_use]
    pub fn left() -> u32 {
        LEFT.get()
    }

    pub(super) fn next() -> io::Result<()> {
        match LEFT.get() {
            0 => Ok(()),
            left => {
                LEFT.set(left - 1);
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_refused_thread_is_asked_for_again_until_there_is_one() {
        static PERMITS: Semaphore = Semaphore::const_new(1);
        refusals::refuse(20);
        let begun = Instant::now();
        assert_eq!(start(&PERMITS, || 7).await.await, Ok(7));
        assert_eq!(refusals::left(), 0);
        assert!(begun.elapsed() <= 20 * LONGEST_PAUSE, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn computing_work_runs_on_the_callers_thread_if_the_system_gives_none() {
        static PERMITS: Semaphore = Semaphore::const_new(1);
        let thread = || std::thread::current().id();
        let here = thread();
        assert!(compute(&PERMITS, thread).await.is_ok_and(|other| other != here));
        refusals::refuse(1);
        assert_eq!(compute(&PERMITS, thread).await, Ok(here));
        assert_eq!((refusals::left(), PERMITS.available_permits()), (0, 1));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_for_the_caller_and_gives_the_permit_back() {
        static PERMITS: Semaphore = Semaphore::const_new(1);
        let job: Job<()> = start(&PERMITS, || panic!("a defect that this test makes")).await;
        assert_eq!(job.await, Err(Panicked));
        assert_eq!(start(&PERMITS, || 7).await.await, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_cancelled_before_it_has_a_thread_never_begins() {
        static PERMITS: Semaphore = Semaphore::const_new(1);
        refusals::refuse(u32::MAX);
        let (begins, begun) = std::sync::mpsc::channel::<()>();
        let started = start(&PERMITS, move || drop(begins));
        assert!(tokio::time::timeout(Duration::from_secs(60), started).await.is_err());
        assert!(refusals::left() < u32::MAX - 10, "it was asked for again and again");
        assert!(begun.recv().is_err(), "the work was dropped");
        assert_eq!(PERMITS.available_permits(), 1);
    }

    #[tokio::test]
    async fn no_more_threads_run_than_there_are_permits() {
        static PERMITS: Semaphore = Semaphore::const_new(2);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let held = || {
            let wait = Arc::clone(&wait);
            start(&PERMITS, move || wait.lock().is_ok_and(|wait| wait.recv().is_ok()))
        };
        let (first, second) = (held().await, held().await);
        let mut third = Box::pin(held());
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut third).await.is_err());
        for _ in 0..3 {
            go.send(()).expect("it waits");
        }
        assert!(first.await == Ok(true) && second.await == Ok(true));
        assert_eq!(third.await.await, Ok(true));
    }
}
