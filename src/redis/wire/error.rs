//! [`RedisError`]: why Redis could not be asked, and what an operator can do about it.

use std::io;
use std::sync::Arc;

use redis::{ErrorKind, ServerErrorKind};
use rustls::{AlertDescription, CertificateError};

use super::reply_limit::{LARGEST_REPLY_BYTES, MOST_VALUES, StreamError, tls_error};

/// Why Redis could not be asked, or what it refused.
#[derive(Clone, Debug, thiserror::Error)]
pub(in crate::redis) enum RedisError {
    /// An error reply of the server, or a failure that the redis crate found: I/O, a time limit, an
    /// unexpected reply.
    #[error("{}", in_redis_words(.0))]
    Client(#[from] redis::RedisError),
    #[error("no answer in time")]
    NoAnswer,
    #[error("the connection was closed by the server")]
    Closed,
    #[error("no answer to the TLS handshake in time")]
    NoHandshake,
    #[error("the TLS handshake failed: {0}")]
    Handshake(Arc<io::Error>),
    /// A TLS error after the handshake. In TLS 1.3 the server checks the client's certificate only then.
    #[error("{0}")]
    Tls(rustls::Error),
    #[error("the first answer does not follow redis's protocol")]
    NotRedis,
    #[error("the connection was closed before the first answer")]
    ClosedAtOnce,
    #[error("no sentinel names a primary that is up")]
    NoPrimary,
    #[error("the sentinels know no primary of that name")]
    UnknownMaster,
    #[error("the server says that it is a {0}, and not the primary")]
    NotPrimary(String),
    /// The server works, but another server is to be followed now.
    #[error("another server is the primary now")]
    PrimaryMoved,
    #[error("an answer of more than {} MiB or {MOST_VALUES} values, which is not taken in", LARGEST_REPLY_BYTES >> 20)]
    ReplyTooLarge,
    #[error("the answer is not valid RESP")]
    InvalidReply,
    /// The connection was closed during a read of the table, twice in a row. Redis closes a connection
    /// with too many unsent bytes, and tells the reason only in its own log.
    #[error("the connection is closed whenever the table is asked for")]
    ClosedDuringRead,
    /// A read of the table ran into the time limit, twice in a row.
    #[error("the table did not arrive in time, twice")]
    TableTooSlow,
    /// A node of a cluster answered MOVED or ASK.
    #[error("{0} serves the key's slot now")]
    Redirected(String),
    #[error("no node serves the key's slot")]
    SlotUnserved,
    #[error("the server is not part of a cluster")]
    NotACluster,
}

impl From<io::Error> for RedisError {
    fn from(error: io::Error) -> Self {
        Self::Client(error.into())
    }
}

impl From<StreamError> for RedisError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::TooLarge => Self::ReplyTooLarge,
            StreamError::NotResp => Self::InvalidReply,
            StreamError::Tls(error) => Self::Tls(error),
        }
    }
}

impl RedisError {
    /// A reply that is valid RESP, but not what the command promises.
    pub(in crate::redis) fn unexpected_reply(text: &'static str) -> Self {
        Self::Client(redis::RedisError::from((ErrorKind::UnexpectedReturnType, text)))
    }

    /// The code of an error reply: `NOPERM`, `WRONGTYPE`, `ERR`.
    pub(in crate::redis) fn code(&self) -> Option<&str> {
        self.client()?.code()
    }

    /// The text of an error reply, after its code.
    pub(in crate::redis) fn detail(&self) -> Option<&str> {
        self.client()?.detail()
    }

    pub(in crate::redis) fn server_kind(&self) -> Option<ServerErrorKind> {
        match self.client()?.kind() {
            ErrorKind::Server(kind) => Some(kind),
            _ => None,
        }
    }

