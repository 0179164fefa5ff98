//! Many pools on one connection with a long round trip: the tables must stay fresh although pools × round
//! trip is long.

use std::time::Duration;

use crate::support::{Link, Passing, Proxy, Redis, eventually};

const POOLS: usize = 250;
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// The default of `redis.max_stale`. Reading one table after the other would take as long.
const MAX_STALE: Duration = Duration::from_secs(5);

/// A proxy with a table in Redis for each pool, over a link that delays every answer.
async fn start(settings: &str) -> (Redis, Link, Proxy) {
    let redis = Redis::start().await;
    let mut pools = String::new();
    let mut pipe = redis::pipe();
    for pool in 0..POOLS {
        pipe.zadd(format!("servers{pool}"), format!("10.0.0.{pool}:80"), 1).ignore();
        pools += &format!("p{pool}: {{weights_key: servers{pool}}}, ");
    }
    pipe.query_async::<()>(&mut redis.connection().await).await.expect("they are written");
    let link = Link::to(redis.port);
    link.pass(Passing::Late(ROUND_TRIP));
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: p0}}}}\npools: {{{pools}}}\n\
         redis: {{url: \"{}\", {settings}}}\n",
        link.url()
    ));
    (redis, link, proxy)
}

fn oldest(proxy: &Proxy) -> Option<Duration> {
    // A table that never came counts as the oldest.
    let pools = proxy.running.observed.pools();
    let ages = pools.iter().map(|observed| observed.pool.cell.age().unwrap_or(Duration::MAX));
    ages.max().filter(|age| *age != Duration::MAX)
}

async fn all_arrive(proxy: &Proxy) {
    eventually("all tables arrive", || async { oldest(proxy).is_some() }).await;
}

/// Asserts that every table stays fresh until `tables` more have been read.
async fn stay_fresh(proxy: &Proxy, tables: usize) {
    let reads = || proxy.metric("statera_redis_resyncs_total").expect("it is counted");
    let before = reads();
    eventually("the tables are read again", || async {
        let oldest = oldest(proxy).expect("each was read");
        assert!(oldest < MAX_STALE, "a table is stale: {oldest:?}");
        reads() >= before + tables as f64
    })
    .await;
}

#[tokio::test]
async fn tables_stay_fresh_although_pools_times_round_trip_is_longer_than_max_stale() {
    for settings in ["resync_interval: 2s", "watch: poll"] {
        let (_redis, _link, proxy) = start(settings).await;
        all_arrive(&proxy).await;
        stay_fresh(&proxy, POOLS * 3).await;
    }
}

#[tokio::test]
async fn a_new_connection_is_ready_before_the_tables_are_stale() {
    let (redis, _link, proxy) = start("resync_interval: 1h").await;
    all_arrive(&proxy).await;
    for round in 1..=2 {
        redis.run("CLIENT KILL TYPE pubsub").await;
        stay_fresh(&proxy, POOLS).await;
        assert!(proxy.metric("statera_redis_reconnects_total") >= Some(f64::from(round)));
    }
}
