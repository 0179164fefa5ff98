//! Points in time that tasks of a worker wait for.
//!
//! Few tasks wait at once, since timeouts that last as long as a session belong to the relay's idle clock.
//! So a sorted map is enough. To find the next timer costs no reading of the clock: the reactor reads it
//! once after each wait.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

use super::with;

/// The waiting tasks, sorted by deadline. The number tells timers of the same deadline apart.
#[derive(Debug, Default)]
pub(super) struct Timers {
    waiting: BTreeMap<(Instant, u64), Waker>,
    last_id: u64,
}

impl Timers {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    fn insert(&mut self, deadline: Instant, waker: Waker) -> u64 {
        self.last_id += 1;
        self.waiting.insert((deadline, self.last_id), waker);
        self.last_id
    }
}

/// Wakes the tasks whose deadline is not later than `now`. Each waker is called without a borrow of the map.
pub(super) fn fire(timers: &RefCell<Timers>, now: Instant) {
    let next = || {
        let mut timers = timers.borrow_mut();
        let first = timers.waiting.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    };
    while let Some(waker) = next() {
        waker.wake();
    }
}

/// One timer. It is inserted at the first poll and removed when dropped.
struct Sleep {
    deadline: Instant,
    id: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let (deadline, id) = (self.deadline, self.id);
        with(|reactor| {
            let mut timers = reactor.timers.borrow_mut();
            let Some(id) = id else {
                self.id = Some(timers.insert(deadline, cx.waker().clone()));
                return Poll::Pending;
            };
            // A timer that is not in the map any more has fired.
            let Some(waker) = timers.waiting.get_mut(&(deadline, id)) else { return Poll::Ready(()) };
            if !waker.will_wake(cx.waker()) {
                let before = mem::replace(waker, cx.waker().clone());
                drop(timers);
                drop(before);
            }
            Poll::Pending
        })
        .unwrap_or(Poll::Pending)
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            with(|reactor| reactor.timers.borrow_mut().waiting.remove(&(self.deadline, id)));
        }
    }
}

/// The deadline came before the future's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

/// Waits until `deadline`, or a little longer if the thread is busy. Cancel safe.
pub async fn sleep_until(deadline: Instant) {
    if with(|reactor| reactor.has_timers) == Some(true) {
        Sleep { deadline, id: None }.await;
    } else {
        // Tests run on tokio's clock, which they can stop.
        Box::pin(tokio::time::sleep_until(deadline)).await;
    }
}

/// Waits for `duration`. Cancel safe.
pub async fn sleep(duration: Duration) {
    sleep_until(Instant::now() + duration).await;
}

/// The output of `future`, if it is ready before `deadline`. The future is polled at least once.
///
/// # Errors
/// The deadline came first. `future` is dropped.
pub async fn timeout_at<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Elapsed> {
    tokio::select! {
        biased;
        output = future => Ok(output),
        () = sleep_until(deadline) => Err(Elapsed),
    }
}
