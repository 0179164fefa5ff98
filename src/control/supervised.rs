//! Runs a task of the control plane again whenever it panics, fails or returns.
//!
//! Traffic goes on meanwhile: backends are picked from the last snapshot. Each restart is logged and
//! counted. The caller passes a function that makes the task's future. What must outlive a restart (a
//! socket, the receiver of a channel) is shared by these futures. Next: `watchdog.rs` notices a task that
//! blocks.

use std::any::Any;
use std::fmt::Display;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::error;

use super::backoff::Backoff;
use super::log_limiter::{HeldBack, LogLimiter};
use super::watchdog::Pulse;
use crate::fault;
use crate::observe::tasks::{Restarts, Task};

/// The bounds of the pauses before restarts: a task that fails at once every time must not use up a core or
/// flood the log.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A task that ran for so long has recovered: the next pause is short again.
const CALM: Duration = Duration::from_secs(60);
/// Lines in each window of the limiter. One defect may end a task in each of 10,000 pools.
const MOST_LINES: u32 = 20;

/// The pauses before restarts of one task or thread.
#[derive(Debug)]
pub struct Pauses {
    backoff: Backoff,
    begun: Instant,
}

impl Pauses {
    /// The first run begins now. No pause is longer than `longest`.
    #[must_use]
    pub fn new(longest: Duration) -> Self {
        Self { backoff: Backoff::new(FIRST_PAUSE, longest), begun: Instant::now() }
    }

    /// Notes that a run begins now.
    pub fn begins(&mut self) {
        self.begun = Instant::now();
    }

    /// Returns the pause before the next run.
    pub fn pause(&mut self) -> Duration {
        if self.begun.elapsed() >= CALM {
            self.backoff.reset();
        }
        self.backoff.patient_pause()
    }
}

/// How a run of a task ended.
#[derive(Debug)]
enum Ended {
    /// It panicked, with this text.
    Panicked(String),
    /// It could not do its work, for this reason.
    Failed(String),
    /// It returned, though it was to run for ever.
    Returned,
}

/// Counts and logs the restarts of all tasks of one proxy.
#[derive(Debug)]
pub struct Defects {
    restarts: Arc<Restarts>,
    lines: Mutex<LogLimiter>,
}

impl Defects {
    /// Counts in `restarts`.
    #[must_use]
    pub fn new(restarts: Arc<Restarts>) -> Self {
        Self { restarts, lines: Mutex::new(LogLimiter::new(MOST_LINES)) }
    }

    /// Where restarts are counted.
    #[must_use]
    pub fn restarts(&self) -> &Arc<Restarts> {
        &self.restarts
    }

    /// Asks to log a line of a defect. `None`: it is held back.
    pub fn permit(&self) -> Option<HeldBack> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).permit(Instant::now())
    }

    /// Counts and logs that `task`, which may belong to a pool, is started again after `pause`.
    fn restarts_after(&self, task: Task, pool: Option<&str>, ended: &Ended, pause: Duration) {
        self.restarts.count(task);
        let Some(held_back) = self.permit() else { return };
        let (task, restarts) = (task.name(), self.restarts.of(task));
        match ended {
            Ended::Panicked(panic) => error!(
                task,
                pool,
                panic,
                ?pause,
                restarts,
                held_back,
                "a control-plane task panicked, which is a defect: it is restarted, and traffic goes on with \
                 the last snapshot"
            ),
            Ended::Returned => error!(
                task,
                pool,
                ?pause,
                restarts,
                held_back,
                "a control-plane task returned, which is a defect: it is restarted, and traffic goes on with \
                 the last snapshot"
            ),
            Ended::Failed(reason) => error!(
                task,
                pool,
                reason,
                ?pause,
                restarts,
                held_back,
                "a control-plane task failed: it is restarted, and traffic goes on with the last snapshot"
            ),
        }
    }
}

