//! Opens a connection to one Redis server: encrypted where that is wanted, authenticated, on the right
//! database, speaking RESP3, with a deadline on everything and a largest size of a reply.
//!
//! What can go wrong, and its cures, are in `error.rs`. Which server to connect to is decided in `topology`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{ConnectionLike as _, MultiplexedConnection};
use redis::{
    AsyncConnectionConfig, Cmd, FromRedisValue, Pipeline, ProtocolVersion, PushInfo, RedisConnectionInfo,
    ToRedisArgs, Value,
};
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::error::RedisError;
use super::reply_limit::{FirstError, Limited};
use crate::config::{Redis, RedisAddress, Sentinel, Tls};
use crate::names::lookup;

/// Silence on the wire before the kernel probes whether the peer is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Permits for lookups of servers' names, for the whole process. A connection that is being opened needs
/// one at most. A lookup keeps its permit until the system's library returns, even if the resolver hangs.
static LOOKUPS: Semaphore = Semaphore::const_new(32);

/// What a server says of itself in answer to HELLO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::redis) struct Server {
    pub(in crate::redis) version: String,
    pub(in crate::redis) role: String,
}

impl Server {
    pub(in crate::redis) fn is_primary(&self) -> bool {
        self.role == "master"
    }
}

/// A connection to one server. Dropping the last clone closes it, whatever is still under way on it.
#[derive(Clone, Debug)]
pub(in crate::redis) struct Connection {
    multiplexed: MultiplexedConnection,
    /// Why the connection's stream failed, if it did.
    first_error: FirstError,
    /// The crate's task that reads and writes. It is aborted with the last clone: without that, it would
    /// wait for the answers of a frozen server.
    _driver: Arc<JoinSet<()>>,
}

impl Connection {
    /// Sends `command` and waits for its answer.
    pub(in crate::redis) async fn query<T: FromRedisValue>(
        &mut self,
        command: &Cmd,
    ) -> Result<T, RedisError> {
        let answer = command.query_async(&mut self.multiplexed).await;
        answer.map_err(|error| self.explain(error))
    }

    /// Sends all commands of `pipeline` in one piece. An error reply to one of them fails all.
    pub(in crate::redis) async fn query_all<T: FromRedisValue>(
        &mut self,
        pipeline: &Pipeline,
    ) -> Result<T, RedisError> {
        let answers = pipeline.query_async(&mut self.multiplexed).await;
        answers.map_err(|error| self.explain(error))
    }

    /// Sends all commands of `pipeline` in one piece; returns what each was answered, which may be an error
    /// reply.
    pub(in crate::redis) async fn answers(&mut self, pipeline: &Pipeline) -> Result<Vec<Value>, RedisError> {
        let answers = self.multiplexed.req_packed_commands(pipeline, 0, pipeline.len()).await;
        answers.map_err(|error| self.explain(error))
    }

    /// Subscribes to `channels`, and waits for the confirmations.
    pub(in crate::redis) async fn subscribe(&mut self, channels: impl ToRedisArgs) -> Result<(), RedisError> {
        let subscribed = self.multiplexed.subscribe(channels).await;
        subscribed.map_err(|error| self.explain(error))
    }

