//! No thundering herd: many proxies spread their reconnects and reads when Redis comes back to all of them
//! at once, and when a large table changes all the time.
//!
//! Redis counts the commands. STATERA_SEED has no effect here: the scenarios show that random pauses spread
//! the load.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tokio::time::{Instant, sleep};

use crate::support::{Backend, PATIENCE, Program, Proxy, Redis, eventually, greeting, info_number};

const PROXIES: u64 = 50;
/// Each proxy has three: for watching, for Lua picks and for reports.
const CONNECTIONS: u64 = 3 * PROXIES;
const WINDOW: Duration = Duration::from_millis(100);
/// The largest share of all connections that may come within one window. With pauses of up to 900 ms a sixth
/// is expected; proxies in step would all come at once.
const MOST_CONNECTIONS: f64 = 0.35;
/// The same of the watching connections, whose first pause is up to 500 ms: a fifth is expected.
const MOST_WATCHERS: f64 = 0.6;
/// How long Redis is down: long enough for every proxy to reach its longest pause.
const DOWN: Duration = Duration::from_millis(2_500);
/// Few members, so that a pick reads the whole table by one ZRANGE and the work on 50 tables does not itself
/// spread the reads.
const MEMBERS: u32 = 10;

/// Writes a table of one backend with weight 1 and others with weight 0.
async fn write_table(redis: &Redis, backend: &Backend) {
    let mut words =
        vec!["ZADD".to_owned(), "servers".to_owned(), "1".to_owned(), backend.address.to_string()];
    for member in 1..MEMBERS {
        words.extend(["0".to_owned(), format!("10.1.{}.{}:80", member / 250, member % 250)]);
    }
    redis.run_words(&words).await;
}

