//! Metrics of Redis: the connections, the tables that are read, and the saved tables.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::encoding::DescriptorEncoder;

use super::samples::{counters, gauges, histograms};
use super::{Observed, ObservedPool};
use crate::observe::counters::HistogramTotal;
use crate::redis::status::WatchMode;

impl Observed {
    pub(super) fn encode_redis(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(redis) = &self.redis else { return Ok(()) };
        let none: [(&str, &str); 0] = [];
        let connected = f64::from(u8::from(redis.is_connected()));
        gauges(
            encoder,
            "statera_redis_connected",
            "1 while all watching connections are established",
            [(none, connected)],
        )?;
        let modes =
            WatchMode::ALL.map(|mode| ([("mode", mode.name())], f64::from(u8::from(redis.mode() == mode))));
        gauges(encoder, "statera_redis_watch_mode", "1 for the watch mode in use", modes)?;
        for (name, help, counter) in [
            ("statera_redis_notifications", "Messages that a key may have changed", &redis.notifications),
            ("statera_redis_resyncs", "Whole tables read", &redis.resyncs),
            ("statera_redis_reconnects", "Watching connections made after the first", &redis.reconnects),
        ] {
            counters(encoder, name, help, [(none, counter.get())])?;
        }
        let pools = self.pools();
        let tables =
            || pools.iter().map(|observed| ([("pool", observed.pool.name.to_string())], &*observed.table));
        gauges(
            encoder,
            "statera_table_rejected_members",
            "Members of the table that were ignored because they are invalid",
            tables().map(|(labels, table)| (labels, table.rejected_members.load(Relaxed) as f64)),
        )?;
        gauges(
            encoder,
            "statera_pool_table_kept",
            "1 while Redis has no weights and the last table is kept (redis.on_empty)",
            tables().map(|(labels, table)| (labels, f64::from(u8::from(table.is_kept.load(Relaxed))))),
        )?;
        counters(
            encoder,
            "statera_table_failed_reads",
            "Reads of the table that Redis refused or that gave no valid table",
            tables().map(|(labels, table)| (labels, table.failed_reads.get())),
        )?;
        let saved =
            || pools.iter().filter_map(|ObservedPool { pool, saves, .. }| Some((pool, saves.as_ref()?)));
        if saved().next().is_some() {
            counters(
                encoder,
                "statera_state_writes_failed",
                "Writes of the table to state_dir that failed",
                saved().map(|(pool, saves)| ([("pool", pool.name.to_string())], saves.failed_writes.get())),
            )?;
        }
        let mut propagation = HistogramTotal::default();
        redis.propagation.add_to(&mut propagation);
        histograms(
            encoder,
            "statera_weight_propagation_seconds",
            "From the arrival of a notification to the new snapshot, which all workers use at once",
            [(none, propagation)],
        )
    }
}
