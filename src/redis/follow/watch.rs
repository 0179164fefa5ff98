//! Hears of changes in Redis, for as long as the process lives, over one connection after the other.
//!
//! Where sentinels name the primary, the connection is left as soon as they name another. In a cluster each node that owns
//! a pool's key has a connection.
//!
//! On each connection: subscribe and track (`mode.rs`), wait for the confirmations, *then* read, so that no change falls
//! between. After that a heartbeat proves that the connection still delivers, and a full read every `resync_interval` mends
//! what nothing told of (SWAPDB tells nobody), and proves the mode again.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::{ErrorKind, PushInfo, PushKind, RedisError, Value};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::changes::{Cause, Changes, changed};
use super::event_rest::Longest;
use super::mode::{Armed, Warned};
use super::sync::Syncer;
use crate::config::{Redis, RedisAddress};
use crate::control::backoff::{Backoff, jittered, spread};
use crate::redis::schema::followed::Followed;
use crate::redis::status::{RedisStatus, WatchMode, Watching};
use crate::redis::topology::parts::Parts;
use crate::redis::topology::parts::{self, Part};
use crate::redis::topology::primary::Primary;
use crate::redis::topology::{cluster, sentinel};
use crate::redis::wire::connection::{self, Server};
use crate::redis::wire::error::Trouble;
use crate::redis::wire::reconnect::{FIRST_PAUSE, LONGEST_MOVE, LONGEST_PAUSE};

/// Between two tries at a server that loads its data, at most: when it has, everybody reads.
const LONGEST_LOADING_PAUSE: Duration = Duration::from_millis(400);

/// Follows the tables of `followed` until it is dropped. `first_try_over` is called when each pool's first connection has
/// read its table, or failed.
pub async fn run(
    settings: &Arc<Redis>,
    followed: &Arc<[Followed]>,
    parts: &Parts,
    status: &Arc<RedisStatus>,
    first_try_over: impl FnOnce() + Send + 'static,
) {
    let tries = Arc::new(Tries::new(followed.len(), first_try_over));
    let following = parts::each(parts.read(), std::future::pending(), |part| {
        let (settings, followed) = (Arc::clone(settings), part.of(followed));
        let (status, tries) = (Arc::clone(status), Arc::clone(&tries));
        async move {
            let longest = Longest::new(settings.heartbeat_interval, settings.resync_interval);
            let syncer = Syncer::new(&followed, settings.on_empty, longest, &status);
            let scene = Scene { settings: &settings, followed: &followed, part: &part, status: &status };
            follow_tables(scene, syncer, &tries).await;
        }
    });
    // Two halves of one task: neither ends, and they are dropped together.
    match &settings.address {
        RedisAddress::Sentinel(nodes) => {
            let named = parts.read().borrow().first().map(Arc::clone);
            let Some(part) = named else { return };
            tokio::join!(following, sentinel::follow(settings, nodes, &part.primary));
        }
        RedisAddress::Cluster(nodes) => {
            tokio::join!(following, cluster::follow(settings, nodes, followed, parts, status));
        }
        _ => following.await,
    }
}

/// What each pool has behind it, whichever connection it was on.
struct Tries {
    inner: Mutex<TriesInner>,
}

struct TriesInner {
    /// By pool: read once, or failed.
    are_over: Vec<bool>,
    /// By pool: connected once.
    were_connected: Vec<bool>,
    when_over: Option<Box<dyn FnOnce() + Send>>,
}

impl Tries {
    fn new(pools: usize, when_over: impl FnOnce() + Send + 'static) -> Self {
        let (are_over, were_connected) = (vec![false; pools], vec![false; pools]);
        Self {
            inner: Mutex::new(TriesInner { are_over, were_connected, when_over: Some(Box::new(when_over)) }),
        }
    }

    /// The first try at these is over. When all are, that is told, once.
    fn over(&self, places: &[usize]) {
        let mut inner = self.inner();
        places.iter().for_each(|place| inner.are_over[*place] = true);
        if inner.are_over.iter().all(|over| *over)
            && let Some(when_over) = inner.when_over.take()
        {
            when_over();
        }
    }

    /// These are connected; true where one of them was before.
    fn connected(&self, places: &[usize]) -> bool {
        let mut inner = self.inner();
        let again = places.iter().any(|place| inner.were_connected[*place]);
        places.iter().for_each(|place| inner.were_connected[*place] = true);
        again
    }

    fn inner(&self) -> MutexGuard<'_, TriesInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all connections of one part have in common.
#[derive(Clone, Copy)]
struct Scene<'a> {
    settings: &'a Redis,
    followed: &'a [Followed],
    part: &'a Part,
    status: &'a Arc<RedisStatus>,
}

