//! How long a weight takes from `ZADD`'s reply to the swap that every worker sees.
//!
//! `cargo bench --bench propagation` does it for one redis-server by TCP, by a unix socket and by TLS, behind
//! a sentinel, and in a Redis Cluster of three, one after the other, or for those that are named after `--`.
//! It starts the servers itself, changes one weight 1,000 times, and watches the snapshot cell that all
//! workers read: first each change some time after the one before, then each as soon as the one before is
//! there, which finds the reader at rest (docs/decisions/0006-whole-snapshots.md). Targets: median < 2 ms,
//! p99 < 10 ms.

mod servers;

use std::time::Duration;

use statera::config::Config;
use statera::supervisor::{self, Running};
use tokio::time::Instant;

use servers::{Servers, TOPOLOGIES};

const CHANGES: usize = 1_000;
/// Longer than the reader rests.
const PAUSE: Duration = Duration::from_millis(3);
const BACKENDS: usize = 10;
const LIMIT: Duration = Duration::from_secs(5);

fn weight(running: &Running, member: &str) -> Option<f64> {
    let snapshot = running.observed.pools()[0].pool.cell.load();
    snapshot.members().iter().find(|m| m.backend.id().as_str() == member).map(|m| m.weight.get())
}

fn wait_for(running: &Running, member: &str, expected: f64) {
    let begun = Instant::now();
    while weight(running, member) != Some(expected) {
        assert!(begun.elapsed() < LIMIT, "{member} does not get weight {expected}");
        // Two cores: the control thread and Redis need one of them.
        std::thread::yield_now();
    }
}

/// How long each change took, of those that come [`PAUSE`] after another and of those that come at once:
/// sorted.
fn measure(servers: &mut Servers) -> [(&'static str, Vec<Duration>); 2] {
    let members: Vec<String> = (0..BACKENDS).map(|i| format!("10.0.0.{}:80", i + 1)).collect();
    let Servers { connection, section, .. } = servers;
    let mut zadd = |member: &str, weight: f64| {
        redis::cmd("ZADD").arg("servers").arg(weight).arg(member).exec(connection).expect("redis runs");
        Instant::now()
    };
    for member in &members {
        zadd(member, 1.0);
    }
    let yaml = format!(
        "redis: {{{section}}}\nworkers: 2\n\
         listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n"
    );
    let config = Config::from_yaml(&yaml).expect("a valid config");
    let running = supervisor::start(&config, None).expect("it starts");
    wait_for(&running, &members[0], 1.0);

    let mut value = 1.0;
    [("single", PAUSE), ("in a row", Duration::ZERO)].map(|(name, pause)| {
        let change = |change: usize| {
            std::thread::sleep(pause);
            let member = &members[change % BACKENDS];
            value += 1.0;
            let replied = zadd(member, value);
            wait_for(&running, member, value);
            replied.elapsed()
        };
        let mut taken: Vec<Duration> = (0..CHANGES).map(change).collect();
        taken.sort_unstable();
        (name, taken)
    })
}

fn main() {
    // Cargo adds one of its own.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let is_known = |name: &&String| TOPOLOGIES.iter().any(|(known, _)| known == name);
    if let Some(unknown) = wanted.iter().find(|name| !is_known(name)) {
        let known: Vec<&str> = TOPOLOGIES.iter().map(|(name, _)| *name).collect();
        eprintln!("{unknown:?} is none of {}", known.join(", "));
        std::process::exit(2);
    }
    println!("ZADD's reply to the swap, {CHANGES} changes of a table of {BACKENDS}");
    for (name, start) in
        TOPOLOGIES.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| w == name))
    {
        let folder = tempfile::tempdir().expect("a folder");
        for (kind, taken) in measure(&mut start(folder.path())) {
            let [median, p90, p99, max] =
                [0.5, 0.9, 0.99, 1.0].map(|quantile| taken[((taken.len() - 1) as f64 * quantile) as usize]);
            println!("{name:<8} {kind:<8} median {median:?}, p90 {p90:?}, p99 {p99:?}, max {max:?}");
        }
    }
}
