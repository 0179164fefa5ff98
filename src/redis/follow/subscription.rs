//! One watching connection: from connecting and subscribing until it is lost.
//!
//! The order matters: subscribe and track (`mode.rs`), wait for the confirmations, *then* read, so that no
//! change is missed in between. After that a heartbeat proves that the connection still delivers. A full
//! read every `resync_interval` finds what no event announces (SWAPDB has none), and proves the watch mode
//! again.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use redis::{PushInfo, PushKind, Value};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::changes::{Cause, Changes, changed};
use super::mode::{Armed, Warned};
use super::sync::Syncer;
use crate::config::{Redis, RedisAddress};
use crate::control::backoff::{jittered, spread};
use crate::redis::status::{RedisStatus, WatchMode, Watching};
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::topology::shards::Shard;
use crate::redis::wire::connection::Server;
use crate::redis::wire::error::RedisError;

/// The longest pause between two attempts to read from a server that loads its data. The pause is random,
/// because the whole fleet reads as soon as the data is loaded.
const LONGEST_LOADING_PAUSE: Duration = Duration::from_millis(400);

/// What all watching connections of one shard have in common.
#[derive(Clone, Copy)]
pub(super) struct Watcher<'a> {
    pub(super) settings: &'a Redis,
    pub(super) shard: &'a Shard,
    pub(super) status: &'a Arc<RedisStatus>,
}

/// Makes one watching connection, and follows the tables over it.
pub(super) struct Subscriber<'a> {
    pub(super) watcher: Watcher<'a>,
    pub(super) address: &'a RedisAddress,
    pub(super) watching: &'a Watching,
    /// Whether the new connection is logged. False if the last connection ended because a table is too
    /// large, which has been logged.
    pub(super) logs_connect: bool,
}

/// A connection that has answered HELLO, to a server that is a primary where it has to be one.
pub(super) struct Opened {
    connection: RoutedConnection,
    changes: Arc<Changes>,
    lost: Arc<AtomicBool>,
    server: Server,
}

