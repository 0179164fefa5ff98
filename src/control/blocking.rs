//! Runs work that may block (files, the system's resolver, long texts) on a thread of its own.
//!
//! tokio's `spawn_blocking`, and all of tokio that is built on it (`lookup_host`, connecting by name, `fs`), panics where the
//! system gives no thread (TasksMax, RLIMIT_NPROC, memory). Such a shortage passes by itself, so [`start`] asks again until
//! there is a thread. Use this module wherever the control plane must not block.

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

/// Between two requests for a thread while the system gives none.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Log lines about shortages in each window of [`LogLimiter`].
const MOST_LINES: u32 = 2;

/// Work on a thread. Ready with its result. Dropped, the work goes on and its result is lost.
#[derive(Debug)]
pub struct Job<T>(oneshot::Receiver<T>);

/// The work panicked. The panic's message is on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it panicked, which is a defect")]
pub struct Panicked;

impl<T> Future for Job<T> {
    type Output = Result<T, Panicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // The sender is dropped without a value only by a panic.
        Pin::new(&mut self.0).poll(cx).map(|result| result.map_err(|_| Panicked))
    }
}

/// Starts `work` on a thread of its own, once one of `places` is free and the system gives a thread. Both are waited for
/// without limit: callers that have one put a timeout around it. The thread keeps its place until the work has ended.
///
/// # Cancel safety
/// Dropping the future gives up; `work` has not begun.
pub async fn start<T, F>(places: &'static Semaphore, work: F) -> Job<T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (work, job) = prepare(places, work).await;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while work.spawn().is_err() {
        sleep(backoff.pause()).await;
    }
    job
}

/// Does `work`, which computes and waits for nothing, on a thread once one of `places` is free; or here, where the system gives
/// no thread.
///
/// # Errors
/// The work panicked on its thread. A panic here goes on to the caller.
///
/// # Cancel safety
/// Dropping the future loses the result.
pub async fn compute<T, F>(places: &'static Semaphore, work: F) -> Result<T, Panicked>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (work, job) = prepare(places, work).await;
    if work.spawn().is_err() {
        work.run();
    }
    job.await
}

/// Work that keeps its place and sends its result. A refused thread drops what it was asked to run, so the work stays here until
/// it begins.
struct Work<F>(Arc<Mutex<Option<F>>>);

async fn prepare<T, F>(places: &'static Semaphore, work: F) -> (Work<impl FnOnce() + Send + 'static>, Job<T>)
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let place = places.acquire().await.expect("these semaphores are never closed");
    let (answer, answered) = oneshot::channel();
    let work = move || {
        let result = work();
        drop(place);
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

    /// On a thread, if the system gives one.
    fn spawn(&self) -> io::Result<()> {
        let work = Self(Arc::clone(&self.0));
        let spawned = spawn(move || work.run());
        match &spawned {
            Ok(()) => shortage(Shortage::ends),
            Err(error) => shortage(|shortage| shortage.is_seen(error)),
        }
        spawned
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    #[cfg(test)]
    refusals::next()?;
    // Not joined: its end is the answer.
    Builder::new().name("statera-blocking".to_owned()).spawn(run).map(drop)
}

/// Whether the system refuses threads, and whether the log says so.
struct Shortage {
    since: Option<Instant>,
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
    fn is_seen(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.since.is_none() {
            self.since = Some(now);
            if let Some(held_back) = self.lines.permit(now) {
                self.is_logged = true;
                warn!(
                    %error, held_back,
                    "the system gives no thread for lookups, saved tables and metrics: it is asked again until it does; \
                     raise TasksMax (systemd), pids.max (containers) or `ulimit -u`"
                );
            }
        }
    }

    fn ends(&mut self) {
        if let Some(since) = self.since.take()
            && std::mem::take(&mut self.is_logged)
        {
            info!(shortage = ?since.elapsed(), "the system gives threads again");
        }
    }
}

/// Lets unit tests refuse threads to [`start`] where it is called on the test's own thread.
#[cfg(test)]
pub mod refusals {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static LEFT: Cell<u32> = const { Cell::new(0) };
    }

    /// The next `count` requests of this thread are refused.
    pub fn refuse(count: u32) {
        LEFT.set(count);
    }

    /// How many requests are still to be refused.
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
        static PLACES: Semaphore = Semaphore::const_new(1);
        refusals::refuse(20);
        let begun = Instant::now();
        assert_eq!(start(&PLACES, || 7).await.await, Ok(7));
        assert_eq!(refusals::left(), 0);
        assert!(begun.elapsed() <= 20 * LONGEST_PAUSE, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn what_only_computes_is_done_without_a_thread_where_there_is_none() {
        static PLACES: Semaphore = Semaphore::const_new(1);
        let by = || std::thread::current().id();
        let here = by();
        assert!(compute(&PLACES, by).await.is_ok_and(|by| by != here));
        refusals::refuse(1);
        assert_eq!(compute(&PLACES, by).await, Ok(here));
        assert_eq!((refusals::left(), PLACES.available_permits()), (0, 1));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_for_the_caller_and_gives_the_place_back() {
        static PLACES: Semaphore = Semaphore::const_new(1);
        let job: Job<()> = start(&PLACES, || panic!("a defect that this test makes")).await;
        assert_eq!(job.await, Err(Panicked));
        assert_eq!(start(&PLACES, || 7).await.await, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_given_up_before_it_has_a_thread_never_begins() {
        static PLACES: Semaphore = Semaphore::const_new(1);
        refusals::refuse(u32::MAX);
        let (begins, begun) = std::sync::mpsc::channel::<()>();
        let started = start(&PLACES, move || drop(begins));
        assert!(tokio::time::timeout(Duration::from_secs(60), started).await.is_err());
        assert!(refusals::left() < u32::MAX - 10, "it was asked for again and again");
        assert!(begun.recv().is_err(), "the work was dropped");
        assert_eq!(PLACES.available_permits(), 1);
    }

    #[tokio::test]
    async fn no_more_threads_run_than_there_are_places() {
        static PLACES: Semaphore = Semaphore::const_new(2);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let held = || {
            let wait = Arc::clone(&wait);
            start(&PLACES, move || wait.lock().is_ok_and(|wait| wait.recv().is_ok()))
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