/// Runs the futures that `make` makes, one after the other. Ends when one returns `Ok` and `is_over` holds.
///
/// # Cancel safety
/// Dropping the future drops the one that runs.
pub async fn run<F, E>(
    task: Task,
    pool: Option<Arc<str>>,
    (defects, pulse): (Arc<Defects>, Arc<Pulse>),
    is_over: impl Fn() -> bool,
    mut make: impl FnMut() -> F,
) where
    F: Future<Output = Result<(), E>>,
    E: Display,
{
    let mut pauses = Pauses::new(LONGEST_PAUSE);
    loop {
        pauses.begins();
        let ended = match caught(pulse.polls(task, pool.clone(), async {
            fault::point("task", task.name());
            make().await
        }))
        .await
        {
            Ok(Ok(())) if is_over() => return,
            Ok(Ok(())) => Ended::Returned,
            Ok(Err(error)) => Ended::Failed(error.to_string()),
            Err(panic) => Ended::Panicked(panic),
        };
        let pause = pauses.pause();
        defects.restarts_after(task, pool.as_deref(), &ended, pause);
        sleep(pause).await;
    }
}

/// Runs `future`. The error is the text of its panic.
pub async fn caught<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = Box::pin(future);
    let polled = poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(text(&*panic))),
    });
    let ended = polled.await;
    // The future may panic while it is dropped, too.
    match catch_unwind(AssertUnwindSafe(|| drop(future))) {
        Ok(()) => ended,
        Err(panic) => Err(text(&*panic)),
    }
}

/// The text of a panic.
#[must_use]
pub fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a text").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

    use crate::control::watchdog::Watchdog;

    /// Runs `make` as a task for `time` of a stopped clock, and returns how often it was restarted.
    async fn restarts<F>(time: Duration, make: impl FnMut() -> F) -> u64
    where
        F: Future<Output = Result<(), &'static str>>,
    {
        let defects = Arc::new(Defects::new(Arc::default()));
        let pulse = Watchdog::default().pulse("a test");
        let running = run(Task::Admin, None, (Arc::clone(&defects), pulse), || false, make);
        assert!(tokio::time::timeout(time, running).await.is_err(), "it runs for ever");
        defects.restarts().of(Task::Admin)
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_returns_or_fails_is_made_anew() {
        let mut runs = 0;
        let restarts = restarts(Duration::from_secs(5), || {
            runs += 1;
            let run = runs;
            async move {
                match run {
                    1 => panic!("a defect of this test"),
                    2 => Ok(()),
                    3 => Err("no thread"),
                    _ => std::future::pending().await,
                }
            }
        });
        assert_eq!(restarts.await, 3);
        assert_eq!(runs, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_before_the_future_is_made_and_one_while_it_is_dropped_are_contained() {
        struct PanicsInDrop;
        impl Drop for PanicsInDrop {
            fn drop(&mut self) {
                panic!("a defect in a drop");
            }
        }
        let runs = AtomicU32::new(0);
        let restarts = restarts(Duration::from_secs(5), || {
            let run = runs.fetch_add(1, Relaxed);
            assert!(run > 0, "a defect of this test");
            let held = (run == 1).then(|| PanicsInDrop);
            poll_fn(move |_| {
                let _ = &held;
                if run == 1 { Poll::Ready(Ok(())) } else { Poll::Pending }
            })
        });
        assert_eq!(restarts.await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_pauses_grow_and_are_short_again_after_a_calm_time() {
        let at_once = restarts(Duration::from_secs(60), || async { Err("again") }).await;
        // The bounds double from 100 ms to 10 s, and each pause is at least half of its bound: about 14
        // restarts in a minute.
        assert!((7..=16).contains(&at_once), "{at_once}");
        let calm = restarts(Duration::from_secs(650), || async {
            sleep(CALM).await;
            Err("after a minute")
        });
        // Ten times a minute and 100 ms at most.
        assert_eq!(calm.await, 10);
    }

    #[tokio::test]
    async fn a_task_that_returns_when_it_is_to_end_is_not_made_anew() {
        let (defects, is_over) = (Arc::new(Defects::new(Arc::default())), AtomicBool::new(false));
        let shared = (Arc::clone(&defects), Watchdog::default().pulse("a test"));
        let made = || async {
            is_over.store(true, Relaxed);
            Ok::<(), Infallible>(())
        };
        run(Task::ReportApplied, None, shared, || is_over.load(Relaxed), made).await;
        assert_eq!(defects.restarts().of(Task::ReportApplied), 0);
    }
}
