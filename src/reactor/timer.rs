//! Points in time that tasks of a worker wait for.
//!
//! Few at once (what lasts as long as a session is `relay`'s idle clock's), so a sorted map does. Waiting costs no look at the
//! clock: the thread has one when it comes from its sockets.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

use super::with;

/// Those who wait, the next one first.
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

/// Wakes those whose time has come by `now`.
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

/// A place among those who wait, given back when dropped.
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
            // Who is not there any more was woken.
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

/// The time was over before what it was given for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

/// Waits until `deadline` or, where the thread is busy, a little longer. Cancel safe.
pub async fn sleep_until(deadline: Instant) {
    if with(|reactor| reactor.has_timers) == Some(true) {
        Sleep { deadline, id: None }.await;
    } else {
        // What workers do is also tested where tokio's clock runs, since that can be stopped.
        Box::pin(tokio::time::sleep_until(deadline)).await;
    }
}

/// Waits for `duration`. Cancel safe.
pub async fn sleep(duration: Duration) {
    sleep_until(Instant::now() + duration).await;
}

/// What `future` gives, until `deadline`; asked once even if that is over.
///
/// # Errors
/// It gave nothing in time, and was dropped.
pub async fn timeout_at<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Elapsed> {
    tokio::select! {
        biased;
        output = future => Ok(output),
        () = sleep_until(deadline) => Err(Elapsed),
    }
}
