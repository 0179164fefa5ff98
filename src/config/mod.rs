//! The configuration: config.yaml as it was written, and the [`Config`] that can run.
//!
//! `file` reads the file into a tree that still has every key. `decode` takes values out of the tree, and
//! `check` makes the [`Config`] of them. Every problem is collected on the way, with its path, line,
//! value and cure. A [`Config`] can run: no other code validates it again. Each default is what a careful
//! operator would choose.

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
    /// The number of data-plane threads.
    pub workers: NonZeroUsize,
    /// Where the weights come from; `None` runs the pools on their own `backends` alone.
    pub redis: Option<Redis>,
    /// Whether and how Redis is asked to pick while the snapshot is stale.
    pub lua_pick: LuaPick,
    /// Where the last tables from Redis are kept for a start without it; `None` keeps none.
    pub state_dir: Option<PathBuf>,
    /// In the order of the file; names and addresses are unique.
    pub listeners: Vec<Listener>,
    /// In the order of the file; names are unique.
    pub pools: Vec<Pool>,
    /// The HTTP server for metrics and health; `None` runs none.
    pub admin: Option<Admin>,
    /// What is logged, and how.
    pub log: Log,
    /// How the process ends.
    pub shutdown: Shutdown,
    /// Settings that are valid but most likely a mistake.
    pub warnings: Warnings,
}

/// Settings that are valid but most likely a mistake, each with its path, line and cure.
#[derive(Clone, Debug, Default)]
pub struct Warnings {
    /// The first 50, in the order of the file.
    pub first: Vec<Problem>,
    /// How many more there are.
    pub more: usize,
}

/// One entry of `listeners`.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Its key in the file.
    pub name: Arc<str>,
    /// The addresses to listen on, at least one. Port 0 takes a free port.
    pub bind: Vec<SocketAddr>,
    /// The name of a pool that exists.
    pub pool: Arc<str>,
    /// The congestion control towards its clients; `None` leaves the system's.
    pub tcp_congestion: Option<Congestion>,
}
