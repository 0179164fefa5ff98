//! Opens a connection to Redis: addressed, encrypted where that is wanted, authenticated, on the right database, speaking
//! RESP3, with a deadline on everything and a largest size of an answer.
//!
//! What can go wrong, and its cures, are in `trouble.rs`.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, ProtocolVersion, PushInfo, RedisConnectionInfo, RedisError,
    RedisFuture, RedisResult, Value,
};
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::error::{self, Trouble};
pub(in crate::redis) use super::error::{
    cure, is_elsewhere, is_move, is_no_redis, is_not_ready, is_of_cluster, is_of_rights, is_refusal,
    is_too_large,
};
use super::reply_limit::Limited;
use crate::config::{Redis, RedisAddress, Sentinel, Tls};
use crate::names::lookup;
use crate::redis::topology::redirect::Guide;
use crate::redis::topology::{cluster, sentinel};

/// Silence on the wire before the kernel asks whether the peer is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Lookups of names of servers, of the whole process. Each connection that is being opened has one at most; one whose resolver
/// hangs keeps its place until the system's library gives up.
static LOOKUPS: Semaphore = Semaphore::const_new(32);

/// What a server says of itself in answer to HELLO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::redis) struct Server {
    pub(in crate::redis) version: String,
    pub(in crate::redis) role: String,
}

/// A connection that answers. Its last clone closes it, whatever is still under way on it.
#[derive(Clone, Debug)]
pub(in crate::redis) struct Connection {
    multiplexed: MultiplexedConnection,
    /// Left alone, it would wait for the answers of a server that is frozen.
    _driver: Arc<JoinSet<()>>,
    /// To a node of a cluster.
    guide: Option<Arc<Guide>>,
}

impl Connection {
    /// From now on, what its node answers is understood as `guide` does.
    pub(in crate::redis) fn guided(self, guide: Option<Arc<Guide>>) -> Self {
        Self { guide, ..self }
    }

    /// Its node does not own the slots yet: what it has not of a key, the owner may have.
    pub(in crate::redis) fn is_ahead(&self) -> bool {
        self.guide.as_ref().is_some_and(|guide| guide.ahead_of.is_some())
    }

    /// An empty answer about `key` is the truth, or an error: where the key has come back to the slot's owner, the node that it
    /// had gone ahead to knows nothing of it.
    pub(in crate::redis) async fn is_empty_for_sure(&self, key: &str) -> RedisResult<()> {
        match &self.guide {
            Some(guide) => guide.is_empty_for_sure(key).await,
            None => Ok(()),
        }
    }
}

impl Deref for Connection {
    type Target = MultiplexedConnection;

