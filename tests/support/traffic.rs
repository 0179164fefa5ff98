//! Traffic that runs while a scenario breaks something: clients that open one session after the other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{eventually, greeting};

const CLIENTS: usize = 4;
/// The pause between two sessions of a client, which makes some hundred sessions a second in all.
const PAUSE: Duration = Duration::from_millis(8);
const LONGEST: Duration = Duration::from_secs(90);
const MOST_PER_CLIENT: usize = 10_000;

/// Clients that connect, read the name of a [`super::Backend::named`] and connect again, until
/// [`Traffic::stop`].
pub struct Traffic {
    stop: Arc<AtomicBool>,
    completed: Arc<AtomicU64>,
    clients: JoinSet<Outcome>,
}

/// The results of all sessions.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many sessions each backend has served, by its name.
    pub served: BTreeMap<String, u64>,
    pub failures: Vec<String>,
    pub durations: Vec<Duration>,
}

impl Traffic {
    pub fn start(address: SocketAddr) -> Self {
        let (stop, completed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(client(address, Arc::clone(&stop), Arc::clone(&completed)));
        }
        Self { stop, completed, clients }
    }

    /// Waits until `sessions` more sessions have completed.
    pub async fn more(&self, sessions: u64) {
        let wanted = self.completed.load(Relaxed) + sessions;
        eventually("traffic goes on", || async { self.completed.load(Relaxed) >= wanted }).await;
    }

    /// Ends the traffic. Panics if a session failed.
    pub async fn stop(mut self) -> Outcome {
        self.stop.store(true, Relaxed);
        let mut all = Outcome::default();
        while let Some(client) = self.clients.join_next().await {
            let Outcome { served, failures, durations } = client.expect("a client does not panic");
            for (name, count) in served {
                *all.served.entry(name).or_default() += count;
            }
            all.failures.extend(failures);
            all.durations.extend(durations);
        }
        all.durations.sort_unstable();
        let (failed, sessions) = (all.failures.len(), all.durations.len());
        assert!(failed == 0, "{failed} of {sessions} sessions failed, the first: {}", all.failures[0]);
        all
    }
}

impl Outcome {
    pub fn median(&self) -> Duration {
        self.durations[self.durations.len() / 2]
    }
}

async fn client(address: SocketAddr, stop: Arc<AtomicBool>, completed: Arc<AtomicU64>) -> Outcome {
    let mut outcome = Outcome::default();
    let deadline = Instant::now() + LONGEST;
    while !stop.load(Relaxed) && Instant::now() < deadline && outcome.durations.len() < MOST_PER_CLIENT {
        let started = Instant::now();
        match greeting(address).await {
            Ok(name) if !name.is_empty() => *outcome.served.entry(name).or_default() += 1,
            Ok(_) => outcome.failures.push("closed without a byte".to_owned()),
            Err(error) => outcome.failures.push(error.to_string()),
        }
        outcome.durations.push(started.elapsed());
        completed.fetch_add(1, Relaxed);
        sleep(PAUSE).await;
    }
    outcome
}
