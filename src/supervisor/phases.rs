//! The phases that lead from serving to the end, each a wait: for the stop, for the delay, for the last
//! session.
//!
//! `mod.rs` puts them in order and says between them what changes.

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

/// Hears how to stop.
#[derive(Clone, Debug)]
pub(super) struct Stops(watch::Receiver<Stop>);

/// How to stop, from those that run the proxy, and how they are heard.
pub(super) fn stops() -> (watch::Sender<Stop>, Stops) {
    let (stop, stops) = watch::channel(Stop::NotYet);
    (stop, Stops(stops))
}

impl Stops {
    /// Waits until the proxy is told to stop at least like this. Cancel safe.
    pub(super) async fn told(&self, least: Stop) {
        // Without a sender nothing can be told any more, and nothing is waited for.
        let _ = self.0.clone().wait_for(|stop| *stop >= least).await;
    }
}

/// Not ready, but still accepting, for `delay`.
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

/// Waits until the last session has ended and the workers with it, for `timeout`. Then sessions are cut.
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
