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
        counters(encoder, "statera_picks", "Backends picked, by what the pick was made from", picks)?;
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
            "Sessions that wait because all backends have max_connections sessions",
            limited().map(|(labels, pool)| (labels, f64::from(pool.queue().waiting()))),
        )?;
        counters(
            encoder,
            "statera_pool_queued",
            "Sessions that waited, or wait, for a slot at a backend",
            limited().map(|(labels, pool)| (labels, pool.counters.sum(|c| &c.queued))),
        )?;
        gauges(
            encoder,
            "statera_pool_fail_open",
            "1 while health is ignored, because too little of the pool's weight is on healthy backends",
            by_pool(|pool| Some(f64::from(u8::from(pool.cell.load().fails_open)))),
        )?;
        gauges(
            encoder,
            "statera_snapshot_version",
            "The number of snapshots since the start",
            by_pool(|pool| Some(pool.cell.load().version as f64)),
        )?;
        gauges(
            encoder,
            "statera_snapshot_age_seconds",
            "Time since the begin of the last read that confirmed the snapshot; no sample before the first \
             table from Redis",
            by_pool(|pool| {
                // When Redis is empty, a table from the config or state_dir may be kept. No read of Redis
                // has confirmed such a table.
                let is_of_redis = pool.cell.load().origin == Origin::Redis;
                pool.cell.age().filter(|_| is_of_redis).map(|age| age.as_secs_f64())
            }),
        )
    }
}
