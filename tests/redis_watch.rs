//! The watch modes: which one the proxy uses, what each of them misses, and what happens when a mode is not
//! available any more.

use crate::support::{
    Backend, LEAST_RIGHTS, Program, Proxy, Redis, Traffic, eventually, follow, mode_becomes,
};

/// With these settings a change arrives in time only if the server announces it.
const ANNOUNCED: &str = "resync_interval: 1h, on_empty: refuse, poll_interval: 1h, max_stale: 2h";
/// With these settings the proxy checks the mode again every second.
const HASTY: &str = "resync_interval: 1s, poll_interval: 50ms, heartbeat_interval: 200ms, max_stale: 2s";

fn follow_as_user(redis: &Redis, more: &str) -> Proxy {
    follow(redis, &format!("username: statera, password: secret, {more}"))
}

/// Writes another weight and waits until the proxy has it.
async fn follows(proxy: &Proxy, redis: &Redis, weight: f64) {
    redis.run(&format!("ZADD servers {weight} 10.0.0.1:80")).await;
    let wanted = [("10.0.0.1:80".to_owned(), weight)];
    eventually(&format!("the weight becomes {weight}"), || async { proxy.weights() == wanted }).await;
}

async fn empties(proxy: &Proxy, redis: &Redis, command: &str) {
    redis.run(command).await;
    eventually(command, || async { proxy.weights().is_empty() }).await;
}

#[tokio::test]
async fn without_notifications_changes_are_noticed_by_tracking() {
    let redis = Redis::start_with(&[]).await;
    let proxy = follow(&redis, ANNOUNCED);
    mode_becomes(&proxy, "tracking").await;
    assert_eq!(proxy.metric("statera_redis_watch_mode{mode=\"notifications\"}"), Some(0.0));
    for weight in 1..=5 {
        follows(&proxy, &redis, f64::from(weight)).await;
    }
    assert!(proxy.metric("statera_redis_notifications_total") >= Some(5.0), "a change was not announced");
}

#[tokio::test]
async fn a_flush_is_noticed_at_once_if_the_server_tracks() {
    let (notifying, silent) = (Redis::start().await, Redis::start_with(&[]).await);
    for (redis, watch, mode) in [
        (&notifying, "auto", "notifications"),
        (&silent, "auto", "tracking"),
        (&notifying, "tracking", "tracking"),
    ] {
        let proxy = follow(redis, &format!("watch: {watch}, {ANNOUNCED}"));
        mode_becomes(&proxy, mode).await;
        for command in ["FLUSHALL", "FLUSHDB ASYNC"] {
            follows(&proxy, redis, 1.0).await;
            empties(&proxy, redis, command).await;
        }
    }
}

#[tokio::test]
async fn a_change_that_is_announced_twice_is_counted_once() {
    let redis = Redis::start().await;
    let proxy = follow(&redis, ANNOUNCED);
    mode_becomes(&proxy, "notifications").await;
    for weight in 1..=20 {
        follows(&proxy, &redis, f64::from(weight)).await;
    }
    assert_eq!(proxy.metric("statera_redis_notifications_total"), Some(20.0));
    let reads = proxy.metric("statera_redis_resyncs_total").expect("it is counted");
    // Both messages come in one packet and cause one read. On a busy machine a read may begin between them.
    assert!(reads <= 30.0, "{reads} reads for 20 changes");
}