async fn follow_tables(scene: Scene<'_>, mut syncer: Syncer<'_>, tries: &Tries) {
    let Scene { settings, part, status, .. } = scene;
    let (primary, watching) = (&part.primary, status.watch());
    let mut first_try_over = Some(|| tries.over(&part.places));
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut last_error: Option<String> = None;
    let mut warned = Warned::default();
    let mut was_sent_on = false;
    let mut is_news = true;
    loop {
        let address = known(settings, primary).await;
        let redis = address.as_ref().unwrap_or(&settings.address);
        let watch = Connection { scene, address: redis, watching: &watching, is_news };
        // In the middle of whatever is waited for: it may be a server that is frozen.
        let moved = || async {
            primary.moved_from(redis).await;
            RedisError::from(Trouble::Moved)
        };
        let opened = match &address {
            Some(_) => tokio::select! {
                biased;
                error = moved() => Err(error),
                opened = watch.open() => opened,
            },
            None => Err(Trouble::NoPrimary.into()),
        };
        let error = match opened {
            Ok(opened) => {
                if tries.connected(&part.places) {
                    status.reconnects.add(1);
                }
                let begun = Instant::now();
                let error = tokio::select! {
                    biased;
                    error = moved() => error,
                    error = watch.follow(opened, &mut syncer, &mut warned, &mut first_try_over) => error,
                };
                // A server that takes connections and drops them at once is not asked twenty times a second.
                if begun.elapsed() > LONGEST_PAUSE {
                    backoff.reset();
                }
                // Of an answer that is too large, the pool's line has said it.
                let is_told = connection::is_move(&error)
                    || connection::is_elsewhere(&error)
                    || connection::is_too_large(&error);
                if watching.is_up() && !is_told {
                    warn!(
                        %redis, %error,
                        "redis lost, picking from the last snapshots: it is tried again until it works"
                    );
                    last_error = Some(error.to_string());
                }
                error
            }
            Err(error) => error,
        };
        if connection::is_move(&error) {
            info!(left = %redis, "the primary is elsewhere");
            backoff.reset();
            sleep(spread(LONGEST_MOVE)).await;
            continue;
        }
        watching.set(WatchMode::None);
        primary.is_lost();
        // Whoever follows the cluster has heard of it, and divides anew. Only where it stays so, somebody has to know.
        if connection::is_elsewhere(&error) && !std::mem::replace(&mut was_sent_on, true) {
            debug!(left = %redis, %error, "a node sends us on");
            sleep(backoff.pause()).await;
            continue;
        }
        if let Some(over) = first_try_over.take() {
            over();
        }
        // Once for each new reason, not once for each try.
        let text = error.to_string();
        is_news = !connection::is_too_large(&error);
        if is_news && last_error.as_ref() != Some(&text) {
            let cure = connection::cure(&error);
            warn!(%redis, error = text, cure, "cannot watch redis");
            last_error = Some(text);
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

/// True where a keyspace notification tells of a read that found no key, which changes nothing: the server sends it where
/// `notify-keyspace-events` has the flag `m`, also for our own reads. Every other event only means that the key is to be
/// read.
fn is_of_a_read(message: &[Value]) -> bool {
    matches!(message.get(1), Some(Value::BulkString(event)) if event == b"keymiss")
}

/// What `Changes` knows a key by. Tracking knows no databases: the same key in another one costs a read.
fn channels_of(database: u32) -> impl Fn(&[u8]) -> Vec<u8> {
    let prefix = format!("__keyspace@{database}__:").into_bytes();
    move |key| [&prefix, key].concat()
}

/// Where it is. `None`: the sentinels have been asked for as long as a connection may take, and a beat longer, and named
/// nobody.
async fn known(settings: &Redis, primary: &Primary) -> Option<RedisAddress> {
    let patience = settings.connect_timeout + settings.response_timeout + settings.heartbeat_interval;
    timeout(patience, primary.known()).await.ok()
}

struct Connection<'a> {
    scene: Scene<'a>,
    address: &'a RedisAddress,
    watching: &'a Watching,
    /// That it is connected. Not where the one before it ended over a table that is too large, of which the pool's line told.
    is_news: bool,
}

/// A connection that answers.
struct Opened {
    connection: connection::Connection,
    changes: Arc<Changes>,
    lost: Arc<AtomicBool>,
    server: Server,
}

impl Connection<'_> {
    async fn open(&self) -> Result<Opened, RedisError> {
        let Scene { settings, followed, part, status } = self.scene;
        let changes = Arc::new(Changes::new(followed, settings.database));
        let lost = Arc::new(AtomicBool::new(false));
        let on_push = {
            let (changes, lost, status) = (Arc::clone(&changes), Arc::clone(&lost), Arc::clone(status));
            let (mode, channel_of) = (self.watching.mode(), channels_of(settings.database));
            move |push: PushInfo| match (push.kind, push.data.first()) {
                (PushKind::Message, Some(Value::BulkString(channel)))
                    if !is_of_a_read(&push.data) && changes.notice(channel, Cause::Notified) =>
                {
                    status.notifications.add(1);
                }
                (PushKind::Invalidate, Some(Value::Array(keys))) => {
                    for key in keys {
                        // Where the same change is told twice, it is counted once.
                        if let Value::BulkString(key) = key
                            && changes.notice(&channel_of(key), Cause::Invalidated)
                            && mode.get() == WatchMode::Tracking
                        {
                            status.notifications.add(1);
                        }
                    }
                }
                // Everything is gone: FLUSHALL, FLUSHDB, or a replica that is filled anew.
                (PushKind::Invalidate, _) => changes.notice_all(Cause::Flushed),
                (PushKind::Disconnection, _) => {
                    lost.store(true, Relaxed);
                    changes.noticed.notify_one();
                }
                _ => {}
            }
        };
        let mut connection = part.primary.open(settings, self.address, on_push).await?;
        let server = connection::hello(&mut connection).await?;
        part.primary.check(&server)?;
        Ok(Opened { connection, changes, lost, server })
    }

    /// Follows until the connection is of no use any more; says why.
    async fn follow(
        &self,
        opened: Opened,
        syncer: &mut Syncer<'_>,
        warned: &mut Warned,
        first_try_over: &mut Option<impl FnOnce()>,
    ) -> RedisError {
        match self.follow_on(opened, syncer, warned, first_try_over).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn follow_on(
        &self,
        opened: Opened,
        syncer: &mut Syncer<'_>,
        warned: &mut Warned,
        first_try_over: &mut Option<impl FnOnce()>,
    ) -> Result<std::convert::Infallible, RedisError> {
        let Opened { mut connection, changes, lost, server } = opened;
        let Scene { settings, part, .. } = self.scene;
        let mut armed = Armed::new(settings, &changes);
        let mut mode = armed.prove(&mut connection, warned).await?;
        self.watching.set(mode);
        syncer.watch_by(armed.told_by(mode));
        if self.is_news {
            info!(redis = %self.address, version = server.version, role = server.role, watch = mode.name(), "connected to redis");
        }

        changes.notice_all(Cause::Missed);
        let mut heartbeat = Instant::now() + jittered(settings.heartbeat_interval);
        let mut resync = Instant::now() + jittered(settings.resync_interval);
        let mut told_to_wait = false;
        let mut poll = Instant::now() + jittered(settings.poll_interval);
        loop {
            let rest_ends = match syncer.read_changed(&connection, &changes).await {
                Ok(next) => next,
                Err(error) if connection::is_not_ready(&error) => {
                    if !std::mem::replace(&mut told_to_wait, true) {
                        let cure = connection::cure(&error);
                        warn!(redis = %self.address, %error, cure, "redis is not ready to be read");
                    }
                    sleep(spread(LONGEST_LOADING_PAUSE)).await;
                    connection::hello(&mut connection).await.or_else(|e| {
                        if connection::is_not_ready(&e) { Ok(Server::default()) } else { Err(e) }
                    })?;
                    changes.notice_all(Cause::Missed);
                    continue;
                }
                Err(error) => return Err(error),
            };
            // Whatever was found: a key that is refused now may be refused for hours.
            if syncer.has_tried_all()
                && let Some(over) = first_try_over.take()
            {
                over();
            }
            if lost.load(Relaxed) {
                return Err(RedisError::from((ErrorKind::Io, "the connection was closed")));
            }
            // Changes come last: a flood of them must not keep the clocks from their turn.
            tokio::select! {
                biased;
                () = sleep_until(heartbeat) => {
                    let asked = Instant::now();
                    part.primary.check(&connection::hello(&mut connection).await?)?;
                    // What told of a change before this answer came before it.
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
                    // The flags, or what this user may do, may have been changed by someone else meanwhile.
                    let now = armed.prove(&mut connection, warned).await?;
                    let mut cause = Cause::Due;
                    if now != mode {
                        info!(watch = now.name(), "changes are noticed in another way now");
                        (mode, poll) = (now, Instant::now());
                        self.watching.set(mode);
                        syncer.watch_by(armed.told_by(mode));
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
