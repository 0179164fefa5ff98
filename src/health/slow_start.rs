//! Lets the weights of returning backends grow during their slow start.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::balance::pool::Pool;

/// A slow start has this many steps. A random pick varies by more than one of them.
const STEPS: u32 = 20;
/// Making a snapshot of 10,000 backends takes up to 9 ms, so steps are not shorter than this.
const SHORTEST_STEP: Duration = Duration::from_millis(100);

/// Makes the pool's snapshot again at every step while a slow start lasts. Never ends.
pub async fn run(pool: Arc<Pool>) {
    let mut status = pool.cell.status();
    let step = (pool.cell.policy().slow_start / STEPS).max(SHORTEST_STEP);
    loop {
        if status.borrow_and_update().ramps {
            sleep(step).await;
            pool.cell.refresh();
        } else if status.changed().await.is_err() {
            return;
        }
    }
}
