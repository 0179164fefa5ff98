//! Metrics of the pools: picks, the queue and the snapshot.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::samples::{counters, gauges};
use super::{Observed, ObservedPool};
use crate::balance::pool::{Pool, Source};
use crate::balance::snapshot::Origin;

impl Observed {
    pub(super) fn encode_pools(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let pools = self.pools();
        let picks = pools.iter().flat_map(|ObservedPool { pool, .. }| {
            Source::ALL.map(|source| {
                let labels = [("pool", pool.name.to_string()), ("source", source.name().to_owned())];
                (labels, pool.counters.sum(|c| &c.picks[source as usize]))
            })
        });
        counters(encoder, "statera_picks", "Backends named, by who named them", picks)?;
        let by_pool = |value: fn(&Pool) -> Option<f64>| {
            pools.iter().filter_map(move |ObservedPool { pool, .. }| {
                Some(([("pool", pool.name.to_string())], value(pool)?))
            })
        };
        let limited = || {
            let limited = pools.iter().map(|observed| &observed.pool).filter(|pool| pool.has_limit());
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
}