    /// Asks the server what it is. Every user may send HELLO, whatever its ACL, so this is the heartbeat
    /// too.
    pub(in crate::redis) async fn hello(&mut self) -> Result<Server, RedisError> {
        let Value::Map(fields) = self.query(&redis::cmd("HELLO")).await? else {
            return Err(RedisError::unexpected_reply("HELLO was not answered by a map"));
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

    fn explain(&self, error: redis::RedisError) -> RedisError {
        explain(error, &self.first_error)
    }
}

/// Replaces the crate's `error` by the stream's first error: only the stream knows that a reply was
/// refused, or that TLS failed. An error reply stays, since it was received before the stream failed.
fn explain(error: redis::RedisError, of_stream: &FirstError) -> RedisError {
    match of_stream.get() {
        Some(first) if error.code().is_none() => first.clone().into(),
        _ => error.into(),
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Connects to the server at `address`. Pushed messages go to `on_push`, which must not wait.
pub(in crate::redis) async fn open(
    settings: &Redis,
    address: &RedisAddress,
    on_push: impl Fn(PushInfo) + Send + Sync + 'static,
) -> Result<Connection, RedisError> {
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
) -> Result<Connection, RedisError> {
    let password = sentinel.password.as_ref().map(|password| password.expose());
    connect(settings, node, &identity(sentinel.username.as_deref(), password), on_push).await
}

fn identity(username: Option<&str>, password: Option<&str>) -> RedisConnectionInfo {
    let mut identity = RedisConnectionInfo::default()
        .set_protocol(ProtocolVersion::RESP3)
        // CLIENT SETINFO is unknown to Redis 7.0 and would be refused to a user with few rights.
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
) -> Result<Connection, RedisError> {
    let deadline = Instant::now() + settings.connect_timeout + settings.response_timeout;
    let stream = Limited::new(stream(settings, address, deadline).await?);
    let first_error = stream.first_error();
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(Some(settings.response_timeout))
        .set_push_sender(move |push| -> Result<(), redis::aio::SendError> {
            on_push(push);
            Ok(())
        });
    // HELLO, AUTH and SELECT; the crate has no deadline for them.
    let greeting = MultiplexedConnection::new_with_config(identity, stream, config);
    let (multiplexed, driver) = match timeout_at(deadline, greeting).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(error)) => {
            let error = explain(error, &first_error);
            return Err(match error {
                _ if error.is_closed() && matches!(address, RedisAddress::Tcp { .. }) => {
                    RedisError::ClosedAtOnce
                }
                _ if error.is_invalid_reply() => RedisError::NotRedis,
                error => error,
            });
        }
        Err(_) => return Err(RedisError::NoAnswer),
    };
    let mut drivers = JoinSet::new();
    drivers.spawn(driver);
    Ok(Connection { multiplexed, first_error, _driver: Arc::new(drivers) })
}

async fn stream(
    settings: &Redis,
    address: &RedisAddress,
    deadline: Instant,
) -> Result<Box<dyn Stream>, RedisError> {
    let connected = async {
        match address {
            RedisAddress::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Stream>),
            RedisAddress::Tcp { host, port } => Ok(Box::new(tcp(settings, host, *port).await?) as _),
            RedisAddress::Tls { host, port } => {
                let (tcp, tls) = (tcp(settings, host, *port).await?, settings.tls.as_ref());
                let secured = secured(tcp, host, tls);
                match timeout_at(deadline, secured).await {
                    Ok(Ok(stream)) => Ok(Box::new(stream) as _),
                    Ok(Err(error)) => Err(RedisError::Handshake(Arc::new(error))),
                    Err(_) => Err(RedisError::NoHandshake),
                }
            }
            // Sentinels or a cluster name the server: the caller passes the address of the server that
            // they named.
            RedisAddress::Sentinel(_) | RedisAddress::Cluster(_) => Err(RedisError::NoPrimary),
        }
    };
    timeout_at(deadline, connected).await.unwrap_or(Err(RedisError::NoAnswer))
}

async fn tcp(settings: &Redis, host: &str, port: u16) -> Result<TcpStream, RedisError> {
    let limit = Instant::now() + settings.connect_timeout;
    let stream = match lookup::literal(host, port) {
        Some(address) => timeout_at(limit, TcpStream::connect(address)).await,
        None => {
            let started = timeout_at(limit, lookup::start(&LOOKUPS, host.into(), port)).await;
            let started = started.map_err(|_| {
                io::Error::other("the system gave no thread to resolve the host name in time")
            })?;
            timeout_at(limit, async {
                TcpStream::connect(&started.await.map_err(io::Error::other)??[..]).await
            })
            .await
        }
    };
    let stream = stream.map_err(|_| RedisError::NoAnswer)??;
    stream.set_nodelay(true)?;
    // The heartbeat notices a peer that vanished without closing; these options free its socket.
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

/// Returns the text of a bulk or simple string in UTF-8; `None` for any other value.
pub(in crate::redis) fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}
