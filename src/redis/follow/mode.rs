//! How changes can be noticed on one connection: what the server agreed to, and what is known of its
//! settings.
//!
//! `auto` arms notifications *and* tracking where both are to be had. Either alone tells of every write;
//! together they also tell of FLUSHALL, FLUSHDB and a replica's full resync, of which notifications say
//! nothing, and of changes in the time between someone's switching notifications off and the next look at
//! the flags. Both come in the same packet, so they cost one read. Only SWAPDB is told by neither.
//!
//! Tracking is the plain kind, not BCAST: the server remembers what this connection read, and tells once
//! when that changes, which is when it is read again. Broadcasts go by prefixes, which may not overlap
//! (pools `web` and `web2`), and tell of every key of others that begins so.

use redis::Value;
use tracing::{info, warn};

use super::changes::Changes;
use super::flags;
use crate::config::{Redis, Watch};
use crate::redis::status::WatchMode;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// Channels named in one line.
const MOST_NAMED: usize = 3;
/// Channels subscribed to by one command: the confirmations have some 100 bytes each.
const CHANNELS_AT_ONCE: usize = 64;

/// What was warned of, so that a reconnect does not repeat it.
#[derive(Debug, Default)]
pub(in crate::redis) struct Warned {
    polling: bool,
    states: bool,
}

/// What one connection is told of.
#[derive(Debug)]
pub(in crate::redis) struct Armed<'a> {
    settings: &'a Redis,
    changes: &'a Changes,
    subscription: Way,
    /// Of the subscription: the channels of admin states.
    states: Way,
    tracking: Way,
}

/// One way of being told.
#[derive(Debug)]
enum Way {
    /// Nobody wants it.
    Unused,
    /// To be tried.
    Wanted,
    /// The server agreed; that holds as long as the connection.
    Agreed,
    Refused(RedisError),
}

impl Way {
    fn wanted(is_wanted: bool) -> Self {
        if is_wanted { Self::Wanted } else { Self::Unused }
    }

    fn is_to_be_tried(&self) -> bool {
        matches!(self, Self::Wanted | Self::Refused(_))
    }

    /// # Errors
    /// Those that are no refusal.
    fn from(result: Result<(), RedisError>) -> Result<Self, RedisError> {
        match result {
            Ok(()) => Ok(Self::Agreed),
            Err(error) if error.is_refusal() => Ok(Self::Refused(error)),
            Err(error) => Err(error),
        }
    }
}

impl<'a> Armed<'a> {
    /// Nothing is armed before [`Armed::prove`].
    pub(in crate::redis) fn new(settings: &'a Redis, changes: &'a Changes) -> Self {
        Self {
            settings,
            changes,
            // Where changes are polled, a subscription costs nothing and may help.
            subscription: Way::wanted(settings.watch != Watch::Tracking),
            states: Way::Wanted,
            tracking: Way::wanted(matches!(settings.watch, Watch::Auto | Watch::Tracking)),
        }
    }

    /// Asks for what is wanted and was not agreed to yet, waits for the answers, and finds out how changes
    /// are noticed from now on. To be followed by a whole read.
    ///
    /// # Errors
    /// The connection is of no use: it broke, or it has to be notified and may not subscribe.
    pub(in crate::redis) async fn prove(
        &mut self,
        connection: &mut RoutedConnection,
        warned: &mut Warned,
    ) -> Result<WatchMode, RedisError> {
        if self.subscription.is_to_be_tried() {
            self.subscription = Way::from(subscribe(connection, self.changes.channels()).await)?;
        }
        if self.tracking.is_to_be_tried() {
            self.tracking = Way::from(track(connection).await)?;
        }
        self.hear_of_states(connection, warned).await?;
        let mode = match self.settings.watch {
            Watch::Poll => return Ok(WatchMode::Poll),
            Watch::Tracking => self.tracks().map(|()| WatchMode::Tracking),
            Watch::Notifications => self.is_notified(connection).await?.map(|()| WatchMode::Notifications),
            Watch::Auto => match (self.is_notified(connection).await?, self.tracks()) {
                (Ok(()), _) => Ok(WatchMode::Notifications),
                (Err(_), Ok(())) => Ok(WatchMode::Tracking),
                (Err(no_events), Err(no_tracking)) => Err(format!("{no_events}; {no_tracking}")),
            },
        };
        let polling = mode.is_err();
        if let Err(reason) = &mode
            && !warned.polling
        {
            warn!(reason, poll_interval = ?self.settings.poll_interval, "redis does not tell of changes, polling");
        }
        warned.polling = polling;
        Ok(mode.unwrap_or(WatchMode::Poll))
    }

