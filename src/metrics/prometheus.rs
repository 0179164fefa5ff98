//! Writes the metrics, in the names of the contract, when someone asks for them.
//!
//! Sums over the workers here so that they need not. Labels come from the config and from backends' names, never from
//! clients. A backend's series go when nobody holds the backend any more.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::exposition::Exposition;
use super::format::Format;
use crate::balance::AdminState;
use crate::balance::backend::Backend;
use crate::balance::pool::{Pool, Source};
use crate::balance::snapshot::Origin;
use crate::observe::counters::{
    BUCKET_BOUNDS_SECONDS, BackendCounters, Counter, Histogram, HistogramTotal, PerWorker,
};
use crate::observe::log_sink::LogSink;
use crate::redis::status::{RedisStatus, TableStatus, WatchMode};
use crate::session::{CloseReason, Listener, SessionCounters};
use crate::state::SaveStatus;

/// Everything that is counted.
#[derive(Clone, Debug)]
pub struct Observed {
    /// In the order of the config.
    pub listeners: Vec<Arc<Listener>>,
    /// In the order of the config.
    pub pools: Vec<Arc<Pool>>,
    /// How sessions ended.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    /// `None`: no Redis is configured.
    pub redis: Option<Arc<RedisStatus>>,
    /// One for each pool.
    pub tables: Arc<[TableStatus]>,
    /// One for each pool; `None`: no tables are saved.
    pub saves: Option<Arc<[SaveStatus]>>,
    /// Where log lines go.
    pub log: Option<LogSink>,
}

/// All metrics as text, of about `size` bytes: a guess is enough. Costs some 10 µs a backend: not for the thread that watches
/// Redis.
#[must_use]
pub fn encode(observed: &Observed, format: Format, size: usize) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(observed.clone()));
    let mut exposition = Exposition::new(format, size);
    prometheus_client::encoding::text::encode(&mut exposition, &registry)
        .expect("writing to memory does not fail");
    exposition.into_text()
}

