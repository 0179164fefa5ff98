//! How long a weight takes from `ZADD`'s reply to the swap that every worker sees.
//!
//! `cargo bench --bench propagation` starts a redis-server of its own, changes one weight 1,000 times, one after the
//! other, and watches the snapshot cell that all workers read. With `-- cluster` it starts three that are one Redis Cluster.
//! Targets: median < 2 ms, p99 < 10 ms.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use statera::config::Config;
use statera::proxy::{self, Running};
use tokio::time::Instant;

const CHANGES: u32 = 1_000;
const BACKENDS: usize = 10;
const LIMIT: Duration = Duration::from_secs(5);

struct Redis(Child);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn weight(running: &Running, member: &str) -> Option<f64> {
    let snapshot = running.observed.pools[0].cell.load();
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

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port()
}

/// A server that answers, and a connection to it.
fn start(more: &[&str]) -> (Redis, u16, redis::Connection) {
    let port = free_port();
    let server = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
        .args(["--notify-keyspace-events", "KA"])
        .args(more)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed (apt-get install redis-server)");
    let server = Redis(server);
    let client = redis::Client::open(("127.0.0.1", port)).expect("an address");
    let begun = Instant::now();
    loop {
        match client.get_connection() {
            Ok(connection) => return (server, port, connection),
            Err(error) => assert!(begun.elapsed() < LIMIT, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Three primaries that know each other; the first has the upper slots, that of `servers` (11,335) among them.
fn start_cluster(folder: &Path) -> Vec<(Redis, u16, redis::Connection)> {
    const BOUNDS: [u16; 4] = [16_384, 10_923, 5_461, 0];
    let mut nodes: Vec<_> = (0..3)
        .map(|node| {
            let (file, bus) = (folder.join(format!("nodes-{node}")), free_port().to_string());
            let file = file.to_str().expect("a text");
            start(&["--cluster-enabled", "yes", "--cluster-config-file", file, "--cluster-port", &bus])
        })
        .collect();
    let (first, first_bus) = {
        let connection = &mut nodes[0].2;
        let (_, bus): (String, u16) =
            redis::cmd("CONFIG").arg("GET").arg("cluster-port").query(connection).expect("redis runs");
        (nodes[0].1, bus)
    };
    for (place, (_, _, connection)) in nodes.iter_mut().enumerate() {
        let mut cluster = |words: &[&str]| {
            redis::cmd("CLUSTER").arg(words).exec(connection).expect("redis runs");
        };
        cluster(&["SET-CONFIG-EPOCH", &(place + 1).to_string()]);
        cluster(&["ADDSLOTSRANGE", &BOUNDS[place + 1].to_string(), &(BOUNDS[place] - 1).to_string()]);
        if place > 0 {
            cluster(&["MEET", "127.0.0.1", &first.to_string(), &first_bus.to_string()]);
        }
    }
    let begun = Instant::now();
    for (_, _, connection) in &mut nodes {
        let mut is_whole = || {
            let info: String = redis::cmd("CLUSTER").arg("INFO").query(connection).expect("redis runs");
            info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
        };
        while !is_whole() {
            assert!(begun.elapsed() < LIMIT * 4, "the nodes do not find each other");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    nodes
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut nodes, section) = if std::env::args().any(|argument| argument == "cluster") {
        let nodes = start_cluster(folder.path());
        let section = format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", nodes[2].1);
        (nodes, section)
    } else {
        let node = start(&[]);
        let section = format!("url: \"redis://127.0.0.1:{}/0\"", node.1);
        (vec![node], section)
    };
    let connection = &mut nodes[0].2;
    let members: Vec<String> = (0..BACKENDS).map(|i| format!("10.0.0.{}:80", i + 1)).collect();
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
    let running = proxy::start(&config, None).expect("it starts");
    wait_for(&running, &members[0], 1.0);

    let mut taken: Vec<Duration> = (0..CHANGES)
        .map(|change| {
            let member = &members[change as usize % BACKENDS];
            let value = f64::from(change + 2);
            let replied = zadd(member, value);
            wait_for(&running, member, value);
            replied.elapsed()
        })
        .collect();
    taken.sort_unstable();
    let at = |quantile: f64| taken[((taken.len() - 1) as f64 * quantile) as usize];
    println!(
        "propagation over {CHANGES} changes of a table of {BACKENDS}: median {:?}, p90 {:?}, p99 {:?}, max {:?}",
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    );
}
