//! Opens a connection to Redis: addressed, authenticated, on the right database, speaking RESP3, with a deadline on
//! everything.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, IntoConnectionInfo as _, ProtocolVersion,
    PushInfo, RedisConnectionInfo, RedisError, RedisResult, ServerErrorKind, Value,
};
use tokio::time::timeout;

use crate::config::{Redis, RedisAddress};

/// What a server says of itself in answer to HELLO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) version: String,
    pub(super) role: String,
}

/// Connects. Pushed messages go to `on_push`, which must not wait.
pub(super) async fn open(
    settings: &Redis,
    on_push: impl Fn(PushInfo) + Send + Sync + 'static,
) -> RedisResult<MultiplexedConnection> {
    let address = match &settings.address {
        RedisAddress::Tcp { host, port } => ConnectionAddr::Tcp(host.clone(), *port),
        RedisAddress::Unix(path) => ConnectionAddr::Unix(path.clone()),
    };
    let mut identity = RedisConnectionInfo::default()
        .set_db(i64::from(settings.database))
        .set_protocol(ProtocolVersion::RESP3)
        // CLIENT SETINFO is unknown to Redis 7.0 and would be refused to a user of few rights.
        .set_skip_set_lib_name();
    if let Some(username) = &settings.username {
        identity = identity.set_username(username);
    }
    if let Some(password) = &settings.password {
        identity = identity.set_password(password.expose());
    }
    // A peer that vanished without a word is noticed by the heartbeat; this frees its socket.
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(TcpKeepalive::new().with_time(Duration::from_secs(30)))
        .set_user_timeout(settings.response_timeout + settings.heartbeat_interval);
    let info = address.into_connection_info()?.set_tcp_settings(tcp).set_redis_settings(identity);
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(settings.connect_timeout))
        .set_response_timeout(Some(settings.response_timeout))
        .set_push_sender(move |push| -> Result<(), redis::aio::SendError> {
            on_push(push);
            Ok(())
        });
    // The library's own timeout covers the TCP handshake alone, not HELLO and AUTH.
    let opening = Client::open(info)?;
    timeout(
        settings.connect_timeout + settings.response_timeout,
        opening.get_multiplexed_async_connection_with_config(&config),
    )
    .await
    .unwrap_or_else(|_| Err(RedisError::from((ErrorKind::Io, "no answer in time"))))
}

/// Asks the server who it is. It needs no right but `+@connection`, so it is the heartbeat too.
pub(super) async fn hello(connection: &mut MultiplexedConnection) -> RedisResult<Server> {
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

fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

/// True where the connection still works and only this command was refused.
pub(super) fn is_refusal(error: &RedisError) -> bool {
    error.code().is_some() && !is_not_ready(error)
}

/// True where the server will answer later: it loads its data, or follows a primary that is down.
pub(super) fn is_not_ready(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown))
}

/// What a person can do about it, if anything is known.
pub(super) fn cure(error: &RedisError) -> &'static str {
    match error.kind() {
        ErrorKind::AuthenticationFailed => "check redis.username and redis.password",
        ErrorKind::Server(ServerErrorKind::NoPerm) => "grant the ACL user what the message names",
        ErrorKind::RESP3NotSupported => "redis 6 or newer is needed",
        ErrorKind::Parse => "check redis.url: what answers there does not speak redis's protocol",
        _ if error.code() == Some("NOAUTH") => "set redis.password",
        _ if error.code() == Some("WRONGPASS") => "check redis.username and redis.password",
        _ if error.is_connection_refusal() => "start redis, or check redis.url",
        _ => "it is tried again until it works",
    }
}
