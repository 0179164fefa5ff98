//! Finds out which watch mode works on one connection, by the server's answers and its settings.
//!
//! `auto` asks for notifications *and* tracking where both are available. Either alone announces every
//! write. Tracking also announces FLUSHALL, FLUSHDB and a replica's full resync, for which there are no
//! notifications. If another client switches notifications off, tracking still announces changes until the
//! next look at the flags. Both messages come in the same packet, so they cost one read. SWAPDB is announced
//! by neither.
//!
//! Tracking is used in its default mode, not in BCAST mode. The server remembers which keys this connection
//! has read and announces the first change of each key; the read that follows makes it remember the key
//! again. BCAST works by prefixes, which may not overlap (pools `web` and `web2`), and announces every key
//! of other programs with the same prefix.

use redis::Value;
use tracing::{info, warn};

use super::changes::Changes;
use super::flags;
use crate::config::{Redis, Watch};
use crate::redis::status::WatchMode;
use crate::redis::topology::routed::RoutedConnection;
use crate::redis::wire::error::RedisError;

/// Channels named in one log line.
const MOST_NAMED: usize = 3;
/// Channels in one SUBSCRIBE. A confirmation has some 100 bytes for each.
const CHANNELS_AT_ONCE: usize = 64;

/// The warnings that were logged, so that a reconnect does not repeat them.
#[derive(Debug, Default)]
pub(super) struct Warned {
    polling: bool,
    states: bool,
}

/// What one connection has asked the server for, and what the server agreed to.
#[derive(Debug)]
pub(super) struct Armed<'a> {
    settings: &'a Redis,
    changes: &'a Changes,
    subscription: Mechanism,
    /// The subscription to the channels of admin states.
    states: Mechanism,
    tracking: Mechanism,
}

/// One mechanism by which the server announces changes.
#[derive(Debug)]
enum Mechanism {
    /// The config does not ask for it.
    Unused,
    /// The server was not asked yet.
    Wanted,
    /// The server agreed. The agreement lasts until the connection ends.
    Agreed,
    Refused(RedisError),
}

impl Mechanism {
    fn wanted(is_wanted: bool) -> Self {
        if is_wanted { Self::Wanted } else { Self::Unused }
    }

    fn is_to_be_tried(&self) -> bool {
        matches!(self, Self::Wanted | Self::Refused(_))
    }

    /// # Errors
    /// The connection is of no use any more. A refusal is no error here.
    fn from(result: Result<(), RedisError>) -> Result<Self, RedisError> {
        match result {
            Ok(()) => Ok(Self::Agreed),
            Err(error) if error.is_refusal() => Ok(Self::Refused(error)),
            Err(error) => Err(error),
        }
    }
}

impl<'a> Armed<'a> {
    /// Notes what the config asks for. [`Armed::prove`] asks the server.
    pub(super) fn new(settings: &'a Redis, changes: &'a Changes) -> Self {
        Self {
            settings,
            changes,
            // Where changes are polled, a subscription costs nothing and may help.
            subscription: Mechanism::wanted(settings.watch != Watch::Tracking),
            states: Mechanism::Wanted,
            tracking: Mechanism::wanted(matches!(settings.watch, Watch::Auto | Watch::Tracking)),
        }
    }