#[tokio::test]
async fn pools_whose_keys_begin_alike_are_all_tracked() {
    let redis = Redis::start_with(&[]).await;
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{a: {{bind: \"127.0.0.1:0\", pool: one}}}}\nredis: {{url: \"{}\", {ANNOUNCED}}}\n\
         pools: {{one: {{weights_key: web}}, two: {{weights_key: web2}}}}\n",
        redis.url()
    ));
    mode_becomes(&proxy, "tracking").await;
    for (pool, key) in [(0, "web"), (1, "web2"), (0, "web")] {
        let weight = || {
            proxy.running.observed.pools()[pool].pool.cell.load().members().first().map(|m| m.weight.get())
        };
        let next = weight().unwrap_or(0.0) + 1.0;
        redis.run(&format!("ZADD {key} {next} 10.0.0.1:80")).await;
        eventually("the pool sees it", || async { weight() == Some(next) }).await;
    }
}

#[tokio::test]
async fn tracking_outlives_a_reconnect() {
    let redis = Redis::start_with(&[]).await;
    let proxy = follow(&redis, ANNOUNCED);
    follows(&proxy, &redis, 1.0).await;
    for round in 1..=3 {
        // A tracking connection is subscribed too, so it counts as pubsub.
        redis.run("CLIENT KILL TYPE pubsub").await;
        let reconnects = f64::from(round);
        eventually("it has connected again", || async {
            proxy.metric("statera_redis_reconnects_total") >= Some(reconnects)
        })
        .await;
        mode_becomes(&proxy, "tracking").await;
        follows(&proxy, &redis, 10.0 + reconnects).await;
    }
}

#[tokio::test]
async fn notifications_that_are_switched_off_are_replaced_by_tracking_and_used_again_later() {
    let redis = Redis::start().await;
    let proxy = follow(&redis, HASTY);
    mode_becomes(&proxy, "notifications").await;
    redis.run_words(&["CONFIG", "SET", "notify-keyspace-events", ""]).await;
    // The server tracked the key all the time, so this change is noticed at once.
    follows(&proxy, &redis, 1.0).await;
    mode_becomes(&proxy, "tracking").await;
    follows(&proxy, &redis, 2.0).await;
    redis.run("CONFIG SET notify-keyspace-events KA").await;
    mode_becomes(&proxy, "notifications").await;
    follows(&proxy, &redis, 3.0).await;
    assert_eq!(proxy.metric("statera_redis_reconnects_total"), Some(0.0));
}

#[tokio::test]
async fn without_tracking_notifications_that_are_switched_off_are_replaced_by_polling() {
    let redis = Redis::start().await;
    let proxy = follow(&redis, &format!("watch: notifications, {HASTY}"));
    mode_becomes(&proxy, "notifications").await;
    redis.run_words(&["CONFIG", "SET", "notify-keyspace-events", ""]).await;
    mode_becomes(&proxy, "poll").await;
    follows(&proxy, &redis, 1.0).await;
    redis.run("CONFIG SET notify-keyspace-events KA").await;
    mode_becomes(&proxy, "notifications").await;
    assert_eq!(proxy.metric("statera_redis_reconnects_total"), Some(0.0));
}

#[tokio::test]
async fn a_revoked_channel_leaves_tracking_and_a_granted_one_brings_notifications_back() {
    let redis = Redis::start().await;
    redis.grant(LEAST_RIGHTS).await;
    let proxy = follow_as_user(&redis, HASTY);
    mode_becomes(&proxy, "notifications").await;
    redis.run("ACL SETUSER statera resetchannels").await;
    mode_becomes(&proxy, "tracking").await;
    follows(&proxy, &redis, 1.0).await;
    redis.run("ACL SETUSER statera &__keyspace@0__:servers*").await;
    mode_becomes(&proxy, "notifications").await;
    follows(&proxy, &redis, 2.0).await;
}

#[tokio::test]
async fn a_user_who_may_do_nothing_but_read_is_served_by_polling_until_more_is_granted() {
    let redis = Redis::start().await;
    let rights = LEAST_RIGHTS.replace(" +client|tracking", "");
    redis.grant(&format!("{rights} resetchannels")).await;
    let proxy = follow_as_user(&redis, HASTY);
    mode_becomes(&proxy, "poll").await;
    follows(&proxy, &redis, 1.0).await;
    redis.run("ACL SETUSER statera +client|tracking").await;
    mode_becomes(&proxy, "tracking").await;
    follows(&proxy, &redis, 2.0).await;
    assert_eq!(proxy.metric("statera_redis_reconnects_total"), Some(0.0));
}

#[tokio::test]
async fn refused_tracking_is_logged_once_with_its_cure_and_replaced_by_polling() {
    let redis = Redis::start().await;
    redis.grant(&LEAST_RIGHTS.replace(" +client|tracking", "")).await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{url: \"{}\", username: statera, password: secret, watch: tracking, {HASTY}}}\n",
        redis.url()
    ));
    let connected = program.says("connected to redis").await;
    assert_eq!(connected["watch"], "poll");
    redis.run("ACL SETUSER statera +client|tracking").await;
    let line = program.says("the watch mode has changed").await;
    assert_eq!(line["watch"], "tracking");
    let lines = program.messages("redis does not announce changes, polling");
    assert_eq!(lines.len(), 1, "{}", program.log());
    assert!(
        lines[0]["reason"].as_str().is_some_and(|reason| reason.contains("grant +client|tracking")),
        "{}",
        lines[0]
    );
}

#[tokio::test]
async fn a_deleted_user_costs_no_session_and_the_table_is_followed_again_once_it_is_back() {
    let (redis, backend) = (Redis::start().await, Backend::named("backend").await);
    redis.grant(LEAST_RIGHTS).await;
    redis.set_weights([(&backend, 1.0)]).await;
    let proxy = follow_as_user(&redis, HASTY);
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    let traffic = Traffic::start(proxy.address());
    traffic.more(20).await;
    redis.run("ACL DELUSER statera").await;
    mode_becomes(&proxy, "none").await;
    traffic.more(50).await;
    assert_eq!(proxy.weights().len(), 1);

    redis.grant(LEAST_RIGHTS).await;
    mode_becomes(&proxy, "notifications").await;
    redis.run(&format!("ZADD servers 7 {}", backend.address)).await;
    eventually("a change arrives", || async { proxy.weights() == [(backend.address.to_string(), 7.0)] })
        .await;
    assert!(traffic.stop().await.served["backend"] > 70);
}
