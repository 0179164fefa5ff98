//! Waits, at most a second, for what new pools need before sessions begin: Redis's first answer, and the
//! addresses of names.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::warn;

use super::pool_handle::PoolHandle;
use crate::names::resolve::{self, Names};

/// How long accepting waits. Clients that connect meanwhile wait in the kernel's queue.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// How many unresolved names the log line lists.
const MOST_NAMED: usize = 10;

/// Looks the names up, and waits for `redis_read`, which is `None` where no Redis is configured.
pub(super) async fn wait(
    pools: &[PoolHandle],
    names: &mut [Names],
    redis_read: Option<oneshot::Receiver<()>>,
) {
    let mut is_read = redis_read.is_none();
    let first_look = async {
        let redis = async {
            if let Some(redis_read) = redis_read {
                // Always an error: nothing is sent, and the sender is dropped after the first read.
                let _ = redis_read.await;
                is_read = true;
            }
        };
        // The configured names are looked up at once, so that a Redis that hangs does not use up their time.
        tokio::join!(redis, resolve::settle(names));
        // Then the names that came with Redis's answer.
        resolve::settle(names).await;
    };
    if timeout(FIRST_LOOK, first_look).await.is_err() {
        warn_of_missing(pools, is_read);
    }
}

fn warn_of_missing(pools: &[PoolHandle], redis_is_read: bool) {
    let mut unresolved = Vec::new();
    for pool in pools {
        let snapshot = pool.pool().cell.load();
        let members = snapshot.members().iter().filter(|member| !member.backend.is_reachable());
        unresolved.extend(members.map(|member| member.backend.id().to_string()));
    }
    let (count, redis) = (unresolved.len(), if redis_is_read { "answered" } else { "no answer yet" });
    unresolved.truncate(MOST_NAMED);
    let named = unresolved.join(", ");
    warn!(
        redis, unresolved = count, names = named, waited = ?FIRST_LOOK,
        "starting without redis's weights, or without the addresses of some names"
    );
}