    fn deref(&self) -> &MultiplexedConnection {
        &self.multiplexed
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut MultiplexedConnection {
        &mut self.multiplexed
    }
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match &self.guide {
            Some(guide) => Box::pin(guide.answer(&mut self.multiplexed, command)),
            None => self.multiplexed.req_packed_command(command),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a redis::Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.multiplexed.req_packed_commands(pipeline, offset, count)
    }

    fn get_db(&self) -> i64 {
        self.multiplexed.get_db()
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Finds the server that has `key`, be it through sentinels or the nodes of a cluster: for commands that ask once and go.
pub(in crate::redis) async fn find(settings: &Redis, key: &str) -> RedisResult<RedisAddress> {
    match &settings.address {
        RedisAddress::Sentinel(sentinel) => sentinel::find(settings, sentinel).await,
        RedisAddress::Cluster(nodes) => cluster::find(settings, nodes, key).await,
        address => Ok(address.clone()),
    }
}

/// Connects to the server that was found.
pub(in crate::redis) async fn open_found(settings: &Redis, found: &RedisAddress) -> RedisResult<Connection> {
    let connection = open_at(settings, found, |_| {}).await?;
    let guide = matches!(settings.address, RedisAddress::Cluster(_)).then(|| {
        let (settings, node) = (Arc::new(settings.clone()), found.clone());
        Arc::new(Guide { settings, node, ahead_of: None, goes: true, keys: Vec::new(), hints: None })
    });
    Ok(connection.guided(guide))
}

/// Connects to the server at `address`. Pushed messages go to `on_push`, which must not wait.
pub(in crate::redis) async fn open_at(
    settings: &Redis,
    address: &RedisAddress,
    on_push: impl Fn(PushInfo) + Send + Sync + 'static,
) -> RedisResult<Connection> {
    let mut identity = identity(settings.username.as_deref(), settings.password.as_ref().map(|p| p.expose()));
    identity = identity.set_db(i64::from(settings.database));
    connect(settings, address, &identity, on_push).await
}

/// Connects to a sentinel, which has users of its own.
pub(in crate::redis) async fn open_sentinel(
    settings: &Redis,
    sentinel: &Sentinel,
    node: &RedisAddress,
    on_push: impl Fn(PushInfo) + Send + Sync + 'static,
) -> RedisResult<Connection> {
    let password = sentinel.password.as_ref().map(|password| password.expose());
    connect(settings, node, &identity(sentinel.username.as_deref(), password), on_push).await
}

fn identity(username: Option<&str>, password: Option<&str>) -> RedisConnectionInfo {
    let mut identity = RedisConnectionInfo::default()
        .set_protocol(ProtocolVersion::RESP3)
        // CLIENT SETINFO is unknown to Redis 7.0 and would be refused to a user of few rights.
        .set_skip_set_lib_name();
    if let Some(username) = username {
        identity = identity.set_username(username);
    }
    if let Some(password) = password {
        identity = identity.set_password(password);
    }
    identity
}

async fn connect(
    settings: &Redis,
    address: &RedisAddress,
    identity: &RedisConnectionInfo,
    on_push: impl Fn(PushInfo) + Send + Sync + 'static,
) -> RedisResult<Connection> {
    let deadline = Instant::now() + settings.connect_timeout + settings.response_timeout;
    let stream = Limited::new(stream(settings, address, deadline).await?);
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(Some(settings.response_timeout))
        .set_push_sender(move |push| -> Result<(), redis::aio::SendError> {
            on_push(push);
            Ok(())
        });
    // HELLO, AUTH and SELECT; the library has no deadline for them.
    let greeting = MultiplexedConnection::new_with_config(identity, stream, config);
    let (multiplexed, driver) = match timeout_at(deadline, greeting).await {
        Ok(Err(error)) if error.is_connection_dropped() && matches!(address, RedisAddress::Tcp { .. }) => {
            return Err(Trouble::ClosedAtOnce.into());
        }
        // One for each command of the greeting.
        Ok(Err(error)) if error::is_garbled(&error) => return Err(Trouble::NoRedis.into()),
        Ok(greeted) => greeted?,
        Err(_) => return Err(Trouble::Silent.into()),
    };
    let mut drivers = JoinSet::new();
    drivers.spawn(driver);
    Ok(Connection { multiplexed, _driver: Arc::new(drivers), guide: None })
}

async fn stream(settings: &Redis, address: &RedisAddress, deadline: Instant) -> RedisResult<Box<dyn Stream>> {
    let connected = async {
        match address {
            RedisAddress::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Stream>),
            RedisAddress::Tcp { host, port } => Ok(Box::new(tcp(settings, host, *port).await?) as _),
            RedisAddress::Tls { host, port } => {
                let (tcp, tls) = (tcp(settings, host, *port).await?, settings.tls.as_ref());
                let secured = secured(tcp, host, tls);
                match timeout_at(deadline, secured).await {
                    Ok(stream) => Ok(Box::new(stream.map_err(Trouble::Handshake)?) as _),
                    Err(_) => Err(Trouble::SilentHandshake.into()),
                }
            }
            // Its nodes were asked for one.
            RedisAddress::Sentinel(_) | RedisAddress::Cluster(_) => Err(Trouble::NoPrimary.into()),
        }
    };
    timeout_at(deadline, connected).await.unwrap_or_else(|_| Err(Trouble::Silent.into()))
}

async fn tcp(settings: &Redis, host: &str, port: u16) -> RedisResult<TcpStream> {
    let limit = Instant::now() + settings.connect_timeout;
    let stream = match lookup::literal(host, port) {
        Some(address) => timeout_at(limit, TcpStream::connect(address)).await,
        None => {
            let asked = timeout_at(limit, lookup::start(&LOOKUPS, host.into(), port)).await;
            let asked = asked.map_err(|_| {
                io::Error::other("the system gave no thread to resolve the host name in time")
            })?;
            timeout_at(limit, async {
                TcpStream::connect(&asked.await.map_err(io::Error::other)??[..]).await
            })
            .await
        }
    };
    let stream = stream.map_err(|_| Trouble::Silent)??;
    stream.set_nodelay(true)?;
    // A peer that vanished without a word is noticed by the heartbeat; this frees its socket.
    let socket = SockRef::from(&stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
    socket.set_tcp_user_timeout(Some(settings.response_timeout + settings.heartbeat_interval))?;
    Ok(stream)
}

async fn secured(tcp: TcpStream, host: &str, tls: Option<&Tls>) -> io::Result<impl Stream + use<>> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let tls = tls.ok_or_else(|| io::Error::other("there is no configuration for TLS"))?;
    TlsConnector::from(tls.client_config()).connect(name, tcp).await
}

/// Asks the server who it is. It needs no right but `+@connection`, so it is the heartbeat too.
pub(in crate::redis) async fn hello(connection: &mut Connection) -> RedisResult<Server> {
    let answer: Value = redis::cmd("HELLO").query_async(connection).await?;
    let fields: Vec<(Value, Value)> = match answer {
        Value::Map(fields) => fields,
        _ => {
            return Err(RedisError::from((
                ErrorKind::UnexpectedReturnType,
                "HELLO was not answered by a map",
            )));
        }
    };
    let mut server = Server::default();
    for (name, value) in fields {
        let (Some(name), Some(value)) = (text(name), text(value)) else { continue };
        match name.as_str() {
            "version" => server.version = value,
            "role" => server.role = value,
            _ => {}
        }
    }
    Ok(server)
}

pub(in crate::redis) fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}
