//! Waits for a slot at a backend while all backends of the pool are full.
//!
//! The queue itself, with the order of its waiters, is in `balance/queue`. This file has what a session
//! does while it waits: it gives up after `queue.timeout`, and when its client leaves, so that it does not
//! take a slot from another waiter.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::Instant;

use super::close_reason::CloseReason;
use super::report::Report;
use crate::balance::BackendId;
use crate::balance::pool::{NoPick, Pick};
use crate::fault;
use crate::reactor::timeout_at;
use crate::relay::Stream;

/// Waits until the queue wakes this session and a backend that is not in `tried` has a free slot, at most
/// until `queue.timeout` is over, of which `waited` has passed already. Returns `no_backend` if no backend
/// is left.
///
/// # Errors
/// The queue is full, the timeout is over, the client has left, or no backend is left.
///
/// # Cancel safety
/// Dropping the future takes the session out of the queue.
pub(super) async fn wait(
    report: &Report,
    client: &Stream,
    tried: &[BackendId],
    waited: Duration,
    no_backend: CloseReason,
) -> Result<Pick, CloseReason> {
    let (pool, worker) = (&report.context().pool, &report.context().worker);
    let Some(mut waiter) = pool.queue().enter() else { return Err(CloseReason::QueueFull) };
    pool.counters.of(worker.id).queued.add(1);
    fault::point("session_waits", &pool.name);
    let timeout = pool.cell.policy().capacity.queue_timeout;
    let until = Instant::now() + timeout.saturating_sub(waited);
    loop {
        let woken = poll_fn(|cx| match client.poll_left(cx) {
            Poll::Ready(()) => Poll::Ready(Err(CloseReason::QueueLeft)),
            Poll::Pending => waiter.poll_woken(cx).map(Ok),
        });
        timeout_at(until, woken).await.unwrap_or(Err(CloseReason::QueueTimeout))?;
        let now = Instant::now();
        match pool.pick_for_waiter(report.client(), tried, worker.random(), now).await {
            Ok(pick) => {
                waiter.served();
                return Ok(pick);
            }
            Err(NoPick::NoBackend) => return Err(no_backend),
            // Checked here, too, because the queue may wake the waiter again and again before the timeout
            // is polled.
            Err(NoPick::Full) if now >= until => return Err(CloseReason::QueueTimeout),
            Err(NoPick::Full) => waiter.found_none(!tried.is_empty()),
        }
        yield_now().await;
    }
}
