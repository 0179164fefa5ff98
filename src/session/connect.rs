//! Finds a backend for a session: picks one and connects to it. If the attempt fails and another backend may
//! work, it excludes the failed backend and picks again.
//!
//! No byte of the client is read before a backend is connected, so a failed attempt loses no data. One
//! attempt is in `attempt.rs`, the wait while all backends are full in `queue.rs`.

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

/// How long a session waits for the first event of its client before it picks, while many clients reset
/// their connections at once (`Worker::expects_reset`). Most resets come within 0.1 ms of the accept. In
/// normal operation no session waits, so a backend that speaks first is not delayed.
const FLOOD_WAIT: Duration = Duration::from_millis(1);

/// Connects to a backend of the session's pool. Tries up to `connect.attempts` backends until
/// `connect.deadline`. The deadline counts from the accept; the time in the queue is added to it. Returns
/// early when an event reports that the client's connection was reset.
///
/// # Errors
/// The reason why no backend was reached. Each failed attempt was counted.
///
/// # Cancel safety
/// Dropping the future resets a connection that is half open.
pub(super) async fn connect(report: &mut Report, client: &Stream) -> Result<Stream, CloseReason> {
    let context = Rc::clone(report.context());
    let settings = &context.settings.connect;
    let accepted = report.accepted();
    let mut deadline = accepted + settings.deadline;
    let mut waited = Duration::ZERO;
    // The last reading of the clock. It is read again only where time may have passed.
    let mut now = accepted;
    let mut tried = Vec::new();
    let mut failed: Option<Arc<Backend>> = None;
    let mut reason = CloseReason::NoBackend;

    if context.worker.expects_reset() {
        // Without an event in this time the session goes on: the backend may have to speak first.
        let _ = timeout_at(accepted + FLOOD_WAIT, poll_fn(|cx| client.poll_input(cx))).await;
        now = Instant::now();
    }
    for attempt in 0..settings.attempts.get() {
        if client.is_reset() {
            return Err(CloseReason::ConnectLeft);
        }
        // Pick. In the usual case a fresh snapshot has an answer. That call is not async, because each layer
        // of futures would copy the pick once more.
        let pick = match context.pool.pick_or_point(report.client(), &tried, context.worker.random(), now) {
            Ok(pick) => pick,
            Err(point) => {
                let picking = context.pool.pick_by_redis(&tried, point, now);
                match unless_reset(client, pin!(picking)).await {
                    Ok(pick) => pick,
                    Err(reason) => {
                        report.add_queue_time(now.elapsed());
                        return Err(reason);
                    }
                }
            }
        };
        let pick = match pick {
            Err(NoPick::Full) => {
                let began = Instant::now();
                report.release_backend();
                // Boxed: few sessions wait, and this future would make all of them larger.
                let pick = Box::pin(queue::wait(report, client, &tried, waited, reason)).await;
                waited += began.elapsed();
                deadline += began.elapsed();
                pick
            }
            pick => pick.map_err(|_| reason),
        };
        let started = Instant::now();
        report.add_queue_time(started - now);
        let pick = pick?;
        // The retry after a failed backend is counted here, once another backend has been picked.
        if let Some(failed) = failed.take() {
            failed.counters.of(context.worker.id).retries.add(1);
        }
        let backend = Arc::clone(pick.backend.backend());
        report.set_retries(attempt);
        report.picked(pick);

        // Connect.
        let attempt = connect_to(report, &backend, &context, started, deadline);
        let result = unless_reset(client, pin!(attempt)).await;
        now = Instant::now();
        report.set_connect_time(now - accepted);
        let error = match result? {
            Ok(stream) => {
                report.connected(now - started);
                return Ok(stream);
            }
            Err(error) => error,
        };

        // The attempt has failed: log and count it, and exclude the backend if another one may work.
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
        if matches!(error, ConnectError::Exhausted(_)) || now >= deadline {
            break;
        }
        tried.push(backend.id().clone());
        failed = Some(backend);
    }
    Err(reason)
}

/// Waits for `future`, and stops when the client's connection is reset. A reset is reported by an event, so
/// this makes no system call.
///
/// A client that only ended its half is still served, even if it has sent no byte. Its FIN may come from
/// `close` (a port scanner, a health check) or from `shutdown` (`nc -N`). They look alike, and after
/// `shutdown` the client still reads the bytes of a backend that speaks first.
///
/// # Errors
/// [`CloseReason::ConnectLeft`]: the client was reset. `future` is not polled any more.
///
/// # Cost
/// `future` is borrowed, because a future that is passed by value takes up its size twice in the caller.
async fn unless_reset<F: Future>(client: &Stream, mut future: Pin<&mut F>) -> Result<F::Output, CloseReason> {
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => client.poll_reset(cx).map(|()| Err(CloseReason::ConnectLeft)),
    })
    .await
}