impl Subscriber<'_> {
    pub(super) async fn open(&self) -> Result<Opened, RedisError> {
        let Watcher { settings, shard, status } = self.watcher;
        let changes = Arc::new(Changes::new(&shard.pools, settings.database));
        let lost = Arc::new(AtomicBool::new(false));
        let on_push = {
            let (changes, lost, status) = (Arc::clone(&changes), Arc::clone(&lost), Arc::clone(status));
            let (mode, channel_of) = (self.watching.mode(), channels_of(settings.database));
            move |push: PushInfo| match (push.kind, push.data.first()) {
                (PushKind::Message, Some(Value::BulkString(channel)))
                    if !is_keymiss(&push.data) && changes.notice(channel, Cause::Notified) =>
                {
                    status.notifications.add(1);
                }
                (PushKind::Invalidate, Some(Value::Array(keys))) => {
                    for key in keys {
                        // In the mode `Notifications`, a notification counts the same change already.
                        if let Value::BulkString(key) = key
                            && changes.notice(&channel_of(key), Cause::Invalidated)
                            && mode.get() == WatchMode::Tracking
                        {
                            status.notifications.add(1);
                        }
                    }
                }
                // An invalidation without keys: FLUSHALL, FLUSHDB, or a full resync of a replica.
                (PushKind::Invalidate, _) => changes.notice_all(Cause::Flushed),
                (PushKind::Disconnection, _) => {
                    lost.store(true, Relaxed);
                    changes.noticed.notify_one();
                }
                _ => {}
            }
        };
        let mut connection = shard.primary.open(settings, self.address, on_push).await?;
        let server = connection.hello().await?;
        shard.primary.check(&server)?;
        Ok(Opened { connection, changes, lost, server })
    }

    /// Follows the tables until the connection is of no use any more; returns why.
    pub(super) async fn follow(
        &self,
        opened: Opened,
        syncer: &mut Syncer<'_>,
        warned: &mut Warned,
        first_try_over: &mut Option<impl FnOnce()>,
    ) -> RedisError {
        let Err(error) = self.try_follow(opened, syncer, warned, first_try_over).await;
        error
    }

    async fn try_follow(
        &self,
        opened: Opened,
        syncer: &mut Syncer<'_>,
        warned: &mut Warned,
        first_try_over: &mut Option<impl FnOnce()>,
    ) -> Result<Infallible, RedisError> {
        let Opened { mut connection, changes, lost, server } = opened;
        let Watcher { settings, shard, .. } = self.watcher;
        let mut armed = Armed::new(settings, &changes);
        let mut mode = armed.prove(&mut connection, warned).await?;
        self.watching.set(mode);
        syncer.watch_by(armed.reliable_mode(mode));
        if self.logs_connect {
            info!(
                redis = %self.address, version = server.version, role = server.role, watch = mode.name(),
                "connected to redis"
            );
        }

        changes.notice_all(Cause::Missed);
        let mut heartbeat = Instant::now() + jittered(settings.heartbeat_interval);
        let mut resync = Instant::now() + jittered(settings.resync_interval);
        let mut warned_not_ready = false;
        let mut poll = Instant::now() + jittered(settings.poll_interval);
        loop {
            self.watching.begins_round();
            let rest_ends = match syncer.read_changed(&connection, &changes).await {
                Ok(next) => next,
                Err(error) if error.is_not_ready() => {
                    if !std::mem::replace(&mut warned_not_ready, true) {
                        let cure = error.cure();
                        warn!(redis = %self.address, %error, cure, "redis is not ready to be read");
                    }
                    sleep(spread(LONGEST_LOADING_PAUSE)).await;
                    if let Err(error) = connection.hello().await
                        && !error.is_not_ready()
                    {
                        return Err(error);
                    }
                    changes.notice_all(Cause::Missed);
                    continue;
                }
                Err(error) => return Err(error),
            };
            // The startup does not wait for a success: a key that is refused now may be refused for hours.
            if syncer.has_tried_all()
                && let Some(over) = first_try_over.take()
            {
                over();
            }
            if lost.load(Relaxed) {
                return Err(RedisError::Closed);
            }
            // Changes come last: a flood of them must not delay the timers.
            tokio::select! {
                biased;
                () = sleep_until(heartbeat) => {
                    let asked = Instant::now();
                    shard.primary.check(&connection.hello().await?)?;
                    // All events that Redis sent before this answer have arrived.
                    if mode != WatchMode::Poll {
                        syncer.confirm(&changes, asked);
                    }
                    heartbeat = Instant::now() + jittered(settings.heartbeat_interval);
                }
                () = sleep_until(poll), if mode == WatchMode::Poll => {
                    changes.notice_all(Cause::Due);
                    poll = Instant::now() + jittered(settings.poll_interval);
                }
                () = sleep_until(resync) => {
                    // The server's flags, or the user's rights, may have been changed meanwhile.
                    let now = armed.prove(&mut connection, warned).await?;
                    let mut cause = Cause::Due;
                    if now != mode {
                        info!(watch = now.name(), "the watch mode has changed");
                        (mode, poll) = (now, Instant::now());
                        self.watching.set(mode);
                        syncer.watch_by(armed.reliable_mode(mode));
                        cause = Cause::Missed;
                    }
                    changes.notice_all(cause);
                    resync = Instant::now() + jittered(settings.resync_interval);
                }
                () = changed(&changes, rest_ends) => {}
            }
        }
    }
}

/// Returns true for the event `keymiss`: a read found no key, which changes nothing. The server sends it if
/// `notify-keyspace-events` has the flag `m`, also for the proxy's own reads. After any other event the key
/// is read.
fn is_keymiss(message: &[Value]) -> bool {
    matches!(message.get(1), Some(Value::BulkString(event)) if event == b"keymiss")
}

/// Returns a function from a key to its notification channel, by which [`Changes`] finds the key's pools.
/// Tracking does not say in which database a key changed, so a change of the same key in another database
/// costs a read.
fn channels_of(database: u32) -> impl Fn(&[u8]) -> Vec<u8> {
    let prefix = format!("__keyspace@{database}__:").into_bytes();
    move |key| [&prefix, key].concat()
}