    fn client(&self) -> Option<&redis::RedisError> {
        match self {
            Self::Client(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the address and the slot in a MOVED or ASK.
    pub(in crate::redis) fn redirect_node(&self) -> Option<(&str, u16)> {
        self.client()?.redirect_node()
    }

    /// True where the connection still works and only this command was refused.
    pub(in crate::redis) fn is_refusal(&self) -> bool {
        self.code().is_some() && !self.is_not_ready()
    }

    /// True where the ACL user lacks a right.
    pub(in crate::redis) fn is_missing_right(&self) -> bool {
        self.code() == Some("NOPERM") || tells_of_missing_right(&self.to_string())
    }

    pub(in crate::redis) fn is_authentication(&self) -> bool {
        self.client().is_some_and(|error| error.kind() == ErrorKind::AuthenticationFailed)
            || matches!(self.code(), Some("WRONGPASS" | "NOAUTH"))
    }

    /// True where the server will answer later: it loads its data, follows a primary that is down, belongs
    /// to a cluster that is down, or has only some of the keys while their slot moves. False where only one
    /// key's slot is not served: other keys can be read meanwhile.
    pub(in crate::redis) fn is_not_ready(&self) -> bool {
        use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, TryAgain};
        match self.server_kind() {
            Some(BusyLoading | MasterDown | TryAgain) => true,
            Some(ClusterDown) => !self.detail().is_some_and(|text| text.contains("slot not served")),
            _ => false,
        }
    }

    /// True where an answer is too large: for this process, for Redis's output buffer, or for the time
    /// limit. The connection cannot be used any more, since the rest of the answer would have to be read
    /// first.
    pub(in crate::redis) fn is_too_large(&self) -> bool {
        matches!(self, Self::ReplyTooLarge | Self::ClosedDuringRead | Self::TableTooSlow)
    }

    pub(in crate::redis) fn is_closed(&self) -> bool {
        matches!(self, Self::Closed) || self.client().is_some_and(redis::RedisError::is_connection_dropped)
    }

    pub(in crate::redis) fn is_timeout(&self) -> bool {
        self.client().is_some_and(redis::RedisError::is_timeout)
    }

    pub(in crate::redis) fn is_connection_refused(&self) -> bool {
        self.client().is_some_and(redis::RedisError::is_connection_refusal)
    }

    /// True where the bytes that came are not RESP.
    pub(super) fn is_invalid_reply(&self) -> bool {
        matches!(self, Self::InvalidReply)
            || self.client().is_some_and(|error| error.kind() == ErrorKind::Parse)
    }

    /// True where the config or the cluster itself has to be changed.
    pub(in crate::redis) fn is_cluster_setup(&self) -> bool {
        matches!(self, Self::NotACluster | Self::SlotUnserved)
    }

    /// Returns what an operator can do about the error.
    pub(in crate::redis) fn cure(&self) -> &'static str {
        match self {
            Self::Client(error) => cure_of_client(error),
            Self::Tls(error) => cure_of_tls(error),
            Self::Handshake(error) => tls_error(error).map_or(SPEAKS_NO_TLS, cure_of_tls),
            Self::NoHandshake => SPEAKS_NO_TLS,
            Self::ClosedAtOnce => {
                "if that port speaks TLS, write rediss:// in redis.url, or set redis.tls beside \
                 redis.sentinel or \
                 redis.cluster; else redis's log may say why"
            }
            Self::NotRedis | Self::InvalidReply => SPEAKS_NO_REDIS,
            Self::UnknownMaster => "check redis.sentinel.master",
            Self::ReplyTooLarge => {
                "remove the members that are no addresses (`redis-cli ZRANGE KEY 0 -1 | cut -c1-300` shows \
                 them), or \
                 split the pool"
            }
            // By default Redis closes a subscribed connection with more than 32 MB of unsent replies.
            Self::ClosedDuringRead => {
                "redis's log says why; if it is the output buffer limit, remove the members that are no \
                 addresses \
                 (`redis-cli ZRANGE KEY 0 -1 | cut -c1-300` shows them)"
            }
            Self::TableTooSlow => {
                "raise redis.response_timeout; a table of that size may be better split in two"
            }
            Self::NotACluster => "write its address as redis.url, or name a cluster's nodes",
            Self::SlotUnserved => "see what CLUSTER NODES says, and give the slot to a node",
            Self::NoPrimary
            | Self::NotPrimary(_)
            | Self::PrimaryMoved
            | Self::Redirected(_)
            | Self::Closed
            | Self::NoAnswer => TRIED_AGAIN,
        }
    }
}

/// True where the text of an error reply says that the ACL user lacks a right. Redis 7 and 6.2 use different
/// words for what a script calls.
pub(in crate::redis) fn tells_of_missing_right(text: &str) -> bool {
    ["NOPERM", "ACL failure", "can't run this command"].iter().any(|part| text.contains(part))
}

/// Returns an error reply as the server sent it: `WRONGPASS invalid username-password pair`. The text of
/// the crate's error has quotes around the code.
fn in_redis_words(error: &redis::RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        _ => error.to_string(),
    }
}

const TRIED_AGAIN: &str = "it is tried again until it works";
const SPEAKS_NO_REDIS: &str = "what answers there does not speak redis's protocol: check its address in the \
                               config's redis section; if it is TLS, write rediss:// in redis.url, or set \
                               redis.tls beside redis.sentinel or redis.cluster";
const SPEAKS_NO_TLS: &str = "if that port speaks plain redis, write redis:// in redis.url, or leave \
                             redis.tls out beside redis.sentinel or redis.cluster; else name the server's tls-port";

