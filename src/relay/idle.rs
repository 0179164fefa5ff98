//! Tells when a session has been silent for too long.
//!
//! Activity only notes the time; the timer is moved when it fires, so a busy session costs the timer wheel nothing.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// The silence of one session.
pub(super) struct Idle<'a> {
    timer: Pin<&'a mut Sleep>,
    last_activity: Instant,
}

impl<'a> Idle<'a> {
    /// Silent since now. The deadline of `timer` does not matter: the first poll sets it.
    pub(super) fn new(timer: Pin<&'a mut Sleep>) -> Self {
        Self { timer, last_activity: Instant::now() }
    }

    /// Bytes moved, or a half closed.
    pub(super) fn touch(&mut self) {
        self.last_activity = Instant::now();
    }

    /// Ready once the session has been silent for `limit`; `None` never is. `limit` may differ from poll to poll.
    pub(super) fn poll_expired(&mut self, cx: &mut Context<'_>, limit: Option<Duration>) -> Poll<()> {
        let Some(limit) = limit else { return Poll::Pending };
        let deadline = self.last_activity + limit;
        // A timer that fires early is moved on; one that would fire late must be moved now.
        if self.timer.deadline() > deadline {
            self.timer.as_mut().reset(deadline);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            if self.timer.deadline() >= deadline {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(deadline);
        }
    }
}
