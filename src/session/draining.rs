//! Closes the sessions of backends that have been draining for `drain.timeout`.
//!
//! Each worker closes its own sessions, beginning with those that were silent for longest. It spreads the
//! closes over a tenth of the timeout, and over a second at least, because the clients will connect again
//! at once. A session that began when its backend was already draining (Redis picked the backend, without a
//! fresh snapshot) gets the same time from its own beginning.
//!
//! Which backends are draining is in `balance/pool/draining.rs`; how a session is ended, in `relay/idle.rs`.

use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::Worker;
use crate::balance::backend::{Backend, BackendKey};
use crate::balance::pool::Pool;
use crate::reactor::timeout_at;

/// The mean pause between two steps. A pause lasts from half of this to one and a half times this.
const STEP: Duration = Duration::from_millis(20);
/// The most sessions that a step closes on one worker: 5,000 a second, whatever the timeout. A close takes
/// some 10 µs.
const MAX_PER_STEP: usize = 100;
/// The shortest time over which sessions are spread.
const MIN_SPREAD: Duration = Duration::from_secs(1);
/// The pause after a step that found no more sessions. Other sessions may be about to begin, or other
/// workers may still have some.
const RECHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Closes the sessions of draining backends of `pool` on this worker. `settle_time` is that of its
/// sessions. Returns at once if `drain.timeout` is zero, else never.
pub async fn close_sessions(worker: Rc<Worker>, pool: Arc<Pool>, settle_time: Duration) {
    let timeout = pool.cell.policy().drain_timeout;
    if timeout.is_zero() {
        return;
    }
    let spread = (timeout / 10).max(MIN_SPREAD);
    let mut draining = pool.cell.draining_backends().watch();
    // The number of sessions that a step closes. It never falls while backends are due, so that the spread
    // is kept.
    let mut step_limit = 0;
    let mut next_step: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let Due { backends, mut next } = due(&draining.borrow_and_update(), timeout, now);
        if backends.is_empty() {
            next_step = None;
        } else {
            // The first step begins at a random time, so that the proxies of a fleet do not act together.
            let mut step = *next_step.get_or_insert_with(|| {
                step_limit = 0;
                now + random_part(spread / 10, &worker)
            });
            if step <= now {
                let remaining = worker.relay.clock.end_sessions(&backends, timeout, settle_time, |found| {
                    step_limit = step_limit.max(step_size(found, spread));
                    step_limit
                });
                let pause =
                    if remaining > 0 { STEP / 2 + random_part(STEP, &worker) } else { RECHECK_INTERVAL };
                step = now + pause;
                next_step = Some(step);
            }
            next = Some(next.map_or(step, |next| next.min(step)));
        }
        let changed = draining.changed();
        let pool_is_gone = match next {
            Some(next) => timeout_at(next, changed).await.is_ok_and(|changed| changed.is_err()),
            None => changed.await.is_err(),
        };
        // Not reached in practice, because this future holds the pool.
        if pool_is_gone {
            return;
        }
    }
}

/// What is to be done about the draining backends.
struct Due {
    /// The sorted keys of backends whose time is over and that have sessions.
    backends: Vec<u64>,
    /// When the time of the next backend is over.
    next: Option<Instant>,
}

fn due(draining: &[(BackendKey, Weak<Backend>)], timeout: Duration, now: Instant) -> Due {
    let mut due = Due { backends: Vec::new(), next: None };
    for backend in draining.iter().filter_map(|(_, backend)| backend.upgrade()) {
        let Some(until) = backend.draining.since().map(|since| since + timeout) else { continue };
        if until > now {
            due.next = Some(due.next.map_or(until, |next| next.min(until)));
        } else if backend.active() > 0 {
            due.backends.push(backend.key().get());
        }
    }
    due.backends.sort_unstable();
    due
}

/// Returns the number of sessions that a step closes, so that `found` sessions are closed within `spread`;
/// at most [`MAX_PER_STEP`].
fn step_size(found: usize, spread: Duration) -> usize {
    let steps = usize::try_from(spread.as_millis() / STEP.as_millis()).unwrap_or(usize::MAX);
    found.div_ceil(steps).min(MAX_PER_STEP)
}

/// A random duration below `duration`.
fn random_part(duration: Duration, worker: &Worker) -> Duration {
    duration.mul_f64((worker.random() >> 11) as f64 / 2f64.powi(53))
}