/// One backend of one pool, with what the newest snapshot says of it.
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
    fn rows(&self) -> Vec<Row> {
        let rows = |pool: &Arc<Pool>| {
            let snapshot = pool.cell.load();
            let weights: std::collections::HashMap<_, _> = snapshot
                .members()
                .iter()
                .map(|m| (m.backend.id().clone(), (m.weight.get(), m.effective_weight.get(), m.state)))
                .collect();
            let name = Arc::clone(&pool.name);
            pool.cell.registry().living().into_iter().map(move |backend| {
                let (weight, effective_weight, state) =
                    weights.get(backend.id()).copied().unwrap_or_default();
                Row { pool: Arc::clone(&name), backend, weight, effective_weight, state }
            })
        };
        self.pools.iter().flat_map(rows).collect()
    }

    fn encode_listeners(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let by_listener = |value: fn(&Listener) -> u64| {
            self.listeners.iter().map(move |l| ([("listener", l.name.to_string())], value(l)))
        };
        counters(
            encoder,
            "statera_listener_connections",
            "Connections accepted",
            by_listener(|l| l.counters.sum(|c| &c.connections)),
        )?;
        gauges(
            encoder,
            "statera_listener_connections_active",
            "Sessions that have not ended",
            by_listener(|l| {
                // Closed first: a session that opens in between may be missed, but none is counted below zero.
                let closed = l.counters.sum(|c| &c.closed);
                l.counters.sum(|c| &c.connections).saturating_sub(closed)
            })
            .map(|(labels, value)| (labels, value as f64)),
        )?;
        let rejected = self.listeners.iter().flat_map(|l| {
            let row =
                |reason, count| ([("listener", l.name.to_string()), ("reason", String::from(reason))], count);
            [
                row("exhausted", l.counters.sum(|c| &c.accept_exhausted)),
                row("accept_failed", l.counters.sum(|c| &c.accept_failed)),
                row("no_backend", l.counters.sum(|c| &c.no_backend)),
                row("queue_full", l.counters.sum(|c| &c.queue_full)),
                row("queue_timeout", l.counters.sum(|c| &c.queue_timeout)),
            ]
        });
        counters(
            encoder,
            "statera_listener_rejected",
            "Connections that could not be accepted, or found no backend or no place; exhausted: tries to accept without a free descriptor",
            rejected,
        )
    }

    fn encode_backends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.rows();
        encode_health(&rows, encoder)?;
        let mut count = |name: &str, help: &str, value: fn(&BackendCounters) -> &Counter| {
            counters(encoder, name, help, rows.iter().map(|row| (row.labels(), row.sum(value))))
        };
        count("statera_backend_connections", "Sessions that reached the backend", |c| &c.connections)?;
        count("statera_backend_connect_failures", "Attempts to connect that failed", |c| {
            &c.connect_failures
        })?;
        count("statera_backend_retries", "Sessions that went on to another backend", |c| &c.retries)?;
        count("statera_backend_bytes_received", "Bytes that came from the backend", |c| &c.bytes_received)?;
        count("statera_backend_bytes_sent", "Bytes that went to the backend", |c| &c.bytes_sent)?;

        let mut gauge = |name: &str, help: &str, value: fn(&Row) -> f64| {
            gauges(encoder, name, help, rows.iter().map(|row| (row.labels(), value(row))))
        };
        gauge("statera_backend_connections_active", "Sessions on the backend", |row| {
            let closed = row.sum(|c| &c.closed);
            row.sum(|c| &c.connections).saturating_sub(closed) as f64
        })?;
        gauge(
            "statera_backend_up",
            "1 if sessions can be sent there, 0 if its name does not resolve, its checks fail or it is ejected, at all addresses of its name",
            |row| f64::from(u8::from(row.backend.is_reachable() && row.backend.is_usable())),
        )?;
        gauge("statera_backend_weight", "What is written in Redis or in the config", |row| row.weight)?;
        gauge("statera_backend_effective_weight", "What picks use", |row| row.effective_weight)?;
        let not_ready = rows.iter().filter(|row| row.state != AdminState::Ready).map(|row| {
            let [pool, backend] = row.labels();
            ([pool, backend, ("state", row.state.name())], 1.0)
        });
        let help =
            "1 for the state that somebody has put the backend in: drain or maint; none where it is ready";
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

    fn encode_pools(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let picks = self.pools.iter().flat_map(|pool| {
            Source::ALL.map(|source| {
                let labels = [("pool", pool.name.to_string()), ("source", source.name().to_owned())];
                (labels, pool.counters.sum(|c| &c.picks[source as usize]))
            })
        });
        counters(encoder, "statera_picks", "Backends named, by who named them", picks)?;
        let by_pool = |value: fn(&Pool) -> Option<f64>| {
            self.pools.iter().filter_map(move |pool| Some(([("pool", pool.name.to_string())], value(pool)?)))
        };
        let limited = || {
            let limited = self.pools.iter().filter(|pool| pool.has_limit());
            limited.map(|pool| ([("pool", pool.name.to_string())], pool))
        };
        gauges(
            encoder,
            "statera_pool_queue",
            "Sessions that wait because all backends have as many as they may have",
            limited().map(|(labels, pool)| (labels, f64::from(pool.queue().waiting()))),
        )?;
        counters(
            encoder,
            "statera_pool_queued",
            "Sessions that waited, or wait, for a place at a backend",
            limited().map(|(labels, pool)| (labels, pool.counters.sum(|c| &c.queued))),
        )?;
        gauges(
            encoder,
            "statera_pool_fail_open",
            "1 while too little of the pool's weight is on healthy backends, so that health is ignored",
            by_pool(|pool| Some(f64::from(u8::from(pool.cell.load().fails_open)))),
        )?;
        gauges(
            encoder,
            "statera_snapshot_version",
            "Counts the snapshots since the start",
            by_pool(|pool| Some(pool.cell.load().version as f64)),
        )?;
        gauges(
            encoder,
            "statera_snapshot_age_seconds",
            "Since the question whose answer last said that the snapshot equals Redis; none before it came from there",
            by_pool(|pool| {
                // An emptied Redis may let a table stand that came from elsewhere; that makes it no equal.
                let is_of_redis = pool.cell.load().origin == Origin::Redis;
                pool.cell.age().filter(|_| is_of_redis).map(|age| age.as_secs_f64())
            }),
        )
    }

    fn encode_redis(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(redis) = &self.redis else { return Ok(()) };
        let none: [(&str, &str); 0] = [];
        let connected = f64::from(u8::from(redis.is_connected()));
        gauges(
            encoder,
            "statera_redis_connected",
            "1 while all watching connections are up",
            [(none, connected)],
        )?;
        let modes =
            WatchMode::ALL.map(|mode| ([("mode", mode.name())], f64::from(u8::from(redis.mode() == mode))));
        gauges(encoder, "statera_redis_watch_mode", "1 for the way in which changes are noticed now", modes)?;
        for (name, help, counter) in [
            ("statera_redis_notifications", "Keyspace events received", &redis.notifications),
            ("statera_redis_resyncs", "Whole tables read", &redis.resyncs),
            ("statera_redis_reconnects", "Watching connections made after the first", &redis.reconnects),
        ] {
            counters(encoder, name, help, [(none, counter.get())])?;
        }
        let tables = || {
            self.pools
                .iter()
                .zip(self.tables.iter())
                .map(|(pool, table)| ([("pool", pool.name.to_string())], table))
        };
        gauges(
            encoder,
            "statera_table_rejected_members",
            "Members of the table that are left out",
            tables().map(|(labels, table)| (labels, table.rejected_members.load(Relaxed) as f64)),
        )?;
        gauges(
            encoder,
            "statera_pool_table_kept",
            "1 while Redis holds no weights and the last table serves all the same (redis.on_empty)",
            tables().map(|(labels, table)| (labels, f64::from(u8::from(table.is_kept.load(Relaxed))))),
        )?;
        counters(
            encoder,
            "statera_table_failed_reads",
            "Reads of the table that Redis refused, or that gave no table",
            tables().map(|(labels, table)| (labels, table.failed_reads.get())),
        )?;
        if let Some(saves) = &self.saves {
            let by_pool = self.pools.iter().zip(saves.iter());
            counters(
                encoder,
                "statera_state_writes_failed",
                "Tries to save the table in state_dir that failed",
                by_pool.map(|(pool, save)| ([("pool", pool.name.to_string())], save.failed_writes.get())),
            )?;
        }
        let mut propagation = HistogramTotal::default();
        redis.propagation.add_to(&mut propagation);
        histograms(
            encoder,
            "statera_weight_propagation_seconds",
            "From the arrival of a notification to the swap that all workers see",
            [(none, propagation)],
        )
    }
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
        counters(&mut encoder, "statera_sessions_closed", "Sessions that ended, by why", closed)?;
        if let Some(log) = &self.log {
            let none: [(&str, &str); 0] = [];
            let help = "Log lines that were lost because the output failed or did not keep up";
            counters(&mut encoder, "statera_log_dropped", help, [(none, log.dropped())])?;
        }
        let build = [("version", env!("CARGO_PKG_VERSION"))];
        gauges(&mut encoder, "statera_build_info", "What runs", [(build, 1.0)])
    }
}

fn encode_health(rows: &[Row], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let checks = rows.iter().flat_map(|row| {
        let [pool, backend] = row.labels();
        let counted = ["passed", "failed"].into_iter().zip(&row.backend.condition.checks);
        // Most pools check none.
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

/// False for `[_; 0]`. The encoder would print an empty family as `name{} 1`, where people look for `name 1`.
const fn has_labels<L>() -> bool {
    size_of::<L>() > 0
}

fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        if has_labels::<L>() {
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        } else {
            metric.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
    }
    Ok(())
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, f64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        if has_labels::<L>() {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        } else {
            metric.encode_gauge(&value)?;
        }
    }
    Ok(())
}

/// Histograms without an observation are left out: 10,000 backends that nobody uses need no 400,000 lines.
fn histograms<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, HistogramTotal)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for (labels, total) in samples {
        let count = total.buckets.iter().sum();
        if count == 0 {
            continue;
        }
        let bounds = BUCKET_BOUNDS_SECONDS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(total.buckets).collect();
        metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
            total.sum_seconds,
            count,
            &buckets,
            None,
        )?;
    }
    Ok(())
}
