//! A proxy's own reads must not cause further reads: while nothing changes it sends heartbeats and full
//! reads only, in every watch mode, with every kind of event, and whatever value the keys have.
//!
//! Redis counts the commands (`INFO`), which are divided by the time passed, so a slow machine makes the
//! rates smaller.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tokio::time::Instant;

use crate::support::{Cluster, Program, Proxy, Redis, Sentinels, eventually, info_number, mode_becomes};

const MODES: [&str; 4] = ["notifications", "tracking", "auto", "poll"];
/// With these settings only `poll` reads without an event, so any other read shows.
const OFTEN: &str = "heartbeat_interval: 200ms, poll_interval: 200ms, resync_interval: 1h, max_stale: 2h";
/// Commands a second that one proxy may send. Its heartbeats are 11 commands a second, and a loop that
/// pauses for a heartbeat adds about 20. Loops without a pause were measured at 1,471 and 30,103.
const MOST_COMMANDS: f64 = 60.0;
/// The length of a window in heartbeats of one proxy: two seconds.
const WINDOW: u64 = 20;

/// The states of the weights key and the key of admin states, and the commands that lead from each state to
/// the next.
const KEYS: [(&str, &[&str]); 4] = [
    ("missing", &[]),
    ("there", &["ZADD servers 1 10.0.0.1:80", "HSET {servers}:states 10.0.0.1:80 drain"]),
    ("emptied", &["DEL servers", "DEL {servers}:states"]),
    ("of another type", &["SET servers x", "SET {servers}:states x"]),
];

fn follow(redis: &Redis, watch: &str, more: &str) -> Proxy {
    follow_at(&format!("url: \"{}\"", redis.url()), watch, more)
}

/// `server` says where Redis is: `url: …`, `cluster: …` or `sentinel: …`.
fn follow_at(server: &str, watch: &str, more: &str) -> Proxy {
    Proxy::web(
        &format!("redis: {{{server}, watch: {watch}, {more}}}"),
        "weights_key: servers, backends: {\"127.0.0.1:9\": 1}",
    )
}

#[derive(Clone, Copy, Debug)]
struct Count {
    heartbeats: u64,
    reads: u64,
    /// Without the INFO commands of the test.
    commands: u64,
}

async fn count(connection: &mut MultiplexedConnection) -> Count {
    let info: String = redis::cmd("INFO").arg("all").query_async(connection).await.expect("an answer");
    let number = |name: &str| info_number(&info, name);
    Count {
        heartbeats: number("cmdstat_hello:calls="),
        reads: number("cmdstat_zrange:calls="),
        commands: number("total_commands_processed:") - number("cmdstat_info:calls="),
    }
}

/// Waits for `more` heartbeats of all proxies together.
async fn heartbeats(connection: &MultiplexedConnection, more: u64) {
    let before = count(&mut connection.clone()).await.heartbeats;
    eventually("heartbeats", || {
        let mut connection = connection.clone();
        async move { count(&mut connection).await.heartbeats >= before + more }
    })
    .await;
}

/// The rate of commands over one window of all `proxies`.
async fn commands_a_second(connection: &MultiplexedConnection, proxies: u64) -> f64 {
    let (before, begun) = (count(&mut connection.clone()).await, Instant::now());
    heartbeats(connection, WINDOW * proxies).await;
    // The time is taken before the count, so that commands in between make the rate larger, not smaller.
    let seconds = begun.elapsed().as_secs_f64();
    (count(&mut connection.clone()).await.commands - before.commands) as f64 / seconds
}

async fn all_modes_are_quiet(arguments: &[&str]) {
    let redis = Redis::start_with(arguments).await;
    all_modes_are_quiet_at(&format!("url: \"{}\"", redis.url()), &redis, arguments).await;
}

