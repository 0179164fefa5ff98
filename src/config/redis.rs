//! The settings of `redis` and `lua_pick`.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Secret;

/// The `redis` section: one server, or who knows it, and how hard to watch it.
#[derive(Clone, Debug)]
pub struct Redis {
    /// Where the server is.
    pub address: RedisAddress,
    /// How TLS is spoken; there whenever `address`, or a node of it, is [`RedisAddress::Tls`].
    pub tls: Option<Tls>,
    /// The database number, from the URL's path or from `sentinel.database`.
    pub database: u32,
    /// An ACL user; `None` is the default user.
    pub username: Option<String>,
    /// `None` sends no AUTH.
    pub password: Option<Secret>,
    /// How changes are noticed.
    pub watch: Watch,
    /// May `CONFIG SET notify-keyspace-events` be sent, to add flags.
    pub manage_notifications: bool,
    /// Between two pings on the watching connection.
    pub heartbeat_interval: Duration,
    /// Between two full reads that no notification asked for; up to a fifth less, by chance, so that a fleet does not read
    /// in step.
    pub resync_interval: Duration,
    /// Between two reads where changes are noticed by polling.
    pub poll_interval: Duration,
    /// For TCP, AUTH and HELLO together.
    pub connect_timeout: Duration,
    /// For each command.
    pub response_timeout: Duration,
    /// A snapshot not confirmed for longer is stale.
    pub max_stale: Duration,
    /// What an emptied or vanished table means.
    pub on_empty: OnEmpty,
}

/// Where a Redis server listens, or who knows where it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisAddress {
    /// `redis://host:port`
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        /// 6379 where the URL names none.
        port: u16,
    },
    /// `rediss://host:port`
    Tls {
        /// A name or an address, without brackets; the server's certificate must be for it.
        host: String,
        /// 6379 where the URL names none.
        port: u16,
    },
    /// `unix:///path`
    Unix(PathBuf),
    /// The primary that sentinels name.
    Sentinel(Arc<Sentinel>),
    /// In a cluster, the primary that serves a key's slot.
    Cluster(Arc<Cluster>),
}

impl RedisAddress {
    /// The key of the config that it was read from.
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

/// `redis.sentinel`: who knows which server is the primary.
#[derive(Debug, PartialEq, Eq)]
pub struct Sentinel {
    /// The name that the sentinels know it by.
    pub master: String,
    /// At least one, each once: [`RedisAddress::Tcp`] or [`RedisAddress::Tls`].
    pub nodes: Vec<RedisAddress>,
    /// An ACL user of the sentinels; `None` is their default user.
    pub username: Option<String>,
    /// `None` sends them no AUTH.
    pub password: Option<Secret>,
}

/// `redis.cluster`: who is asked first which node serves what.
#[derive(Debug, PartialEq, Eq)]
pub struct Cluster {
    /// At least one, each once: [`RedisAddress::Tcp`] or [`RedisAddress::Tls`]. They name the others.
    pub nodes: Vec<RedisAddress>,
}

/// How TLS is spoken to Redis: whom to trust, and the certificate to show. Read from its files once.
#[derive(Clone)]
pub struct Tls(pub(super) Arc<rustls::ClientConfig>);

impl Tls {
    /// For a connection.
    #[must_use]
    pub fn client_config(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.0)
    }
}

impl fmt::Debug for Tls {
    // It holds a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(…)")
    }
}

/// How a change in Redis is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Notifications where the server is known to send them, else tracking, else polling.
    Auto,
    /// Notifications, even where the server's settings cannot be read.
    Notifications,
    /// The server remembers what was read, and tells when it changes; polling where it refuses to.
    Tracking,
    /// A read every `poll_interval`.
    Poll,
}

/// What an emptied or vanished table means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEmpty {
    /// Go on with the last table, and say so.
    KeepLast,
    /// Refuse sessions until the table has members again.
    Refuse,
}

/// The `lua_pick` section.
#[derive(Clone, Debug)]
pub struct LuaPick {
    /// `false`: Redis is never asked to pick.
    pub enabled: bool,
    /// How long a session may wait for the answer.
    pub timeout: Duration,
    /// Sessions that may wait at once; more go straight to the next source.
    pub max_in_flight: NonZeroUsize,
}
