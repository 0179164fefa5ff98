//! What Statera is told to do, once it is known to be possible.
//!
//! Three steps, each in its own file: `file` reads what was written into a tree that still knows every key, `check`
//! turns the tree into a [`Config`] and collects *every* problem on the way, with its path, line, value and cure.
//! A [`Config`] can run: nothing behind it validates again. The keys are CONTRACT's; each default is the one that a
//! careful operator would choose.

mod check;
mod decode;
mod file;
mod pool;
mod process;
mod redis;
mod secret;
mod tcp;
mod weights_key;

pub use check::{InvalidConfig, LoadError, Problem};
pub use file::Unreadable;
pub use pool::{Connect, HealthCheck, Pool};
pub use process::{Admin, Log, LogFormat, LogOutput, Shutdown};
pub use redis::{Cluster, LuaPick, OnEmpty, Redis, RedisAddress, Sentinel, Tls, Watch};
pub use secret::Secret;
pub use tcp::{Congestion, Keepalive};
pub use weights_key::{companion_stem, hash_tag};

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

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
