//! The settings of `redis` and `lua_pick`.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Secret;

/// The `redis` section: where the server is, how changes are noticed, and how long each step may take.
#[derive(Clone, Debug)]
pub struct Redis {
    /// Where the server is.
    pub address: RedisAddress,
    /// The settings of TLS. Always there where `address`, or a node of it, is [`RedisAddress::Tls`].
    pub tls: Option<Tls>,
    /// The database number, from the URL's path or from `sentinel.database`.
    pub database: u32,
    /// The ACL user; `None` is Redis's default user.
    pub username: Option<String>,
    /// `None` sends no AUTH.
    pub password: Option<Secret>,
    /// How changes are noticed.
    pub watch: Watch,
    /// Whether `CONFIG SET notify-keyspace-events` may be sent, to add flags.
    pub manage_notifications: bool,
    /// The time between two heartbeats on the watching connection.
    pub heartbeat_interval: Duration,
    /// The time between two full reads that no notification caused. Each pause is up to a fifth shorter, by
    /// chance, so that the proxies of a fleet do not all read at once.
    pub resync_interval: Duration,
    /// The time between two reads where changes are noticed by polling.
    pub poll_interval: Duration,
    /// The limit for TCP, AUTH and HELLO together.
    pub connect_timeout: Duration,
    /// The limit for the answer to one command.
    pub response_timeout: Duration,
    /// A snapshot that was not confirmed for longer than this is stale.
    pub max_stale: Duration,
    /// What to do when the table is emptied or vanishes.
    pub on_empty: OnEmpty,
}

/// The address of a Redis server, or the servers that know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisAddress {
    /// `redis://host:port`
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        /// The port; 6379 where the URL has none.
        port: u16,
    },
    /// `rediss://host:port`
    Tls {
        /// A name or an address, without brackets. The server's certificate must be for it.
        host: String,
        /// The port; 6379 where the URL has none.
        port: u16,
    },
    /// `unix:///path`
    Unix(PathBuf),
    /// The primary that the sentinels report.
    Sentinel(Arc<Sentinel>),
    /// In a Redis Cluster, the primary that serves the slot of a key.
    Cluster(Arc<Cluster>),
}

impl RedisAddress {
    /// The key of the config that the address was read from.
    #[must_use]
    pub fn written_at(&self) -> &'static str {
        match self {
            Self::Tcp { .. } | Self::Tls { .. } | Self::Unix(_) => "redis.url",
            Self::Sentinel(_) => "redis.sentinel",
            Self::Cluster(_) => "redis.cluster",
        }
    }
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Tcp { host, port } => ("redis", host, port),
            Self::Tls { host, port } => ("rediss", host, port),
            Self::Unix(path) => return write!(f, "unix://{}", path.display()),
            Self::Sentinel(sentinel) => return write!(f, "sentinels of {}", sentinel.master),
            Self::Cluster(cluster) => {
                let more = if cluster.nodes.len() > 1 { ", …" } else { "" };
                let first = cluster.nodes.first().map(ToString::to_string).unwrap_or_default();
                return write!(f, "cluster of {first}{more}");
            }
        };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

/// `redis.sentinel`: the sentinels, which report the primary.
#[derive(Debug, PartialEq, Eq)]
pub struct Sentinel {
    /// The name that the sentinels know the primary by.
    pub master: String,
    /// At least one, each once: [`RedisAddress::Tcp`] or [`RedisAddress::Tls`].
    pub nodes: Vec<RedisAddress>,
    /// The ACL user of the sentinels; `None` is their default user.
    pub username: Option<String>,
    /// `None` sends them no AUTH.
    pub password: Option<Secret>,
}

/// `redis.cluster`: the nodes that are asked first which node serves which slots.
#[derive(Debug, PartialEq, Eq)]
pub struct Cluster {
    /// At least one, each once: [`RedisAddress::Tcp`] or [`RedisAddress::Tls`]. They report the other nodes.
    pub nodes: Vec<RedisAddress>,
}

/// TLS to Redis: the trusted root certificates, and the client's certificate. The files are read once.
#[derive(Clone)]
pub struct Tls(pub(super) Arc<rustls::ClientConfig>);

impl Tls {
    /// The settings for a new connection.
    #[must_use]
    pub fn client_config(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.0)
    }
}

impl fmt::Debug for Tls {
    // The settings hold a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(…)")
    }
}

/// How a change in Redis is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Notifications where the server is known to send them, otherwise tracking, otherwise polling.
    Auto,
    /// Notifications, even where the server's settings cannot be read.
    Notifications,
    /// Client tracking: the server reports a change of keys that were read. Polling where the server
    /// refuses it.
    Tracking,
    /// A read every `poll_interval`.
    Poll,
}

/// What to do when the table is emptied or vanishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEmpty {
    /// Keep using the last table, and log it.
    KeepLast,
    /// Refuse sessions until the table has members again.
    Refuse,
}

/// The `lua_pick` section.
#[derive(Clone, Debug)]
pub struct LuaPick {
    /// Where this is `false`, Redis is never asked to pick.
    pub enabled: bool,
    /// How long a session may wait for the answer.
    pub timeout: Duration,
    /// How many sessions may wait for an answer at once. More sessions use the next source at once.
    pub max_in_flight: NonZeroUsize,
}