/// One proxy in each mode follows the same Redis, since a read of one may be an event for the others.
async fn all_modes_are_quiet_at(server: &str, redis: &Redis, what: &[&str]) {
    let connection = redis.connection().await;
    let proxies = MODES.map(|mode| follow_at(server, mode, OFTEN));
    for (proxy, mode) in proxies.iter().zip(["notifications", "tracking", "notifications", "poll"]) {
        mode_becomes(proxy, mode).await;
    }
    let count = proxies.len() as u64;
    let mut loud = Vec::new();
    for (state, commands) in KEYS {
        for command in commands {
            redis.run(command).await;
        }
        // Skips the reads that the change itself causes.
        heartbeats(&connection, WINDOW / 2 * count).await;
        let rate = commands_a_second(&connection, count).await;
        println!("{what:?}, keys {state}: {rate:.0} commands a second");
        if rate > MOST_COMMANDS * count as f64 {
            loud.push(format!("keys {state}: {rate:.0} commands a second"));
        }
    }
    assert!(loud.is_empty(), "{what:?}, four proxies: {loud:?}");
}

#[tokio::test]
async fn notified_reads_of_missing_keys_cause_no_further_reads() {
    all_modes_are_quiet(&["--notify-keyspace-events", "KEAm"]).await;
}

#[tokio::test]
async fn reads_that_overflow_the_tracking_table_cause_no_flood_of_reads() {
    all_modes_are_quiet(&["--notify-keyspace-events", "KEAm", "--tracking-table-max-keys", "1"]).await;
}

#[tokio::test]
async fn small_output_buffers_cause_no_flood_of_reads() {
    let limit = "pubsub 256 0 0";
    all_modes_are_quiet(&["--notify-keyspace-events", "KEAm", "--client-output-buffer-limit", limit]).await;
}

#[tokio::test]
async fn in_a_cluster_and_behind_sentinels_reads_cause_no_further_reads() {
    let limits = ["--notify-keyspace-events", "KEAm", "--tracking-table-max-keys", "1"];
    let cluster = Cluster::start_with(&limits).await;
    all_modes_are_quiet_at(&cluster.section(), &cluster.nodes[0], &["cluster"]).await;
    drop(cluster);
    let set = Sentinels::start().await;
    for (name, value) in [("notify-keyspace-events", "KEAm"), ("tracking-table-max-keys", "1")] {
        set.servers[0].run_words(&["CONFIG", "SET", name, value]).await;
    }
    all_modes_are_quiet_at(&set.section(), &set.servers[0], &["sentinels"]).await;
}

/// Each read overflows the buffer, which ends the connection, and each new connection begins with a read.
#[tokio::test]
async fn tables_larger_than_the_output_buffer_cause_no_flood_of_connections() {
    let arguments = ["--notify-keyspace-events", "KEAm", "--client-output-buffer-limit", "pubsub 16kb 0 0"];
    let redis = Redis::start_with(&arguments).await;
    let mut connection = redis.connection().await;
    const POOLS: usize = 4;
    let mut pools = String::new();
    for pool in 0..POOLS {
        let mut words = vec!["ZADD".to_owned(), format!("servers{pool}")];
        for member in 0..2_000 {
            words.extend(["1".to_owned(), format!("10.{pool}.{}.{}:80", member / 250, member % 250)]);
        }
        redis.run_words(&words).await;
        pools += &format!("p{pool}: {{weights_key: servers{pool}, backends: {{\"127.0.0.1:9\": 1}}}}, ");
    }
    let program = Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: p0}}}}\npools: {{{pools}}}\n\
         redis: {{url: \"{}\"}}\n",
        redis.url()
    ));
    eventually("each pool is logged", || async {
        program.messages("cannot read the weights, keeping the last table").len() >= POOLS
    })
    .await;
    let (before, begun) = (count(&mut connection).await, Instant::now());
    heartbeats(&connection, WINDOW).await;
    let (after, seconds) = (count(&mut connection).await, begun.elapsed().as_secs_f64());
    let (commands, reads) = (after.commands - before.commands, after.reads - before.reads);
    let a_second = |count: u64| count as f64 / seconds;
    println!("{:.1} commands, {:.1} reads a second", a_second(commands), a_second(reads));
    // A pool is read again at growing intervals, so there are few connections.
    assert!(a_second(commands) < MOST_COMMANDS, "{commands} in {seconds:.1} s");
    assert!(reads as f64 <= 8.0 + 4.0 * seconds, "{reads} in {seconds:.1} s");
}