fn cure_of_client(error: &redis::RedisError) -> &'static str {
    match error.kind() {
        _ if is_database_refused(error) => cure_of_database(error),
        _ if is_sentinel_unknown(error) => "it is no sentinel: check redis.sentinel.nodes",
        ErrorKind::AuthenticationFailed => "check redis.username and redis.password",
        ErrorKind::Server(ServerErrorKind::NoPerm) => "grant the ACL user what the message names",
        ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::Ask) => {
            "this is a Redis Cluster: write redis.cluster instead of redis.url"
        }
        ErrorKind::Server(ServerErrorKind::ClusterDown) => "see what CLUSTER INFO says: a part of it is down",
        ErrorKind::RESP3NotSupported => "redis 6 or newer is needed",
        ErrorKind::Parse => SPEAKS_NO_REDIS,
        _ if error.code() == Some("NOAUTH") => "set redis.password",
        _ if error.code() == Some("WRONGPASS") => "check redis.username and redis.password",
        _ if error.is_connection_refusal() => {
            "start redis, or check its address in the config's redis section"
        }
        _ => TRIED_AGAIN,
    }
}

/// True where the server does not know SENTINEL. Redis 6 and Redis 7 put the command between different
/// quotes.
fn is_sentinel_unknown(error: &redis::RedisError) -> bool {
    let text = error.to_string();
    ["unknown command 'SENTINEL'", "unknown command `SENTINEL`"].iter().any(|words| text.contains(words))
}

/// True where the server refused the database. The crate reports that by this text, without Redis's code.
fn is_database_refused(error: &redis::RedisError) -> bool {
    error.to_string().contains("refused to switch database")
}

fn cure_of_database(error: &redis::RedisError) -> &'static str {
    let has = |part: &str| error.detail().is_some_and(|text| text.contains(part));
    if has("cluster mode") {
        "a Redis Cluster has database 0 alone: write redis.cluster instead of redis.url"
    } else if has("permission") {
        "grant the ACL user +select"
    } else {
        "check the database at the end of redis.url, or in redis.sentinel.database: the server has fewer"
    }
}

fn cure_of_tls(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidMessage(_) => SPEAKS_NO_TLS,
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "set redis.tls.ca_file to the certificate of the authority that signed the server's"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "renew the server's certificate, or set this machine's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "set this machine's clock, or wait until the server's certificate begins"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "reach the server by a name or address that its certificate is for, or have that added to it"
            }
            _ => {
                "have the server's certificate issued anew, for a server and by the authority in \
                 redis.tls.ca_file"
            }
        },
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server asks for a certificate: set redis.tls.cert_file and redis.tls.key_file"
        }
        rustls::Error::AlertReceived(_) => {
            "if the server asks for a certificate, set redis.tls.cert_file and key_file to one that it trusts"
        }
        _ => "check redis.tls and the server's certificate",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(text: &str) -> RedisError {
        let value = redis::parse_redis_value(format!("-{text}\r\n").as_bytes()).expect("an answer");
        value.extract_error().expect_err("an error").into()
    }

    #[test]
    fn each_error_has_its_cure() {
        assert_eq!(RedisError::NoHandshake.cure(), SPEAKS_NO_TLS);
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let handshake = RedisError::Handshake(Arc::new(io::Error::other(unknown())));
        assert!(handshake.cure().contains("redis.tls.ca_file"), "{}", handshake.cure());
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        let late = RedisError::from(StreamError::Tls(alert));
        assert!(late.cure().contains("redis.tls.cert_file"), "{}", late.cure());
        let refused = RedisError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert!(refused.cure().contains("start redis"));
    }

    #[test]
    fn an_error_reply_is_shown_as_the_server_sent_it() {
        let text = "WRONGPASS invalid username-password pair or user is disabled.";
        assert_eq!(reply(text).to_string(), text);
    }

    /// The config may have `redis.sentinel` or `redis.cluster` instead of `redis.url`.
    #[test]
    fn a_cure_for_every_kind_of_address_names_the_keys_of_all() {
        let refused = RedisError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        let speaks_tls = || rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType);
        for error in [
            refused,
            RedisError::from(redis::RedisError::from((ErrorKind::Parse, "not redis"))),
            RedisError::NotRedis,
            RedisError::ClosedAtOnce,
            RedisError::NoHandshake,
            RedisError::Handshake(Arc::new(io::Error::other(speaks_tls()))),
        ] {
            let cure = error.cure();
            let is_for_all = ["redis.sentinel", "redis.cluster"].iter().all(|key| cure.contains(key));
            assert!(is_for_all || !cure.contains("redis.url"), "{error}: {cure}");
        }
    }

    #[test]
    fn a_slot_that_is_not_served_does_not_delay_other_keys() {
        for wait in ["CLUSTERDOWN The cluster is down", "TRYAGAIN Multiple keys request", "LOADING it"] {
            assert!(reply(wait).is_not_ready() && !reply(wait).is_refusal(), "{wait}");
        }
        let unserved = reply("CLUSTERDOWN Hash slot not served");
        assert!(unserved.is_refusal() && !unserved.is_not_ready());
    }
}
