//! What a pool's snapshot asks for as a whole: weights that grow are looked at again and again, and when health is ignored, or no
//! longer, it is said once.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::balance::pool::Pool;
use crate::control::log_limiter::LogLimiter;

/// The steps of a slow start. More would be finer than the chance by which sessions come.
const STEPS: u32 = 20;
/// A snapshot of 10,000 backends takes up to 9 ms.
const SHORTEST_STEP: Duration = Duration::from_millis(100);

/// A pool on the brink goes over it with every check.
const MOST_LINES: u32 = 4;
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Makes the pool's snapshot again while a slow start lasts. Never ends.
pub async fn grow(pool: Arc<Pool>) {
    let mut standing = pool.cell.status();
    let step = (pool.cell.policy().slow_start / STEPS).max(SHORTEST_STEP);
    loop {
        if standing.borrow_and_update().ramps {
            sleep(step).await;
            pool.cell.refresh();
        } else if standing.changed().await.is_err() {
            return;
        }
    }
}

/// Says when too little of the pool is healthy, so that health is ignored. Never ends.
pub async fn watch_fail_open(pool: Arc<Pool>) {
    let mut standing = pool.cell.status();
    let mut told = false;
    let mut lines = LogLimiter::new(MOST_LINES);
    loop {
        let fails_open = standing.borrow_and_update().fails_open;
        if fails_open != told {
            if lines.permit(Instant::now()).is_none() {
                // How it ends is said.
                sleep(LOOK_AGAIN).await;
                continue;
            }
            told = fails_open;
            if fails_open {
                warn!(pool = %pool.name, "too little of its weight is on healthy backends: health is ignored (fail-open)");
            } else {
                info!(pool = %pool.name, "enough of its weight is on healthy backends: health counts again");
            }
        }
        if standing.changed().await.is_err() {
            return;
        }
    }
}
