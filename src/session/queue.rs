//! Waits for a place where all backends of the pool are full.
//!
//! The line itself is `balance/queue/mod.rs`'s: who comes first, and whose turn it is. Here is what a session does in it: it waits for
//! `queue.timeout` at most, and looks whether its client is still there, since a place in the line that nobody wants any more
//! is somebody else's.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::Instant;

use super::close_reason::CloseReason;
use super::report::Report;
use crate::balance::BackendId;
use crate::balance::pool::{NoPick, Pick};
use crate::reactor::timeout_at;
use crate::relay::Stream;

/// Waits until it is this session's turn and a backend that is not in `tried` has a place, at most until the session has
/// waited for `queue.timeout`, of which `waited` is over. `no_backend` is the answer where no backend is left.
///
/// # Errors
/// Why there is none.
///
/// # Cancel safety
/// Dropping the future leaves the line.
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
            // It may be this session's turn again at once, for as long as others come in between.
            Err(NoPick::Full) if now >= until => return Err(CloseReason::QueueTimeout),
            Err(NoPick::Full) => waiter.found_none(!tried.is_empty()),
        }
        yield_now().await;
    }
}
