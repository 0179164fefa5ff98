//! Keeps the addresses of backends that are DNS names up to date, so that no session ever waits for a resolver.
//!
//! A name that fails to resolve keeps the addresses that it had; one that never resolved has no share of its pool. The
//! system's resolver tells no time to live, so names are asked for again at a fixed pace.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};

use super::backoff::jittered;
use crate::balance::Address;
use crate::balance::backend::Backend;
use crate::balance::pool::Pool;

/// Between two looks at a name. Container platforms move a name within seconds of a restart.
const INTERVAL: Duration = Duration::from_secs(5);
/// The system's resolver itself gives up after 5 s a server by default.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(6);
/// Each runs on a thread of its own.
const LOOKUPS_AT_ONCE: usize = 8;

/// The names of one pool.
#[derive(Debug)]
pub struct Names {
    pool: Arc<Pool>,
    /// Those that do not resolve, and why: each is logged once for each new reason, not once for each look.
    failing: HashMap<Arc<str>, String>,
}

impl Names {
    /// Not looked at yet.
    #[must_use]
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, failing: HashMap::new() }
    }

    /// Resolves them once, for a start. Cancel safe.
    pub async fn resolve_all(&mut self) {
        resolve(&self.pool, true, &mut self.failing).await;
    }

    /// Resolves them again and again. Never ends.
    pub async fn run(mut self) {
        loop {
            self.resolve_all().await;
            let next_round = Instant::now() + jittered(INTERVAL);
            while timeout_at(next_round, self.pool.cell.published()).await.is_ok() {
                resolve(&self.pool, false, &mut self.failing).await;
            }
        }
    }
}

/// Resolves all names of a pool, or only the new ones, and refreshes its snapshot if that made a backend reachable.
async fn resolve(pool: &Pool, all: bool, failing: &mut HashMap<Arc<str>, String>) {
    let names: Vec<Arc<Backend>> = {
        let snapshot = pool.cell.load();
        let members = snapshot.members().iter().map(|member| &member.backend);
        members.filter(|b| is_name(b) && (all || !b.is_reachable())).cloned().collect()
    };
    let mut became_reachable = false;
    let mut names = names.into_iter();
    let mut lookups = JoinSet::new();
    loop {
        while lookups.len() < LOOKUPS_AT_ONCE
            && let Some(backend) = names.next()
        {
            lookups.spawn(async move {
                let result = look_up(&backend).await;
                (backend, result)
            });
        }
        let Some(done) = lookups.join_next().await else { break };
        let Ok((backend, result)) = done else { continue };
        let name: Arc<str> = backend.id().as_str().into();
        match result {
            Ok(addresses) => {
                if failing.remove(&name).is_some() {
                    info!(pool = %pool.name, backend = %name, ?addresses, "the name resolves again");
                }
                became_reachable |= backend.set_resolved(addresses);
            }
            Err(error) => {
                if failing.insert(Arc::clone(&name), error.clone()).as_ref() != Some(&error) {
                    let kept = backend.is_reachable();
                    warn!(
                        pool = %pool.name, backend = %name, error, keeps_last_addresses = kept,
                        "the backend's name does not resolve: check its spelling and this machine's resolver"
                    );
                }
            }
        }
    }
    if became_reachable {
        pool.cell.refresh();
    }
}

fn is_name(backend: &Backend) -> bool {
    matches!(backend.id().address(), Address::Name { .. })
}

async fn look_up(backend: &Backend) -> Result<Vec<SocketAddr>, String> {
    let Address::Name { host, port } = backend.id().address() else { return Ok(Vec::new()) };
    match timeout(LOOKUP_TIMEOUT, lookup_host((&**host, *port))).await {
        Ok(Ok(addresses)) => {
            let addresses: Vec<_> = addresses.collect();
            if addresses.is_empty() { Err("it has no address".to_owned()) } else { Ok(addresses) }
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the resolver did not answer in time".to_owned()),
    }
}
