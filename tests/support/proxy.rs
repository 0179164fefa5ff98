//! The proxy in the process of the test, on free ports.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use statera::config::Config;
use statera::metrics;
use statera::metrics::format::Format;
use statera::observe::log_sink::LogSink;
use statera::supervisor::{self, Running};

use super::eventually;

/// A running proxy with its session lines and its metrics. Dropping it stops it.
pub struct Proxy {
    pub running: Running,
    lines: Arc<Mutex<Vec<u8>>>,
    sink: LogSink,
}

struct SharedBuffer(Arc<Mutex<Vec<u8>>>);

impl Write for SharedBuffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no thread panics with the lock").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Proxy {
    /// Starts a proxy with one listener and one pool, both called `web`. `top` are lines at the top level
    /// (`redis: {…}`), `pool` the settings of the pool in flow style: `backends: {"127.0.0.1:1": 1},
    /// balance: weighted_round_robin`.
    pub fn web(top: &str, pool: &str) -> Self {
        Self::start(&format!(
            "workers: 2\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
             pools: {{web: {{{pool}}}}}\n{top}\n"
        ))
    }

    pub fn start(yaml: &str) -> Self {
        let config = Config::from_yaml(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = LogSink::start(Box::new(SharedBuffer(Arc::clone(&lines)))).expect("a thread");
        let running = supervisor::start(&config, Some(sink.clone())).expect("it starts");
        Self { running, lines, sink }
    }

    /// The first address of the first listener.
    pub fn address(&self) -> SocketAddr {
        self.running.addresses[0].1[0]
    }

    /// The session lines so far. The line of a session may come up to 50 ms after its end.
    pub fn access_lines(&self) -> Vec<serde_json::Value> {
        self.sink.flush(super::PATIENCE);
        let lines = self.lines.lock().expect("no thread panics with the lock");
        let text = String::from_utf8(lines.clone()).expect("lines are text");
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// The value of a series, by its name and labels as printed:
    /// `statera_picks_total{pool="web",source="lua"}`. `None` if there is no such series.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let text = metrics::encode(&self.running.observed, Format::Classic, 0);
        let value =
            text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned));
        value.map(|value| value.parse().unwrap_or_else(|e| panic!("{series}: {value}: {e}")))
    }

    /// A metric of one backend of the pool `web`, by its name after `statera_backend_`. It must be there.
    pub fn backend_metric(&self, name: &str, backend: SocketAddr) -> f64 {
        let series = backend_series(name, backend);
        self.metric(&series).unwrap_or_else(|| panic!("{series} is not there"))
    }

    /// The lines of the sessions with this `close_reason`, once there are `count` or more.
    pub async fn lines_closed_by(&self, reason: &str, count: usize) -> Vec<serde_json::Value> {
        let lines = || -> Vec<serde_json::Value> {
            self.access_lines().into_iter().filter(|line| line["close_reason"] == reason).collect()
        };
        eventually(&format!("{count} lines say {reason}"), || async { lines().len() >= count }).await;
        lines()
    }

    /// How many picks of this `source` have found a backend.
    pub fn picks(&self, source: &str) -> f64 {
        self.metric(&format!("statera_picks_total{{pool=\"web\",source=\"{source}\"}}")).unwrap_or_default()
    }

    /// The backends of the newest snapshot with their weights, sorted by name.
    pub fn weights(&self) -> Vec<(String, f64)> {
        let snapshot = self.running.observed.pools()[0].pool.cell.load();
        let mut weights: Vec<_> =
            snapshot.members().iter().map(|m| (m.backend.id().to_string(), m.weight.get())).collect();
        weights.sort_by(|a, b| a.0.cmp(&b.0));
        weights
    }
}

/// The name and labels, as [`Proxy::metric`] takes them, of a metric of one backend of the pool `web`.
pub fn backend_series(name: &str, backend: SocketAddr) -> String {
    format!("statera_backend_{name}{{pool=\"web\",backend=\"{backend}\"}}")
}
