//! Follows the tables in Redis until it is dropped, and reconnects whenever a connection ends.
//!
//! Each shard has one connection: to the one Redis, to the primary that sentinels name, or to a node of a
//! cluster that serves a pool's key. If sentinels name another primary, the connection to the old one is
//! closed at once.
//! What happens on one connection is in `subscription.rs`.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::event_rest::Longest;
use super::first_reads::FirstReads;
use super::mode::Warned;
use super::subscription::{Subscriber, Watcher};
use super::sync::Syncer;
use crate::config::{Redis, RedisAddress};
use crate::control::backoff::{Backoff, spread};
use crate::fault;
use crate::redis::schema::followed::Followed;
use crate::redis::status::{RedisStatus, WatchMode};
use crate::redis::topology::primary::Primary;
use crate::redis::topology::shards::{self, Shards};
use crate::redis::topology::{cluster, sentinel};
use crate::redis::wire::error::RedisError;
use crate::redis::wire::reconnect::{FIRST_PAUSE, LONGEST_MOVE, LONGEST_PAUSE};

/// The task of a watching connection has hung, which is a defect.
#[derive(Debug, thiserror::Error)]
#[error("it hung: it waited for longer than {0:?} for a connection, a table or a heartbeat")]
pub struct Hung(Duration);

/// Follows the tables of `followed` until it is dropped. `first_try_over` is called once, when the first
/// attempt to read the table of each pool has succeeded or failed.
///
/// # Errors
/// [`Hung`] if a watching connection's task has begun no round for the time limit.
pub async fn run(
    settings: &Arc<Redis>,
    followed: &Arc<[Followed]>,
    shards: &Shards,
    status: &Arc<RedisStatus>,
    first_try_over: impl FnOnce() + Send + 'static,
) -> Result<(), Hung> {
    // A round waits for a connection, an answer or a heartbeat a few times at most.
    let limit = 10 * (settings.connect_timeout + settings.response_timeout + settings.heartbeat_interval);
    tokio::select! {
        () = follow(settings, followed, shards, status, first_try_over) => Ok(()),
        () = status.hangs(limit) => Err(Hung(limit)),
    }
}

async fn follow(
    settings: &Arc<Redis>,
    followed: &Arc<[Followed]>,
    shards: &Shards,
    status: &Arc<RedisStatus>,
    first_try_over: impl FnOnce() + Send + 'static,
) {
    let first_reads = Arc::new(FirstReads::new(followed, first_try_over));
    let following = shards::each(shards.read(), std::future::pending(), |shard| {
        let (settings, status) = (Arc::clone(settings), Arc::clone(status));
        let first_reads = Arc::clone(&first_reads);
        async move {
            let longest = Longest::new(settings.heartbeat_interval, settings.resync_interval);
            let syncer = Syncer::new(&shard.pools, settings.on_empty, longest, &status);
            let watcher = Watcher { settings: &settings, shard: &shard, status: &status };
            follow_tables(watcher, syncer, &first_reads).await;
        }
    });
    // Two halves of one task: neither ends, and they are dropped together.
    match &settings.address {
        RedisAddress::Sentinel(nodes) => {
            let only = shards.read().borrow().first().map(Arc::clone);
            let Some(shard) = only else { return };
            tokio::join!(following, sentinel::follow(settings, nodes, &shard.primary));
        }
        RedisAddress::Cluster(nodes) => {
            tokio::join!(following, cluster::follow(settings, nodes, followed, shards, status));
        }
        _ => following.await,
    }
}

async fn follow_tables(watcher: Watcher<'_>, mut syncer: Syncer<'_>, first_reads: &FirstReads) {
    let Watcher { settings, shard, status } = watcher;
    let (primary, watching) = (&shard.primary, status.watch());
    let mut first_try_over = Some(|| first_reads.over(&shard.pools));
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    // What was logged last, so that each further attempt does not repeat it.
    let mut last_logged: Option<String> = None;
    let mut warned = Warned::default();
    let mut was_redirected = false;
    let mut logs_connect = true;
    loop {
        watching.begins_round();
        fault::hang("watch_redis", "").await;
        let address = known(settings, primary).await;
        let redis = address.as_ref().unwrap_or(&settings.address);
        let subscriber = Subscriber { watcher, address: redis, watching: &watching, logs_connect };
        // A new primary ends the waits for the old one, which may be frozen.
        let moved = || async {
            primary.moved_from(redis).await;
            RedisError::PrimaryMoved
        };
        let opened = match &address {
            Some(_) => tokio::select! {
                biased;
                error = moved() => Err(error),
                opened = subscriber.open() => opened,
            },
            None => Err(RedisError::NoPrimary),
        };
        let was_connected = opened.is_ok();
        let error = match opened {
            Ok(opened) => {
                if first_reads.connected(&shard.pools) {
                    status.reconnects.add(1);
                }
                let begun = Instant::now();
                let error = tokio::select! {
                    biased;
                    error = moved() => error,
                    error = subscriber.follow(opened, &mut syncer, &mut warned, &mut first_try_over) => error,
                };
                // The backoff is reset only after a connection that lasted, so that a server which drops its
                // connections at once is not asked twenty times a second.
                if begun.elapsed() > LONGEST_PAUSE {
                    backoff.reset();
                }
                if watching.is_up() && !is_logged_elsewhere(&error) {
                    warn!(
                        %redis, %error,
                        "connection to redis lost, picking from the last snapshots: it is tried again \
                         until it works"
                    );
                    last_logged = Some(error.to_string());
                }
                error
            }
            Err(error) => error,
        };
        if matches!(error, RedisError::PrimaryMoved) {
            info!(left = %redis, "the primary is elsewhere");
            backoff.reset();
            sleep(spread(LONGEST_MOVE)).await;
            continue;
        }
        watching.set(WatchMode::None);
        primary.report_lost();
        // The task that follows the cluster assigns the pools anew. So the first redirection of this shard
        // is not warned of; any later one is.
        if matches!(error, RedisError::Redirected(_)) && !std::mem::replace(&mut was_redirected, true) {
            debug!(left = %redis, %error, "cluster node redirected us");
            sleep(backoff.pause()).await;
            continue;
        }
        if let Some(over) = first_try_over.take() {
            over();
        }
        // Logged once for each new reason, not once for each attempt.
        let text = error.to_string();
        logs_connect = !error.is_too_large();
        if logs_connect && last_logged.as_ref() != Some(&text) {
            let cure = error.cure();
            if was_connected {
                warn!(%redis, error = text, cure, "cannot follow redis, retrying");
            } else {
                warn!(%redis, error = text, cure, "cannot connect to redis, retrying");
            }
            last_logged = Some(text);
        }
        tokio::select! {
            () = primary.moved_from(redis) => {
                backoff.reset();
                sleep(spread(LONGEST_MOVE)).await;
            }
            () = sleep(backoff.pause()) => {}
        }
    }
}

/// Returns true for an error that has a log line of its own: the caller logs a move of the primary and a
/// redirection, and the syncer logs an answer that is too large.
fn is_logged_elsewhere(error: &RedisError) -> bool {
    matches!(error, RedisError::PrimaryMoved | RedisError::Redirected(_)) || error.is_too_large()
}

/// Returns the address of the primary, which sentinels may still have to name. Returns `None` if it is not
/// known after the time limits of a connection and an answer, and one heartbeat interval.
async fn known(settings: &Redis, primary: &Primary) -> Option<RedisAddress> {
    let patience = settings.connect_timeout + settings.response_timeout + settings.heartbeat_interval;
    timeout(patience, primary.known()).await.ok()
}
