//! Closes the sessions of backends that are leaving, once they have been for `drain.timeout`.
//!
//! Each worker closes its own, the silent ones first, and never all at once: their clients would all come back in one moment. They
//! are spread over a tenth of the timeout, and over a second at least. A session that began when its backend was leaving already
//! (Redis named it, while no fresh snapshot was there) has the same time from its own begin.
//!
//! Which backends leave is `balance/pool/draining.rs`'s; how a session is told, `relay/idle.rs`'s.

use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::Worker;
use crate::balance::backend::{Backend, BackendKey};
use crate::balance::pool::Pool;
use crate::reactor::timeout_at;

/// Between two steps: half of it, or half as much again.
const STEP: Duration = Duration::from_millis(20);
/// Of one worker: 5,000 a second, whatever the timeout. A close takes some 10 µs.
const MAX_PER_STEP: usize = 100;
/// The shortest time over which sessions are spread.
const MIN_SPREAD: Duration = Duration::from_secs(1);
/// Between two looks for sessions that are just about to begin, or that other workers have.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Closes what is due of `pool` on this worker. `settle_time` is that of its sessions. Ends at once where `drain.timeout` is zero,
/// and else never.
pub async fn close_sessions(worker: Rc<Worker>, pool: Arc<Pool>, settle_time: Duration) {
    let timeout = pool.cell.policy().drain_timeout;
    if timeout.is_zero() {
        return;
    }
    let spread = (timeout / 10).max(MIN_SPREAD);
    let mut draining = pool.cell.draining_backends().watch();
    // Of a step, while some are due.
    let mut step_limit = 0;
    let mut next_step: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let Due { backends, mut next } = due(&draining.borrow_and_update(), timeout, now);
        if backends.is_empty() {
            next_step = None;
        } else {
            // Not all proxies of a fleet in one moment.
            let mut step = *next_step.get_or_insert_with(|| {
                step_limit = 0;
                now + random_part(spread / 10, &worker)
            });
            if step <= now {
                let remaining = worker.relay.clock.end_sessions(&backends, timeout, settle_time, |found| {
                    step_limit = step_limit.max(step_size(found, spread));
                    step_limit
                });
                let pause = if remaining > 0 { STEP / 2 + random_part(STEP, &worker) } else { LOOK_INTERVAL };
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
        // The pool lives as long as its workers.
        if pool_is_gone {
            return;
        }
    }
}

/// What of the leaving backends is to be done.
struct Due {
    /// Those backends time is over and who have sessions: their keys, sorted.
    backends: Vec<u64>,
    /// When the next one's time is over.
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

/// How many of so many a step closes, so that all are closed within `spread`.
fn step_size(found: usize, spread: Duration) -> usize {
    let steps = usize::try_from(spread.as_millis() / STEP.as_millis()).unwrap_or(usize::MAX);
    found.div_ceil(steps).min(MAX_PER_STEP)
}

fn random_part(duration: Duration, worker: &Worker) -> Duration {
    duration.mul_f64((worker.random() >> 11) as f64 / 2f64.powi(53))
}
