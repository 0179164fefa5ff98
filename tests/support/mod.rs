//! The parts of a scenario: a real redis-server ([`Redis`]), scripted backends ([`Backend`]), the proxy in
//! this process ([`Proxy`]) or as a program ([`Program`]), clients, and [`eventually`].

mod backend;
mod certificates;
mod client;
mod cluster;
mod following;
mod history;
mod http;
mod limits;
mod link;
mod namespace;
mod nginx;
mod operator;
mod pair;
mod pipes;
mod ports;
mod program;
mod program_log;
mod proxy;
mod redis_server;
mod scripted_redis;
mod sentinels;
mod server;
mod thread_server;
mod tls_redis;
mod traffic;
mod watcher;
mod writer;

pub use backend::{Backend, backends, dead_address, silent_address, silent_at};
pub use certificates::{Authority, Identity, path_text};
pub use client::{echo, greeting};
pub use cluster::{Cluster, node_id};
pub use following::{calls, follow, mode_becomes, next_greeting_is, program_following};
pub use history::{History, Observation, Promise, Table, without_zeros};
pub use http::{Answer, ask, get, sum_of};
pub use limits::{Unprivileged, limited};
pub use link::{Link, Passing};
pub use namespace::in_own_network;
pub use nginx::Nginx;
pub use operator::{CommandOutput, Operator};
pub use pair::{Kind, Pair, Pattern, Peer, soon};
pub use pipes::{pipe_ends, piped_bytes};
pub use ports::free_port;
pub use program::{Program, require};
pub use program_log::text;
pub use proxy::{Proxy, backend_series};
pub use redis_server::{LEAST_RIGHTS, Redis, info, info_number};
pub use scripted_redis::ScriptedRedis;
pub use sentinels::Sentinels;
pub use server::{Server, output};
pub use tls_redis::{TlsRedis, tls_settings};
pub use traffic::{Outcome, Traffic};
pub use watcher::{RestartingProxy, Watched, Watcher};
pub use writer::{Writer, all_agree, notify, table};

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long an event that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds; panics with `what` when it does not within [`PATIENCE`].
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A random seed, which it prints. The variable STATERA_SEED sets it, to replay a failed run.
pub fn seed() -> u64 {
    let seed = std::env::var("STATERA_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("STATERA_SEED={seed}");
    seed
}