    /// Asks for what the config wants and the server has not agreed to yet, waits for the answers, and
    /// returns the watch mode from now on. The caller has to read all tables afterwards.
    ///
    /// # Errors
    /// The connection is of no use: it broke, or the config demands notifications and the user may not
    /// subscribe.
    pub(super) async fn prove(
        &mut self,
        connection: &mut RoutedConnection,
        warned: &mut Warned,
    ) -> Result<WatchMode, RedisError> {
        if self.subscription.is_to_be_tried() {
            self.subscription = Mechanism::from(subscribe(connection, self.changes.channels()).await)?;
        }
        if self.tracking.is_to_be_tried() {
            self.tracking = Mechanism::from(track(connection).await)?;
        }
        self.subscribe_to_states(connection, warned).await?;
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
            warn!(
                reason, poll_interval = ?self.settings.poll_interval,
                "redis does not announce changes, polling"
            );
        }
        warned.polling = polling;
        Ok(mode.unwrap_or(WatchMode::Poll))
    }

    /// Subscribes to the admin states, which have channels of their own. Without the right to these
    /// channels, and without tracking, a change of a state takes effect with the next full read.
    async fn subscribe_to_states(
        &mut self,
        connection: &mut RoutedConnection,
        warned: &mut Warned,
    ) -> Result<(), RedisError> {
        if !matches!(self.subscription, Mechanism::Agreed) || matches!(self.states, Mechanism::Agreed) {
            return Ok(());
        }
        self.states = Mechanism::from(subscribe(connection, self.changes.channels_of_states()).await)?;
        let is_unannounced =
            matches!(self.states, Mechanism::Refused(_)) && !matches!(self.tracking, Mechanism::Agreed);
        if let Mechanism::Refused(error) = &self.states
            && is_unannounced
            && !warned.states
        {
            let channels = self.changes.channels_of_states().map(String::from_utf8_lossy);
            let missing: Vec<_> = channels.take(MOST_NAMED).map(|channel| format!("&{channel}")).collect();
            warn!(
                %error, resync_interval = ?self.settings.resync_interval,
                "changes of drain and maint take effect with the next full read: grant {}", missing.join(" ")
            );
        }
        warned.states = is_unannounced;
        Ok(())
    }

    /// Returns the mode by which changes of weights *and* admin states are noticed. A user without a right
    /// to the channels of admin states is told of their changes by tracking, even if notifications announce
    /// the weights. If tracking is refused too, only full reads find them.
    pub(super) fn reliable_mode(&self, mode: WatchMode) -> WatchMode {
        match mode {
            WatchMode::Notifications if !matches!(self.states, Mechanism::Agreed) => WatchMode::Tracking,
            mode => mode,
        }
    }

    /// Returns an error if tracking was refused: why it does not work, with a cure.
    fn tracks(&self) -> Result<(), String> {
        match &self.tracking {
            Mechanism::Refused(error) => {
                Err(format!("redis refuses CLIENT TRACKING ({error}): grant +client|tracking"))
            }
            Mechanism::Agreed | Mechanism::Wanted | Mechanism::Unused => Ok(()),
        }
    }

    /// Checks that notifications work, after switching them on where the config allows that. The inner error
    /// says why notifications do not work, with a cure.
    async fn is_notified(&self, connection: &mut RoutedConnection) -> Result<Result<(), String>, RedisError> {
        let is_demanded = self.settings.watch == Watch::Notifications;
        if let Mechanism::Refused(error) = &self.subscription {
            if is_demanded {
                return Err(error.clone());
            }
            return Ok(Err(format!("redis refuses to subscribe ({error}): grant the ACL user the channels")));
        }
        match self.missing_flags(connection).await {
            Ok(missing) if missing.is_empty() => Ok(Ok(())),
            Ok(missing) => Ok(Err(format!(
                "notify-keyspace-events lacks \"{missing}\": CONFIG SET it, or set \
                 redis.manage_notifications: true"
            ))),
            Err(error) if error.is_refusal() && is_demanded => Ok(Ok(())),
            Err(error) if error.is_refusal() => Ok(Err(format!(
                "the server does not show its notify-keyspace-events ({error}): if they are on, set \
                 redis.watch: \
                 notifications"
            ))),
            Err(error) => Err(error),
        }
    }

    /// Returns the flags that the server lacks, after setting them where the config allows that.
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

/// Subscribes to `channels` and waits for the confirmations. One command has many channels, because the
/// watch mode is proved only when all are confirmed, and one round trip for each pool would take too long.
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
