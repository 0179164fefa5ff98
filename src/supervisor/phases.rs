//! The waits between serving and the end: for the request to stop, for the delay, for the last session.
//!
//! `life.rs` puts the waits in order and changes what runs between them.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::info;

use super::Summary;
use super::workers::Workers;
use crate::drain::{DrainControl, Phase};

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stop {
    NotYet,
    Drain,
    Now,
}

/// The receiver of requests to stop.
#[derive(Clone, Debug)]
pub(super) struct Stops(watch::Receiver<Stop>);

/// Makes the channel by which [`super::Running`] tells the control thread how to stop.
pub(super) fn stops() -> (watch::Sender<Stop>, Stops) {
    let (stop, stops) = watch::channel(Stop::NotYet);
    (stop, Stops(stops))
}

impl Stops {
    /// Waits until the proxy is told to stop in the way of `least` or a faster way. Cancel safe.
    pub(super) async fn told(&self, least: Stop) {
        // If the sender is gone, no request can come, so the wait ends.
        let _ = self.0.clone().wait_for(|stop| *stop >= least).await;
    }
}

/// Waits for `delay`, while the proxy is not ready but still accepts. [`Stop::Now`] ends the wait.
pub(super) async fn leave(delay: Duration, stops: &Stops) {
    if delay.is_zero() {
        return;
    }
    info!(?delay, "leaving: not ready, still accepting");
    tokio::select! {
        () = sleep(delay) => {}
        () = stops.told(Stop::Now) => {}
    }
}

/// Waits until all sessions and workers have ended. After `timeout` or [`Stop::Now`] the sessions are cut.
pub(super) async fn finish_sessions(
    timeout: Duration,
    stops: &Stops,
    drain: &DrainControl,
    workers: &mut Workers,
) -> Summary {
    let mut summary = Summary::default();
    let mut finished = std::pin::pin!(async {
        while let Some(ended) = workers.ended().await {
            summary.worker_ended(ended);
        }
        summary
    });
    tokio::select! {
        biased;
        summary = &mut finished => return summary,
        () = sleep(timeout) => {}
        () = stops.told(Stop::Now) => {}
    }
    drain.advance(Phase::Closing);
    finished.await
}