/// Commands that a tool repeats, with a name and the database that it has selected.
const FUTILE: [(&str, u8, &[&str]); 3] = [
    ("the same weights", 0, &["DEL servers", "ZADD servers 1 10.0.0.1:80"]),
    ("the same key in another database", 1, &["SET servers x", "DEL servers"]),
    ("another database's end", 1, &["FLUSHDB"]),
];

#[tokio::test]
async fn a_tool_that_writes_the_same_value_in_a_loop_causes_no_flood_of_reads_and_hides_no_change() {
    let redis = Redis::start().await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    let connection = redis.connection().await;
    let mut weight = 1.0;
    for (what, database, commands) in FUTILE {
        for mode in MODES {
            let proxy = follow(&redis, mode, OFTEN);
            mode_becomes(&proxy, if mode == "auto" { "notifications" } else { mode }).await;
            let of_weight = |weight: f64| [("10.0.0.1:80".to_owned(), weight)];
            eventually("the table arrives", || async { proxy.weights() == of_weight(weight) }).await;
            let mut tool = redis.connection().await;
            redis::cmd("SELECT").arg(database).exec_async(&mut tool).await.expect("a database");
            let mut futile = redis::pipe();
            futile.atomic();
            for command in commands {
                let words: Vec<&str> = command.split(' ').collect();
                let word = |word: &str| if word == "1" { weight.to_string() } else { word.to_owned() };
                let mut command = redis::cmd(words[0]);
                for text in &words[1..] {
                    command.arg(word(text));
                }
                futile.add_command(command);
            }
            let (before, begun) = (count(&mut connection.clone()).await, Instant::now());
            while begun.elapsed() < Duration::from_secs(1)
                || count(&mut connection.clone()).await.heartbeats < before.heartbeats + WINDOW / 2
            {
                for _ in 0..50 {
                    futile.exec_async(&mut tool).await.expect("it is written");
                }
            }
            let seconds = begun.elapsed().as_secs_f64();
            let reads = count(&mut connection.clone()).await.reads - before.reads;
            println!("{what}, {mode}: {reads} reads in {seconds:.1} s");
            assert!(reads as f64 <= 20.0 + 15.0 * seconds, "{what}, {mode}: {reads} reads in {seconds:.1} s");

            weight += 1.0;
            redis.run(&format!("ZADD servers {weight} 10.0.0.1:80")).await;
            eventually("a change is seen", || async { proxy.weights() == of_weight(weight) }).await;
        }
    }
}

/// If invalidations were used here, each change would be read only half an hour later.
#[tokio::test]
async fn a_full_tracking_table_delays_no_change_that_is_notified() {
    let arguments = ["--notify-keyspace-events", "KA", "--tracking-table-max-keys", "1"];
    let redis = Redis::start_with(&arguments).await;
    let proxy = follow(&redis, "auto", OFTEN);
    mode_becomes(&proxy, "notifications").await;
    let mut connection = redis.connection().await;
    for weight in 1..=20 {
        redis.run(&format!("ZADD servers {weight} 10.0.0.1:80")).await;
        let wanted = [("10.0.0.1:80".to_owned(), f64::from(weight))];
        eventually("the weight arrives", || async { proxy.weights() == wanted }).await;
    }
    let reads = count(&mut connection).await.reads;
    // One read for each change, one for each that is announced twice, and some before repeated reads are
    // slowed down.
    assert!(reads < 150, "{reads} reads");
}
