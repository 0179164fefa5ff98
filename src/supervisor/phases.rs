//! The phases that lead from serving to the end, each a wait: for the stop, for the delay, for the last
//! session.
//!
//! `mod.rs` puts them in order and says between them what changes.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::{error, info};

use super::Summary;
use super::tasks::Defect;
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
    async fn told(&self, least: Stop) {
        // Without a sender nothing can be told any more, and nothing is waited for.
        let _ = self.0.clone().wait_for(|stop| *stop >= least).await;
    }
}

/// Waits until the proxy is told to stop, or until a part of it dies. What is left serves its sessions to
/// the end then, and the summary says that the run failed.
pub(super) async fn serve(
    stops: &Stops,
    workers: &mut Workers,
    defects: &mut mpsc::UnboundedReceiver<Defect>,
) -> Summary {
    let mut summary = Summary::default();
    tokio::select! {
        () = stops.told(Stop::Drain) => {}
        ended = workers.ended() => {
            error!("a worker died: draining");
            summary.worker_ended(ended.flatten());
            summary.failed = true;
        }
        Some(Defect { task, pool, reason }) = defects.recv() => {
            error!(task, pool = pool.as_deref(), reason, "a task of the control plane died: draining");
            summary.failed = true;
        }
    }
    summary
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
    summary: &mut Summary,
) {
    let mut finished = std::pin::pin!(async {
        while let Some(ended) = workers.ended().await {
            summary.worker_ended(ended);
        }
    });
    tokio::select! {
        biased;
        () = &mut finished => return,
        () = sleep(timeout) => {}
        () = stops.told(Stop::Now) => {}
    }
    drain.advance(Phase::Closing);
    finished.await;
}
