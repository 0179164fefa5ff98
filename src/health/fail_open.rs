//! Logs when a pool begins and ends to fail open, that is, to ignore the health of its backends.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::balance::pool::Pool;
use crate::control::log_limiter::LogLimiter;

/// Lines for one pool in each window: a pool close to the threshold may cross it with every check.
const MOST_LINES: u32 = 4;
/// The pause after which the state is compared again if the limiter held a line back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Logs when `pool` begins and ends to fail open. Never ends.
pub async fn watch(pool: Arc<Pool>) {
    let mut status = pool.cell.status();
    let mut logged = false;
    let mut lines = LogLimiter::new(MOST_LINES);
    loop {
        let fails_open = status.borrow_and_update().fails_open;
        if fails_open != logged {
            if lines.permit(Instant::now()).is_none() {
                // The state is compared again later, so that the last state is always logged.
                sleep(RETRY_AFTER).await;
                continue;
            }
            logged = fails_open;
            if fails_open {
                warn!(pool = %pool.name, "too little of the pool's weight is on healthy backends: health is ignored (fail-open)");
            } else {
                info!(pool = %pool.name, "enough of the pool's weight is on healthy backends: health counts again");
            }
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}
