//! The metrics, by the names of the contract, encoded when a scraper asks for them.
//!
//! Each of `listeners`, `backends`, `pools` and `redis` encodes one subject: it reads the counters in
//! [`Observed`] and sums over the workers. Labels come from the config and from the names of backends, never
//! from clients.

mod backends;
mod exposition;
pub mod format;
mod listeners;
mod observed;
mod pools;
mod redis;
mod samples;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;

use self::exposition::Exposition;
use self::format::Format;
pub use self::observed::{Observed, ObservedPool};
use self::samples::{counters, gauges};
use crate::observe::tasks::Task;
use crate::session::{CloseReason, SessionCounters};

/// Returns all metrics as text. `size` is a guess of its length in bytes. Costs about 10 µs a backend, so
/// `admin/scrapes.rs` calls it on a thread of its own where the system gives one.
#[must_use]
pub fn encode(observed: &Observed, format: Format, size: usize) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(observed.clone()));
    let mut exposition = Exposition::new(format, size);
    prometheus_client::encoding::text::encode(&mut exposition, &registry)
        .expect("writing to memory does not fail");
    exposition.into_text()
}

impl Collector for Observed {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_listeners(&mut encoder)?;
        self.encode_backends(&mut encoder)?;
        self.encode_pools(&mut encoder)?;
        self.encode_redis(&mut encoder)?;
        let closed = CloseReason::ALL.map(|reason| {
            ([("reason", reason.name())], self.sessions.sum(|sessions| sessions.closed(reason)))
        });
        counters(&mut encoder, "statera_sessions_closed", "Sessions that ended, by reason", closed)?;
        let none: [(&str, &str); 0] = [];
        let panicked = self.sessions.sum(SessionCounters::panicked);
        let help = "Sessions that panicked, which is a defect";
        counters(&mut encoder, "statera_session_panics", help, [(none, panicked)])?;
        let restarted = Task::ALL.map(|task| ([("task", task.name())], self.restarts.of(task)));
        let help = "Restarts of tasks and threads that panicked, failed or ended, which is a defect";
        counters(&mut encoder, "statera_task_restarts", help, restarted)?;
        if let Some(log) = &self.log {
            let help = "Log lines lost because the output failed or did not keep up";
            counters(&mut encoder, "statera_log_dropped", help, [(none, log.dropped())])?;
        }
        let build = [("version", env!("CARGO_PKG_VERSION"))];
        gauges(&mut encoder, "statera_build_info", "The version that runs, as a label", [(build, 1.0)])
    }
}
