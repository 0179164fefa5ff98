//! A connection to the server that has a pool's key. If the server is a node of a cluster, the connection
//! handles the node's redirections.
//!
//! A node that does not own a key's slot answers MOVED. A node that is migrating a slot answers ASK for
//! the keys that have left it already; the importing node serves these keys only after an ASKING. A
//! connection that follows tables ends after a redirection, and `cluster.rs` finds out where the key is. A
//! connection for single commands sends a redirected command once more, to the named node. A second
//! redirection is an error, so no command is redirected endlessly.

use std::sync::Arc;

use redis::{
    Arg, Cmd, FromRedisValue, Pipeline, PushInfo, ServerErrorKind, ToRedisArgs, Value, from_redis_value,
};
use tokio::sync::mpsc;

use super::redirect::Redirect;
use crate::config::{Redis, RedisAddress};
use crate::redis::wire::connection::{self, Connection, Server};
use crate::redis::wire::error::RedisError;

/// What a connection reports about the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClusterEvent {
    /// A slot's owner has changed, does not answer, is no primary, or says that the cluster is down.
    OwnersChanged,
    /// `key` has migrated to another node before the rest of its slot.
    KeyMigrated { key: String, to: RedisAddress },
    /// The importing `node` does not have these keys any more, or does not answer.
    NotMigrated { keys: Vec<String>, node: RedisAddress },
}

/// A node of a cluster that serves a pool's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyNode {
    pub(super) address: RedisAddress,
    /// The owner of the slot while this node imports it: then each command needs an ASKING.
    pub(super) importing_from: Option<RedisAddress>,
}

/// How a connection to one node of a cluster handles redirections.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) settings: Arc<Redis>,
    pub(super) node: KeyNode,
    /// Sends a command that is redirected to the named node, once.
    pub(super) follows_redirects: bool,
    /// The weights keys that are read over the connection.
    pub(super) keys: Vec<String>,
    /// Where events are reported. `None` for a command that connects, asks and ends.
    pub(super) events: Option<mpsc::Sender<ClusterEvent>>,
}

impl Route {
    /// Reports that the node does not answer, or does not serve the keys.
    pub(super) fn report_lost(&self) {
        self.report_wrong_node(&self.keys);
    }

    fn report_wrong_node(&self, keys: &[String]) {
        self.report(match self.node.importing_from {
            Some(_) => ClusterEvent::NotMigrated { keys: keys.to_vec(), node: self.node.address.clone() },
            None => ClusterEvent::OwnersChanged,
        });
    }

    /// Sends `event` to `cluster.rs`. Where the queue is full the event is dropped: the next attempt
    /// reports it again.
    fn report(&self, event: ClusterEvent) {
        if let Some(events) = &self.events {
            let _ = events.try_send(event);
        }
    }

    /// Sends `command` and returns the answer. Follows one redirection if `follows_redirects` is true.
    async fn answer(&self, connection: &mut Connection, command: &Cmd) -> Result<Value, RedisError> {
        let error = match send(connection, command, self.node.importing_from.is_some()).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let Some(Redirect { to, is_ask }) = Redirect::of(&error, &self.node.address) else {
            // An unserved slot is not reported: `cluster.rs` knows it already, and each pick would report
            // it again.
            let is_down = error.server_kind() == Some(ServerErrorKind::ClusterDown);
            if is_down && error.is_not_ready() {
                self.report_lost();
            }
            return Err(error);
        };
        match self.key_of(command) {
            Some(key) if is_ask => {
                self.report(ClusterEvent::KeyMigrated { key: key.clone(), to: to.clone() })
            }
            // A companion key has migrated, which does not tell where the table is.
            None if is_ask => {}
            key => self.report_wrong_node(key.map(std::slice::from_ref).unwrap_or_default()),
        }
        if !self.follows_redirects {
            return Err(RedisError::Redirected(to.to_string()));
        }
        let mut there = connection::open(&self.settings, &to, |_| {}).await?;
        send(&mut there, command, is_ask).await.map_err(|error| match Redirect::of(&error, &to) {
            Some(Redirect { to, .. }) => RedisError::Redirected(to.to_string()),
            None => error,
        })
    }

