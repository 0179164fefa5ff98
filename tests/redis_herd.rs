//! No herd: what many proxies ask of one Redis when it comes back to all of them at once, and when a large table never rests.
//!
//! Counted on Redis's side. STATERA_SEED has no say here: what is shown is that chance does its work.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tokio::time::{Instant, sleep};

use crate::support::{Backend, PATIENCE, Program, Proxy, Redis, eventually, greeting};

const PROXIES: u64 = 50;
/// The watching one, the one for picks, the one for reports.
const CONNECTIONS: u64 = 3 * PROXIES;
const WINDOW: Duration = Duration::from_millis(100);
/// Of all connections, in any window: where pauses go up to 900 ms, a sixth is expected. In step, it would be all.
const MOST_CONNECTIONS: f64 = 0.35;
/// Of those who watch, where the first pause goes up to 500 ms: a fifth is expected, and in step it would be all.
const MOST_WATCHERS: f64 = 0.6;
/// Long enough that all have come to their longest pause.
const DOWN: Duration = Duration::from_millis(2_500);
/// Few, so that a pick reads the table whole, in one ZRANGE, and so that this machine's work on 50 tables spreads nothing.
const MEMBERS: u32 = 10;

/// One backend that has weight, and many that have none.
async fn write_table(redis: &Redis, backend: &Backend) {
    let mut words =
        vec!["ZADD".to_owned(), "servers".to_owned(), "1".to_owned(), backend.address.to_string()];
    for member in 1..MEMBERS {
        words.extend(["0".to_owned(), format!("10.1.{}.{}:80", member / 250, member % 250)]);
    }
    redis.run_words(&words).await;
}

async fn fleet(redis: &Redis) -> Vec<Program> {
    // A pick that waited would be seen by its seconds.
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

/// A number of it, by its name.
fn number(info: &str, name: &str) -> u64 {
    let line = info.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split([',', '\r']).next()?.parse().ok()).unwrap_or(0)
}

/// What comes back is counted by.
#[derive(Clone, Copy)]
struct Sign {
    section: &'static str,
    name: &'static str,
    total: u64,
}

const CONNECTED: Sign = Sign { section: "stats", name: "total_connections_received:", total: CONNECTIONS };
/// Each subscribes to the weights, and then to the admin states.
const WATCHING: Sign = Sign { section: "commandstats", name: "cmdstat_subscribe:calls=", total: 2 * PROXIES };

impl Sign {
    async fn count(self, connection: &mut MultiplexedConnection) -> u64 {
        number(&info(connection, self.section).await, self.name)
    }
}

/// How often Redis was asked what: whole reads, picks.
async fn reads(connection: &mut MultiplexedConnection) -> (u64, u64) {
    // All in one answer: a pick between two of them would be taken off the reads.
    let info = info(connection, "commandstats").await;
    let zrange = number(&info, "cmdstat_zrange:calls=");
    let command = if Redis::is_before_7() { "cmdstat_evalsha:calls=" } else { "cmdstat_evalsha_ro:calls=" };
    let picks = number(&info, command);
    // Each pick reads the table too, inside of the script.
    (zrange - picks, picks)
}

/// Looks at how many of `sign` there have been, beside `before`, from `begun` on until all are back.
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

/// Fails where a larger part than `limit` came within any [`WINDOW`]. Where nobody looked for longer, as many windows count.
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

/// What proxies report, and how many do.
async fn reports(redis: &Redis) -> (BTreeSet<String>, u64) {
    let mut connection = redis.connection().await;
    let hvals = redis::cmd("HVALS").arg("{servers}:applied").query_async(&mut connection).await;
    let reports: Vec<String> = hvals.expect("reports");
    // What has no space in it tells since when nobody has come back.
    let hashes: Vec<&str> = reports.iter().filter_map(|report| Some(report.split_once(' ')?.1)).collect();
    let count = hashes.len() as u64;
    (hashes.into_iter().map(str::to_owned).collect(), count)
}

/// All have applied one table that nobody had before, by their own reports.
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
    // Stale by now, and nobody waits for a Redis that is known to be away.
    for program in &programs {
        assert_eq!(greeting(program.address().await).await.expect("an answer"), "backend");
    }
    let begun = Instant::now();
    redis.launch().await;
    let mut connection = redis.connection().await;
    // Two are ours: the launch asks until it is answered.
    let seen = watch_them_come(&mut connection, CONNECTED, 2, begun).await;
    let most = are_spread(&seen, MOST_CONNECTIONS);
    all_have_applied_a_new_weight(&redis, &backend, 3).await;

    let (reads, picks) = reads(&mut connection).await;
    println!("{most:.2} of the connections within {WINDOW:?} at most, {reads} reads, {picks} picks");
    // One on its new connection, one for the new weight; and whoever was cut off while Redis came up, once more.
    assert!((2 * PROXIES..=3 * PROXIES).contains(&reads), "{reads} reads for {PROXIES} proxies");
    assert!((PROXIES..=2 * PROXIES).contains(&picks), "{picks} picks for {PROXIES} proxies");
    for program in &programs {
        let waited = program.lines().into_iter().filter_map(|line| line["queue_ms"].as_f64());
        assert!(waited.into_iter().all(|ms| ms < 1_200.0), "a session waited: {}", program.log());
    }
}

#[tokio::test]
async fn fifty_proxies_whose_connections_are_all_cut_in_one_moment_do_not_come_back_in_one() {
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
    all_have_applied_a_new_weight(&redis, &backend, 3).await;
    let read = reads(&mut connection).await.0 - read;
    println!("{most:.2} of the watchers within {WINDOW:?} at most, {read} reads");
    assert!((2 * PROXIES..=3 * PROXIES).contains(&read), "{read} reads for {PROXIES} proxies");
}

#[tokio::test]
async fn ten_thousand_members_that_change_a_hundred_times_a_second_cost_one_read_in_a_tenth_of_a_second() {
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
    // Ours was one.
    let read = reads(&mut connection).await.0 - before - 1;
    let elapsed = begun.elapsed();
    println!("{read} reads of {FOLLOWERS} proxies for {changes} changes in {elapsed:?}");
    let most = FOLLOWERS * (elapsed.as_millis() as u64 / 100 + 1);
    assert!(read <= most, "{read} reads, and {most} are allowed in {elapsed:?}");
    assert!(changes >= 30 && read >= 2 * FOLLOWERS, "{read} reads for {changes} changes");
}
