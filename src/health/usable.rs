//! Logs when a pool refuses its sessions, when only one backend is left, and when either ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::balance::pool::Pool;
use crate::balance::snapshot::Usable;
use crate::control::log_limiter::{HeldBack, LogLimiter};

/// Lines for one pool in each window: a writer that switches a weight between 0 and 1 changes the state with
/// every read.
const MOST_LINES: u32 = 4;
/// The pause after which the state is compared again if the limiter held a line back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Logs when `pool` begins or ceases to refuse its sessions, or to have one usable backend. Never ends.
pub async fn watch(pool: Arc<Pool>) {
    let mut status = pool.cell.status();
    // For a pool that begins with one backend, neither that state nor its second backend is logged.
    let mut has_had_one = pool.cell.load().members().len() < 2;
    let mut logged = if has_had_one { Usable::One } else { Usable::Several };
    let mut lines = LogLimiter::new(MOST_LINES);
    loop {
        status.mark_unchanged();
        let usable = pool.cell.load().usable();
        if has_had_one && (logged, usable) == (Usable::One, Usable::Several) {
            (logged, has_had_one) = (usable, false);
        }
        if usable != logged {
            let Some(held_back) = lines.permit(Instant::now()) else {
                // The state is compared again later, so that the last state is always logged.
                sleep(RETRY_AFTER).await;
                continue;
            };
            log_change(&pool, logged, usable, held_back);
            (logged, has_had_one) = (usable, false);
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

fn log_change(pool: &Pool, before: Usable, usable: Usable, held_back: HeldBack) {
    let snapshot = pool.cell.load();
    let members = snapshot.members().len();
    let first = snapshot.usable_members().next().map(|member| member.backend.id());
    let pool = &*pool.name;
    match (usable, first) {
        (Usable::None, _) => {
            let reason = snapshot.refusal();
            warn!(pool, %reason, members, held_back, "sessions are refused: {reason}");
        }
        (Usable::One, Some(backend)) if before != Usable::None => {
            warn!(pool, %backend, members, held_back, "one backend is left: all others of its pool get no sessions");
        }
        (Usable::One, Some(backend)) => {
            info!(pool, %backend, members, held_back, "sessions are accepted again, by one backend");
        }
        _ => {
            let backends = snapshot.usable_members().count();
            let what = if before == Usable::None {
                "sessions are accepted again"
            } else {
                "more than one backend is usable again"
            };
            info!(
                pool,
                backends, members, held_back, "{what}: {backends} of {members} backends get sessions"
            );
        }
    }
}