    /// Asks the slot's owner whether `key`, which is empty on the importing node, is empty there too: the
    /// owner answers ASK only for a key that it does not have.
    async fn confirm_empty(&self, key: &str) -> Result<(), RedisError> {
        let Some(owner) = &self.node.importing_from else { return Ok(()) };
        let mut connection = connection::open(&self.settings, owner, |_| {}).await?;
        let mut count = Cmd::new();
        count.arg("ZCARD").arg(key);
        match send(&mut connection, &count, false).await {
            Err(error) if Redirect::of(&error, owner).is_some_and(|redirect| redirect.is_ask) => Ok(()),
            _ => Err(RedisError::Redirected(owner.to_string())),
        }
    }

    /// Returns the weights key that `command` reads: the first argument that is one of `keys`. Members
    /// come after the key, so a member with the name of a key does no harm.
    fn key_of(&self, command: &Cmd) -> Option<&String> {
        command.args_iter().find_map(|argument| match argument {
            Arg::Simple(argument) => self.keys.iter().find(|key| key.as_bytes() == argument),
            _ => None,
        })
    }
}

async fn send(connection: &mut Connection, command: &Cmd, with_asking: bool) -> Result<Value, RedisError> {
    if !with_asking {
        return connection.query(command).await;
    }
    // Sent in one piece, because ASKING counts for the next command alone.
    let mut both = Pipeline::with_capacity(2);
    both.cmd("ASKING").add_command(command.clone());
    let answers = connection.answers(&both).await?;
    let Ok([asking, answer]) = <[Value; 2]>::try_from(answers) else {
        return Err(RedisError::unexpected_reply("ASKING was not answered by OK"));
    };
    asking.extract_error()?;
    Ok(answer.extract_error()?)
}

/// A connection to the server that has the keys of some pools.
#[derive(Clone, Debug)]
pub(in crate::redis) struct RoutedConnection {
    connection: Connection,
    /// `None` outside of a cluster.
    route: Option<Arc<Route>>,
}

impl RoutedConnection {
    /// Connects to the server at `address`. Pushed messages go to `on_push`, which must not wait.
    pub(super) async fn open(
        settings: &Redis,
        address: &RedisAddress,
        route: Option<Arc<Route>>,
        on_push: impl Fn(PushInfo) + Send + Sync + 'static,
    ) -> Result<Self, RedisError> {
        Ok(Self { connection: connection::open(settings, address, on_push).await?, route })
    }

    /// Sends `command` and waits for its answer.
    pub(in crate::redis) async fn query<T: FromRedisValue>(
        &mut self,
        command: &Cmd,
    ) -> Result<T, RedisError> {
        match &self.route {
            Some(route) => {
                let answer = route.answer(&mut self.connection, command).await?;
                from_redis_value(answer).map_err(|error| redis::RedisError::from(error).into())
            }
            None => self.connection.query(command).await,
        }
    }

    pub(in crate::redis) async fn subscribe(&mut self, channels: impl ToRedisArgs) -> Result<(), RedisError> {
        self.connection.subscribe(channels).await
    }

    pub(in crate::redis) async fn hello(&mut self) -> Result<Server, RedisError> {
        self.connection.hello().await
    }

    /// True where the node only imports the slot: companion keys that it lacks may still be on the slot's
    /// owner.
    pub(in crate::redis) fn is_importing(&self) -> bool {
        self.route.as_ref().is_some_and(|route| route.node.importing_from.is_some())
    }

    /// Confirms that `key` is empty, after the server has answered so.
    ///
    /// # Errors
    /// The slot's owner may have the key: an importing node does not know a key that has come back to the
    /// owner. Or the owner cannot be asked.
    pub(in crate::redis) async fn confirm_empty(&self, key: &str) -> Result<(), RedisError> {
        match &self.route {
            Some(route) => route.confirm_empty(key).await,
            None => Ok(()),
        }
    }
}