async fn fleet(redis: &Redis) -> Vec<Program> {
    // The pick timeout is long, so that a pick that waits shows in the session's time.
    let yaml = format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{weights_key: servers, backends: {{\"127.0.0.1:9\": 1}}}}}}\nlua_pick: {{timeout: 2500ms, max_in_flight: 4}}\n\
         redis: {{url: \"{}\", max_stale: 2s, connect_timeout: 10s, response_timeout: 10s}}\n",
        redis.url()
    );
    let programs: Vec<Program> = (0..PROXIES).map(|_| Program::run(&yaml)).collect();
    for program in &programs {
        program.says("connected to redis").await;
    }
    programs
}

async fn info(connection: &mut MultiplexedConnection, section: &str) -> String {
    redis::cmd("INFO").arg(section).query_async(connection).await.expect("an answer")
}

/// The counter of Redis by which returning connections are counted, and how many are expected.
#[derive(Clone, Copy)]
struct Sign {
    section: &'static str,
    name: &'static str,
    total: u64,
}

const CONNECTED: Sign = Sign { section: "stats", name: "total_connections_received:", total: CONNECTIONS };
/// Each proxy subscribes twice: to the weights and to the admin states.
const WATCHING: Sign = Sign { section: "commandstats", name: "cmdstat_subscribe:calls=", total: 2 * PROXIES };

impl Sign {
    async fn count(self, connection: &mut MultiplexedConnection) -> u64 {
        info_number(&info(connection, self.section).await, self.name)
    }
}

/// How often Redis was asked for the table and for a pick.
async fn reads(connection: &mut MultiplexedConnection) -> (u64, u64) {
    // Both counters come from one answer: a pick between two answers would be subtracted from the reads.
    let info = info(connection, "commandstats").await;
    let zrange = info_number(&info, "cmdstat_zrange:calls=");
    let command = if Redis::is_before_7() { "cmdstat_evalsha:calls=" } else { "cmdstat_evalsha_ro:calls=" };
    let picks = info_number(&info, command);
    // The script of a pick also calls ZRANGE.
    (zrange - picks, picks)
}

/// Waits until there are as many reads since `before` as there are proxies. A proxy whose first read came
/// after the next change would need no second one.
async fn all_have_read(connection: &mut MultiplexedConnection, before: u64) {
    let begun = Instant::now();
    while reads(connection).await.0 < before + PROXIES {
        assert!(begun.elapsed() < PATIENCE, "not all have read the table");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Records how many connections have come back, by `sign`, until all have. `before` is the count before
/// `begun`.
async fn watch_them_come(
    connection: &mut MultiplexedConnection,
    sign: Sign,
    before: u64,
    begun: Instant,
) -> Vec<(Duration, u64)> {
    let mut seen = vec![(Duration::ZERO, 0)];
    while seen.last().is_some_and(|(_, count)| *count < sign.total) {
        let count = sign.count(connection).await.saturating_sub(before);
        seen.push((begun.elapsed(), count));
        assert!(begun.elapsed() < PATIENCE, "only {count} are back");
        sleep(Duration::from_millis(10)).await;
    }
    seen
}

/// Fails if a larger share than `limit` came within any [`WINDOW`]. A longer gap between two counts is
/// spread over the windows that it spans.
fn are_spread(seen: &[(Duration, u64)], limit: f64) -> f64 {
    let total = seen.last().expect("there is one").1 as f64;
    let mut most = 0.0_f64;
    for (index, (from, before)) in seen.iter().enumerate() {
        for (until, after) in &seen[index + 1..] {
            let is_next = seen[index + 1].0 == *until;
            if *until - *from > WINDOW && !is_next {
                break;
            }
            let windows = ((*until - *from).as_secs_f64() / WINDOW.as_secs_f64()).ceil().max(1.0);
            most = most.max((after - before) as f64 / total / windows);
        }
    }
    assert!(most <= limit, "{most:.2} of them came within {WINDOW:?}: {seen:?}");
    most
}

/// The tables that the proxies report, and how many proxies report.
async fn reports(redis: &Redis) -> (BTreeSet<String>, u64) {
    let mut connection = redis.connection().await;
    let hvals = redis::cmd("HVALS").arg("{servers}:applied").query_async(&mut connection).await;
    let reports: Vec<String> = hvals.expect("reports");
    // An entry without a space is no report: it is the time since which no proxy has come back to the hash.
    let hashes: Vec<&str> = reports.iter().filter_map(|report| Some(report.split_once(' ')?.1)).collect();
    let count = hashes.len() as u64;
    (hashes.into_iter().map(str::to_owned).collect(), count)
}

/// Changes a weight and waits until all proxies report the same new table.
async fn all_have_applied_a_new_weight(redis: &Redis, backend: &Backend, weight: u32) {
    let (old, _) = reports(redis).await;
    redis.run(&format!("ZADD servers {weight} {}", backend.address)).await;
    eventually("all have applied the new weight", || async {
        let (new, count) = reports(redis).await;
        count == PROXIES && new.len() == 1 && new.is_disjoint(&old)
    })
    .await;
}

#[tokio::test]
async fn fifty_proxies_come_back_to_a_redis_that_restarts_spread_out_and_read_once_or_twice_each() {
    let backend = Backend::named("backend").await;
    let mut redis = Redis::start().await;
    write_table(&redis, &backend).await;
    redis.run("SAVE").await;
    let programs = fleet(&redis).await;
    all_have_applied_a_new_weight(&redis, &backend, 2).await;

    redis.kill();
    sleep(DOWN).await;
    // The snapshots are stale by now. Sessions do not wait for a Redis that is known to be down.
    for program in &programs {
        assert_eq!(greeting(program.address().await).await.expect("an answer"), "backend");
    }
    let begun = Instant::now();
    redis.launch().await;
    let mut connection = redis.connection().await;
    // Two connections are the test's: `launch` connects until it is answered, and `connection` once.
    let seen = watch_them_come(&mut connection, CONNECTED, 2, begun).await;
    let most = are_spread(&seen, MOST_CONNECTIONS);
    all_have_read(&mut connection, 0).await;
    all_have_applied_a_new_weight(&redis, &backend, 3).await;

    let (reads, picks) = reads(&mut connection).await;
    println!("{most:.2} of the connections within {WINDOW:?} at most, {reads} reads, {picks} picks");
    // Each proxy reads once on its new connection and once for the new weight. A proxy that was disconnected
    // while Redis started reads once more.
    assert!((2 * PROXIES..=3 * PROXIES).contains(&reads), "{reads} reads for {PROXIES} proxies");
    assert!((PROXIES..=2 * PROXIES).contains(&picks), "{picks} picks for {PROXIES} proxies");
    for program in &programs {
        let waited = program.lines().into_iter().filter_map(|line| line["queue_ms"].as_f64());
        assert!(waited.into_iter().all(|ms| ms < 1_200.0), "a session waited: {}", program.log());
    }
}

#[tokio::test]
async fn fifty_proxies_whose_connections_are_all_cut_at_once_come_back_spread_out() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    write_table(&redis, &backend).await;
    let _programs = fleet(&redis).await;
    all_have_applied_a_new_weight(&redis, &backend, 2).await;

    let mut connection = redis.connection().await;
    let before = WATCHING.count(&mut connection).await;
    let (read, _) = reads(&mut connection).await;
    let mut kill = redis::pipe();
    kill.cmd("CLIENT").arg("KILL").arg("TYPE").arg("pubsub");
    kill.cmd("CLIENT").arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes");
    kill.query_async::<()>(&mut connection).await.expect("they are cut");
    let seen = watch_them_come(&mut connection, WATCHING, before, Instant::now()).await;
    let most = are_spread(&seen, MOST_WATCHERS);
    all_have_read(&mut connection, read).await;
    all_have_applied_a_new_weight(&redis, &backend, 3).await;
    let read = reads(&mut connection).await.0 - read;
    println!("{most:.2} of the watchers within {WINDOW:?} at most, {read} reads");
    assert!((2 * PROXIES..=3 * PROXIES).contains(&read), "{read} reads for {PROXIES} proxies");
}

#[tokio::test]
async fn a_hundred_changes_a_second_of_ten_thousand_members_cost_a_proxy_at_most_ten_reads_a_second() {
    const MEMBERS: u32 = 10_000;
    const FOLLOWERS: u64 = 2;
    let redis = Redis::start().await;
    let name = |member: u32| format!("10.1.{}.{}:80", member / 250, member % 250);
    let mut words = vec!["ZADD".to_owned(), "servers".to_owned()];
    for member in 0..MEMBERS {
        words.extend(["1".to_owned(), name(member)]);
    }
    redis.run_words(&words).await;
    let settings = format!("redis: {{url: \"{}\", resync_interval: 1h, response_timeout: 10s}}", redis.url());
    let proxies: Vec<Proxy> = (0..FOLLOWERS).map(|_| Proxy::web(&settings, "weights_key: servers")).collect();
    eventually("all have the table", || async {
        proxies.iter().all(|proxy| {
            proxy.weights().len() == MEMBERS as usize && proxy.metric("statera_redis_connected") == Some(1.0)
        })
    })
    .await;

    let mut connection = redis.connection().await;
    let (before, _) = reads(&mut connection).await;
    let begun = Instant::now();
    let over = Arc::new(AtomicBool::new(false));
    let writer = {
        let (client, over) = (redis.client(), Arc::clone(&over));
        thread::spawn(move || {
            let mut connection = client.get_connection().expect("it runs");
            let mut changes = 0;
            while !over.load(Relaxed) {
                changes += 1;
                let member = name(changes * 7 % MEMBERS);
                redis::cmd("ZADD")
                    .arg("servers")
                    .arg(1 + changes)
                    .arg(member)
                    .exec(&mut connection)
                    .expect("written");
                thread::sleep(Duration::from_millis(10));
            }
            changes
        })
    };
    sleep(Duration::from_secs(3)).await;
    over.store(true, Relaxed);
    let changes = writer.join().expect("it writes");
    let wanted: Vec<(String, f64)> = {
        let mut zrange = redis::cmd("ZRANGE");
        zrange.arg("servers").arg(0).arg(-1).arg("WITHSCORES");
        let mut table: Vec<(String, f64)> = zrange.query_async(&mut connection).await.expect("a table");
        table.sort_by(|a, b| a.0.cmp(&b.0));
        table
    };
    eventually("all have the last table", || async { proxies.iter().all(|proxy| proxy.weights() == wanted) })
        .await;
    // One of the reads was the test's own.
    let read = reads(&mut connection).await.0 - before - 1;
    let elapsed = begun.elapsed();
    println!("{read} reads of {FOLLOWERS} proxies for {changes} changes in {elapsed:?}");
    let most = FOLLOWERS * (elapsed.as_millis() as u64 / 100 + 1);
    assert!(read <= most, "{read} reads, and {most} are allowed in {elapsed:?}");
    assert!(changes >= 30 && read >= 2 * FOLLOWERS, "{read} reads for {changes} changes");
}
