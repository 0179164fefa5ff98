//! Metrics of the backends. A backend has metrics as long as any part of the process refers to it.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::DescriptorEncoder;

use super::samples::{counters, gauges, histograms};
use super::{Observed, ObservedPool};
use crate::balance::AdminState;
use crate::balance::backend::Backend;
use crate::observe::counters::{BackendCounters, Counter, Histogram, HistogramTotal};

/// One backend of one pool, with its weight and state in the newest snapshot.
struct Row {
    pool: Arc<str>,
    backend: Arc<Backend>,
    weight: f64,
    effective_weight: f64,
    state: AdminState,
}

impl Row {
    fn labels(&self) -> [(&str, &str); 2] {
        [("pool", &self.pool), ("backend", self.backend.id().as_str())]
    }

    fn sum(&self, counter: impl Fn(&BackendCounters) -> &Counter) -> u64 {
        self.backend.counters.sum(counter)
    }
}

impl Observed {
    pub(super) fn encode_backends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.rows();
        encode_health(&rows, encoder)?;
        let mut count = |name: &str, help: &str, value: fn(&BackendCounters) -> &Counter| {
            counters(encoder, name, help, rows.iter().map(|row| (row.labels(), row.sum(value))))
        };
        count("statera_backend_connections", "Sessions that connected to the backend", |c| &c.connections)?;
        count("statera_backend_connect_failures", "Attempts to connect that failed", |c| {
            &c.connect_failures
        })?;
        count("statera_backend_retries", "Sessions that tried another backend after this one failed", |c| {
            &c.retries
        })?;
        count("statera_backend_bytes_received", "Bytes received from the backend", |c| &c.bytes_received)?;
        count("statera_backend_bytes_sent", "Bytes sent to the backend", |c| &c.bytes_sent)?;

        let mut gauge = |name: &str, help: &str, value: fn(&Row) -> f64| {
            gauges(encoder, name, help, rows.iter().map(|row| (row.labels(), value(row))))
        };
        gauge("statera_backend_connections_active", "Sessions on the backend", |row| {
            let closed = row.sum(|c| &c.closed);
            row.sum(|c| &c.connections).saturating_sub(closed) as f64
        })?;
        gauge(
            "statera_backend_up",
            "1 if sessions can be sent to the backend, 0 if its name does not resolve, its checks fail or it \
             is ejected, at all addresses of its name",
            |row| f64::from(u8::from(row.backend.is_reachable() && row.backend.is_usable())),
        )?;
        gauge("statera_backend_weight", "The weight in Redis or in the config", |row| row.weight)?;
        gauge("statera_backend_effective_weight", "The weight that picks use", |row| row.effective_weight)?;
        let not_ready = rows.iter().filter(|row| row.state != AdminState::Ready).map(|row| {
            let [pool, backend] = row.labels();
            ([pool, backend, ("state", row.state.name())], 1.0)
        });
        let help = "1 for the admin state of the backend, drain or maint; no sample while it is ready";
        gauges(encoder, "statera_backend_admin_state", help, not_ready)?;

        let mut histogram = |name: &str, help: &str, value: fn(&BackendCounters) -> &Histogram| {
            let totals = rows.iter().map(|row| {
                let mut total = HistogramTotal::default();
                row.backend.counters.iter().for_each(|c| value(c).add_to(&mut total));
                (row.labels(), total)
            });
            histograms(encoder, name, help, totals)
        };
        histogram("statera_backend_connect_duration_seconds", "Successful attempts to connect", |c| {
            &c.connect_duration
        })?;
        histogram("statera_backend_session_duration_seconds", "Sessions from accept to close", |c| {
            &c.session_duration
        })
    }

    fn rows(&self) -> Vec<Row> {
        let rows = |ObservedPool { pool, .. }: &ObservedPool| {
            let snapshot = pool.cell.load();
            let weights: HashMap<_, _> = snapshot
                .members()
                .iter()
                .map(|m| (m.backend.id().clone(), (m.weight.get(), m.effective_weight.get(), m.state)))
                .collect();
            let name = Arc::clone(&pool.name);
            pool.registry.living().into_iter().map(move |backend| {
                let (weight, effective_weight, state) =
                    weights.get(backend.id()).copied().unwrap_or_default();
                Row { pool: Arc::clone(&name), backend, weight, effective_weight, state }
            })
        };
        self.pools().iter().flat_map(rows).collect()
    }
}

fn encode_health(rows: &[Row], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let checks = rows.iter().flat_map(|row| {
        let [pool, backend] = row.labels();
        let counted = ["passed", "failed"].into_iter().zip(&row.backend.condition.checks);
        // Backends without health checks get no sample.
        let counted = counted.filter(|(_, count)| count.get() > 0);
        counted.map(move |(result, count)| ([pool, backend, ("result", result)], count.get()))
    });
    counters(encoder, "statera_backend_health_checks", "Health checks that ended", checks)?;
    let ejected = rows.iter().map(|row| (row.labels(), row.backend.condition.ejections.get()));
    counters(
        encoder,
        "statera_backend_ejections",
        "How often the backend was ejected because its sessions failed",
        ejected,
    )
}
