//! A metric shows whether a pool keeps a table that Redis no longer has.

use crate::support::{Proxy, Redis, eventually};

async fn kept_becomes(proxy: &Proxy, why: &str, wanted: f64) {
    eventually(why, || async { proxy.metric("statera_pool_table_kept{pool=\"web\"}") == Some(wanted) }).await;
}

async fn proxy_with(redis: &Redis, on_empty: &str) -> Proxy {
    let section = format!("redis: {{url: \"{}\", on_empty: {on_empty}}}", redis.url());
    let proxy = Proxy::web(&section, "weights_key: servers");
    redis.run("ZADD servers 3 10.0.0.1:80").await;
    eventually("it has the table", || async { proxy.weights().len() == 1 }).await;
    kept_becomes(&proxy, "the table is Redis's", 0.0).await;
    proxy
}

#[tokio::test]
async fn a_metric_shows_that_a_table_is_kept_although_redis_has_none() {
    let redis = Redis::start().await;
    let proxy = proxy_with(&redis, "keep_last").await;
    for emptied in ["DEL servers", "ZREM servers 10.0.0.1:80"] {
        redis.run(emptied).await;
        kept_becomes(&proxy, emptied, 1.0).await;
        assert_eq!(proxy.weights().len(), 1);
        redis.run("ZADD servers 4 10.0.0.1:80").await;
        kept_becomes(&proxy, "there is a table again", 0.0).await;
    }
}

#[tokio::test]
async fn a_table_that_is_refused_when_empty_is_not_kept() {
    let redis = Redis::start().await;
    let proxy = proxy_with(&redis, "refuse").await;
    redis.run("DEL servers").await;
    eventually("it is empty", || async { proxy.weights().is_empty() }).await;
    kept_becomes(&proxy, "nothing is kept", 0.0).await;
}
