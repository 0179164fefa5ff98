//! What Statera is told to do, once it is known to be possible.
//!
//! Three steps, each in its own file: `file` reads what was written into a tree that still knows every key, `check`
//! turns the tree into a [`Config`] and collects *every* problem on the way, with its path, line, value and cure.
//! A [`Config`] can run: nothing behind it validates again. The keys are CONTRACT's; each default is the one that a
//! careful operator would choose.

mod check;
mod decode;
mod file;
mod weights_key;

pub use check::{InvalidConfig, LoadError, Problem};
pub use file::Unreadable;
pub use weights_key::{companion_stem, hash_tag};

use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::balance::queue::Capacity;
use crate::balance::{BackendId, Balance, Outlier, Policy, Weight};

/// A whole configuration that can run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Data-plane threads.
    pub workers: NonZeroUsize,
    /// Where the weights come from; `None` runs the pools on their own `backends` alone.
    pub redis: Option<Redis>,
    /// How Redis may be asked to pick when a snapshot cannot be trusted.
    pub lua_pick: LuaPick,
    /// Where the last tables from Redis are kept for a start without it; `None` keeps none.
    pub state_dir: Option<PathBuf>,
    /// In the order of the file; names and addresses are unique.
    pub listeners: Vec<Listener>,
    /// In the order of the file; names are unique.
    pub pools: Vec<Pool>,
    /// Where metrics and probes are served; `None` serves none.
    pub admin: Option<Admin>,
    /// What is logged, and how.
    pub log: Log,
    /// How the process ends.
    pub shutdown: Shutdown,
    /// What is valid, and cannot be meant.
    pub warnings: Warnings,
}

/// Settings that are valid and cannot be meant, each with its path, line and cure.
#[derive(Clone, Debug, Default)]
pub struct Warnings {
    /// In the order of the file; the first 50.
    pub first: Vec<Problem>,
    /// Warnings beyond those.
    pub more: usize,
}

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
pub struct Tls(Arc<rustls::ClientConfig>);

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

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the one place that sends or compares it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
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

/// One entry of `listeners`.
#[derive(Clone, Debug)]
pub struct Listener {
    /// The key it stands under.
    pub name: Arc<str>,
    /// At least one; port 0 takes a free one.
    pub bind: Vec<SocketAddr>,
    /// The name of a pool that exists.
    pub pool: Arc<str>,
    /// Towards its clients; `None`: the system's.
    pub tcp_congestion: Option<Congestion>,
}

/// The name of a TCP congestion control algorithm, which the kernel may know: `cubic`, `bbr`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Congestion(Arc<str>);

/// TCP_CA_NAME_MAX in include/net/tcp.h, without the final zero.
const CONGESTION_MAX_BYTES: usize = 15;

impl Congestion {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Congestion {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_name = !text.is_empty()
            && text.len() <= CONGESTION_MAX_BYTES
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
        is_name.then(|| Self(text.into())).ok_or(())
    }
}

/// One entry of `pools`.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The key it stands under.
    pub name: Arc<str>,
    /// The sorted set in Redis.
    pub weights_key: String,
    /// Used until Redis has answered; each backend once.
    pub backends: Vec<(BackendId, Weight)>,
    /// How a backend is chosen.
    pub balance: Balance,
    /// How a backend is reached.
    pub connect: Connect,
    /// A session that moves no byte for this long is closed; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// The same, once one side has closed its half.
    pub half_close_timeout: Duration,
    /// TCP keepalive on both sides.
    pub keepalive: Keepalive,
    /// Towards the backends; `None`: the system's.
    pub tcp_congestion: Option<Congestion>,
    /// How backends are asked whether they live; `None`: they are not.
    pub health_check: Option<HealthCheck>,
    /// When a backend that fails sessions gets none for a while; `None`: never.
    pub outlier: Option<Outlier>,
    /// Where less of the weight than this (0 to 1) is on healthy backends, health is ignored.
    pub fail_open: f64,
    /// How long a backend that joined or recovered takes to its whole weight; zero: it has it at once.
    pub slow_start: Duration,
    /// How many sessions a backend may have, and who waits for a place.
    pub capacity: Capacity,
    /// After so long the sessions of a backend that was removed, or has weight 0, are closed; zero: never.
    pub drain_timeout: Duration,
}

impl Pool {
    /// What the pool makes of its table.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let Self { balance, outlier, fail_open, slow_start, capacity, drain_timeout, .. } = *self;
        Policy { balance, fail_open, slow_start, outlier, capacity, drain_timeout }
    }
}

/// How a backend is asked whether it lives: `pools.*.health_check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// From the begin of a check to the next one's, or up to a fifth less.
    pub interval: Duration,
    /// For connecting, sending and what is expected together, at each address of a name.
    pub timeout: Duration,
    /// So many checks in a row must pass before a backend that failed is healthy.
    pub rise: NonZeroU32,
    /// So many must fail before one that passed is not.
    pub fall: NonZeroU32,
    /// Asked instead of the backend's own.
    pub port: Option<u16>,
    /// Sent after the connect.
    pub send: Option<Arc<[u8]>>,
    /// To be found in what the backend says then; `None`: it passes once it has connected.
    pub expect: Option<Arc<[u8]>>,
}

/// How a backend is reached: `pools.*.connect`.
#[derive(Clone, Copy, Debug)]
pub struct Connect {
    /// For one attempt.
    pub timeout: Duration,
    /// Backends tried for one session.
    pub attempts: NonZeroU32,
    /// For all attempts together.
    pub deadline: Duration,
}

/// TCP keepalive: `pools.*.keepalive`.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    /// Silence before the first probe; whole seconds, at least 1.
    pub idle: Duration,
    /// Between probes; whole seconds, at least 1.
    pub interval: Duration,
    /// Unanswered probes before the connection counts as dead.
    pub probes: NonZeroU32,
}

impl Keepalive {
    /// How long a peer may say nothing, though it was asked, before it counts as vanished.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.idle.saturating_add(self.interval.saturating_mul(self.probes.get()))
    }
}

/// The `admin` section.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Loopback, unless there is a token.
    pub bind: SocketAddr,
    /// Asked for as `Authorization: Bearer …` on every path but `/livez` and `/readyz`.
    pub token: Option<Secret>,
}

/// The `log` section.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    /// The least severe level that is written.
    pub level: tracing::Level,
    /// The shape of a line.
    pub format: LogFormat,
    /// One line per session.
    pub access: bool,
    /// Where lines go.
    pub output: LogOutput,
}

/// The shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Where log lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogOutput {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The `shutdown` section.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    /// Not ready, but still accepting, for this long.
    pub delay: Duration,
    /// Then sessions may finish for this long.
    pub timeout: Duration,
}
