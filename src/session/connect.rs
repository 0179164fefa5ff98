//! Finds a backend that takes the session: picks, connects, and on a failure that another backend may not share,
//! excludes the one that failed and picks again. All of it happens before the first byte was sent.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::attempt::{ConnectError, connect_to};
use super::close_reason::CloseReason;
use super::queue;
use super::report::Report;
use crate::balance::backend::Backend;
use crate::balance::pool::NoPick;
use crate::reactor::timeout_at;
use crate::relay::Stream;

/// In a flood of clients that are reset at once, a session waits so long for the first event of its client before it picks: most
/// resets come within 0.1 ms of the accept. Outside of a flood it does not wait, so a backend that speaks first is not delayed.
const FLOOD_WAIT: Duration = Duration::from_millis(1);

/// Connects `client` to a backend of the session's pool, trying up to `connect.attempts` different ones until
/// `connect.deadline`, counted from the accept without the time in the queue. It ends as soon as the client is reset, and before
/// the pick where that is known by then.
///
/// # Errors
/// Why there is none; each failed attempt was counted.
///
/// # Cancel safety
/// Dropping the future resets a half-open connection.
pub(super) async fn connect(report: &mut Report, client: &Stream) -> Result<Stream, CloseReason> {
    let context = Rc::clone(report.context());
    let settings = &context.settings.connect;
    let accepted = report.accepted();
    let mut deadline = accepted + settings.deadline;
    let mut waited = Duration::ZERO;
    // The clock is asked where time may have passed, and each answer serves all that begins there.
    let mut asked = accepted;
    let mut tried = Vec::new();
    let mut failed: Option<Arc<Backend>> = None;
    let mut reason = CloseReason::NoBackend;

    if context.worker.expects_reset() {
        // A client without an event by then is served: its backend may have to speak first.
        let _ = timeout_at(accepted + FLOOD_WAIT, poll_fn(|cx| client.poll_input(cx))).await;
        asked = Instant::now();
    }
    for attempt in 0..settings.attempts.get() {
        if client.is_reset() {
            return Err(CloseReason::ConnectLeft);
        }
        // No future of its own where a fresh snapshot answers, as it nearly always does: each layer that a pick comes through
        // copies it.
        let pick = match context.pool.pick_or_point(report.client(), &tried, context.worker.random(), asked) {
            Ok(pick) => pick,
            Err(point) => {
                let picking = context.pool.pick_by_redis(&tried, point, asked);
                match unless_reset(client, pin!(picking)).await {
                    Ok(pick) => pick,
                    Err(left) => {
                        report.add_queue_time(asked.elapsed());
                        return Err(left);
                    }
                }
            }
        };
        let pick = match pick {
            Err(NoPick::Full) => {
                let began = Instant::now();
                report.release_backend();
                // Boxed: only those wait who came when all was full.
                let pick = Box::pin(queue::wait(report, client, &tried, waited, reason)).await;
                waited += began.elapsed();
                deadline += began.elapsed();
                pick
            }
            pick => pick.map_err(|_| reason),
        };
        let started = Instant::now();
        report.add_queue_time(started - asked);
        let pick = pick?;
        if let Some(failed) = failed.take() {
            failed.counters.of(context.worker.id).retries.add(1);
        }
        let backend = Arc::clone(pick.backend.backend());
        report.set_retries(attempt);
        report.picked(pick);

        let attempt = connect_to(report, &backend, &context, started, deadline);
        let result = unless_reset(client, pin!(attempt)).await;
        asked = Instant::now();
        report.set_connect_time(asked - accepted);
        let error = match result? {
            Ok(stream) => {
                report.connected(asked - started);
                return Ok(stream);
            }
            Err(error) => error,
        };

        debug!(pool = %context.pool.name, backend = %backend.id(), %error, "connect failed");
        report.failures.add(backend.id(), error.cause());
        reason = match &error {
            ConnectError::Exhausted(error) | ConnectError::NoLocalPort(error) => {
                context.worker.warn_exhausted(&backend, error);
                CloseReason::Exhausted
            }
            ConnectError::TimedOut => CloseReason::ConnectTimeout,
            _ => CloseReason::ConnectFailed,
        };
        if reason != CloseReason::Exhausted {
            backend.counters.of(context.worker.id).connect_failures.add(1);
        }
        if matches!(error, ConnectError::Exhausted(_)) || asked >= deadline {
            break;
        }
        tried.push(backend.id().clone());
        failed = Some(backend);
    }
    Err(reason)
}

/// The output of `future`, unless the client's connection is reset while that is pending. An event reports a reset, so this makes no system call.
///
/// A client that only ended its half is still served, also one that has sent no byte. Its FIN may come from `close` (a port
/// scanner, a health check) or from `shutdown` (`nc -N`), which look alike, and the latter still reads what a backend that speaks
/// first has to say.
///
/// # Errors
/// [`CloseReason::ConnectLeft`]; `future` was not polled again.
///
/// # Cost
/// It borrows `future`: a future that was moved in here would take its size twice in the caller's.
async fn unless_reset<F: Future>(client: &Stream, mut future: Pin<&mut F>) -> Result<F::Output, CloseReason> {
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => client.poll_reset(cx).map(|()| Err(CloseReason::ConnectLeft)),
    })
    .await
}