    /// Admin states have channels of their own: who may not hear them, and does not track either, sees a
    /// change of them with the next whole read.
    async fn hear_of_states(
        &mut self,
        connection: &mut RoutedConnection,
        warned: &mut Warned,
    ) -> Result<(), RedisError> {
        if !matches!(self.subscription, Way::Agreed) || matches!(self.states, Way::Agreed) {
            return Ok(());
        }
        self.states = Way::from(subscribe(connection, self.changes.channels_of_states()).await)?;
        let is_deaf = matches!(self.states, Way::Refused(_)) && !matches!(self.tracking, Way::Agreed);
        if let Way::Refused(error) = &self.states
            && is_deaf
            && !warned.states
        {
            let channels = self.changes.channels_of_states().map(String::from_utf8_lossy);
            let missing: Vec<_> = channels.take(MOST_NAMED).map(|channel| format!("&{channel}")).collect();
            warn!(
                %error, resync_interval = ?self.settings.resync_interval,
                "a change of who is in drain or maint shows with the next whole read: grant {}", missing.join(" ")
            );
        }
        warned.states = is_deaf;
        Ok(())
    }

    /// The way that `mode` may be relied on for all that is read. A user who may not hear the channels of
    /// admin states hears of them by tracking alone, whatever is known of the weights.
    pub(in crate::redis) fn told_by(&self, mode: WatchMode) -> WatchMode {
        match mode {
            WatchMode::Notifications if !matches!(self.states, Way::Agreed) => WatchMode::Tracking,
            mode => mode,
        }
    }

    /// Says why it does not, with a cure.
    fn tracks(&self) -> Result<(), String> {
        match &self.tracking {
            Way::Refused(error) => {
                Err(format!("redis refuses CLIENT TRACKING ({error}): grant +client|tracking"))
            }
            Way::Agreed | Way::Wanted | Way::Unused => Ok(()),
        }
    }

    /// Switches notifications on where that is allowed. The inner error says why there are none, with a
    /// cure.
    async fn is_notified(&self, connection: &mut RoutedConnection) -> Result<Result<(), String>, RedisError> {
        let is_told_so = self.settings.watch == Watch::Notifications;
        if let Way::Refused(error) = &self.subscription {
            if is_told_so {
                return Err(error.clone());
            }
            return Ok(Err(format!("redis refuses to subscribe ({error}): grant the ACL user the channels")));
        }
        match self.missing_flags(connection).await {
            Ok(missing) if missing.is_empty() => Ok(Ok(())),
            Ok(missing) => Ok(Err(format!(
                "notify-keyspace-events lacks \"{missing}\": CONFIG SET it, or set redis.manage_notifications: true"
            ))),
            Err(error) if error.is_refusal() && is_told_so => Ok(Ok(())),
            Err(error) if error.is_refusal() => Ok(Err(format!(
                "the server does not show its notify-keyspace-events ({error}): if they are on, set redis.watch: \
                 notifications"
            ))),
            Err(error) => Err(error),
        }
    }

    /// What the server lacks of the events that are needed, after adding it where that is allowed.
    async fn missing_flags(&self, connection: &mut RoutedConnection) -> Result<String, RedisError> {
        let missing = flags::missing(&read_flags(connection).await?);
        if missing.is_empty() || !self.settings.manage_notifications {
            return Ok(missing);
        }
        let all = read_flags(connection).await? + &missing;
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg("notify-keyspace-events").arg(&all);
        match connection.query::<Value>(&set).await {
            Ok(_) => info!(flags = all, "switched keyspace notifications on"),
            Err(error) if error.is_refusal() => {
                warn!(%error, "redis refused to switch keyspace notifications on");
            }
            Err(error) => return Err(error),
        }
        Ok(flags::missing(&read_flags(connection).await?))
    }
}

/// Subscribes to `channels` and waits for the confirmations. Many at once: nothing is confirmed before all
/// are heard, so that the time must not grow with pools × round trip.
async fn subscribe(
    connection: &mut RoutedConnection,
    channels: impl Iterator<Item = &[u8]>,
) -> Result<(), RedisError> {
    let channels: Vec<&[u8]> = channels.collect();
    for some in channels.chunks(CHANNELS_AT_ONCE) {
        connection.subscribe(some).await?;
    }
    Ok(())
}

async fn track(connection: &mut RoutedConnection) -> Result<(), RedisError> {
    connection.query(redis::cmd("CLIENT").arg("TRACKING").arg("ON")).await
}

async fn read_flags(connection: &mut RoutedConnection) -> Result<String, RedisError> {
    let mut get = redis::cmd("CONFIG");
    get.arg("GET").arg("notify-keyspace-events");
    let flags: Vec<(String, String)> = connection.query(&get).await?;
    Ok(flags.into_iter().next().unwrap_or_default().1)
}
