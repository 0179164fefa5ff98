//! Faults in any order, as a seed says: writes, floods of them, wrong types, FLUSHALL, notifications switched off, connections
//! killed, links silenced and reset, a Redis frozen, killed and started again without its data.
//!
//! After each spell of them every proxy holds what Redis holds; and at every moment a proxy that calls its snapshot fresh has
//! a table that Redis held no longer ago than is promised: ARCHITECTURE.md, "What a snapshot promises".
//!
//! STATERA_SEED replays what was done, though not when; STATERA_LONG=1 takes 20 seeds and half an hour.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fastrand::Rng;
use redis::Value;
use statera::balance::pool::Pool;
use tokio::time::{Instant, sleep};

use crate::support::{Link, Passing, Proxy, Redis, eventually, seed};

const RESYNC: Duration = Duration::from_millis(500);
const MAX_STALE: Duration = Duration::from_millis(500);
const SETTINGS: &str = "resync_interval: 500ms, heartbeat_interval: 100ms, poll_interval: 100ms, response_timeout: 300ms, \
                        connect_timeout: 300ms, max_stale: 500ms";
/// What this process and its proxies may be late by on a machine with other work.
const NOISE: Duration = Duration::from_millis(500);
/// Longer than all of these together: after it, a change that was missed breaks the promise.
const LONG_PAUSE: Duration = Duration::from_millis(1_900);
const FAULTS_IN_A_SPELL: u32 = 14;
const BACKENDS: u32 = 6;
/// Of a long run, and of a seed that is replayed.
const LONG_SPELLS: u32 = 20;

type Table = BTreeMap<String, f64>;

/// What Redis held, and when.
#[derive(Debug)]
struct Held {
    /// `None`: nothing, or what is no table. A proxy goes on with any earlier one then.
    table: Option<Table>,
    /// When it was written at the earliest.
    #[expect(dead_code, reason = "told where a promise is broken")]
    from: Instant,
    /// When it was overwritten at the latest.
    until: Option<Instant>,
}

/// What Redis held from the first moment on.
#[derive(Debug, Default)]
struct History {
    held: Vec<Held>,
    /// Something is being written, and proxies may have it before it stands here.
    writing: bool,
}

/// Looks at the proxies all the time.
struct Watcher {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64, String>>,
}

impl Watcher {
    fn start(proxies: &[Proxy], history: &Arc<Mutex<History>>) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let pools: Vec<Arc<Pool>> =
            proxies.iter().map(|proxy| Arc::clone(&proxy.running.observed.pools[0])).collect();
        let (history, end) = (Arc::clone(history), Arc::clone(&ends));
        let thread = thread::spawn(move || {
            let mut fresh = 0;
            while !end.load(Relaxed) {
                for (number, pool) in pools.iter().enumerate() {
                    fresh += u64::from(check(number, pool, &history)?);
                }
                thread::sleep(Duration::from_millis(2));
            }
            Ok(fresh)
        });
        Self { ends, thread }
    }

    /// How often a fresh snapshot was seen.
    fn end(self) -> Result<u64, String> {
        self.ends.store(true, Relaxed);
        self.thread.join().expect("it does not panic")
    }
}

/// True where the snapshot is called fresh, and is.
fn check(number: usize, pool: &Pool, shared: &Mutex<History>) -> Result<bool, String> {
    // In this order: a snapshot that is swapped in between is newer than the age says.
    let Some(age) = pool.cell.age().filter(|age| *age <= MAX_STALE) else { return Ok(false) };
    let snapshot = pool.cell.load();
    let now = Instant::now();
    let table: Table =
        snapshot.members().iter().map(|m| (m.backend.id().to_string(), m.weight.get())).collect();
    // Resyncs are jittered by a tenth.
    let oldest = now - age - RESYNC - RESYNC / 10 - NOISE;
    let mut history = shared.lock().expect("nobody panics with it");
    while history.writing {
        drop(history);
        thread::sleep(Duration::from_millis(1));
        history = shared.lock().expect("nobody panics with it");
    }
    let promised = history
        .held
        .iter()
        .filter(|held| held.until.is_none_or(|until| until >= oldest))
        .any(|held| held.table.as_ref().is_none_or(|held| *held == table));
    if promised {
        return Ok(true);
    }
    let last = &history.held[history.held.len().saturating_sub(30)..];
    Err(format!("proxy {number} calls {table:?} fresh, {age:?} old, at {now:?}; redis held: {last:#?}"))
}

/// The one who writes to Redis and breaks it.
struct Hand<'a> {
    redis: Redis,
    link: &'a Link,
    history: Arc<Mutex<History>>,
    random: Rng,
    /// Tables may be lost, too.
    loses: bool,
}

impl Hand<'_> {
    /// Does something that may change the key, and notes what it holds then. A key of a wrong type refuses most of it.
    async fn writes(&mut self, command: &str) {
        println!("  {command}");
        let from = self.begins_to_write();
        let mut connection = self.redis.connection().await;
        let mut words = redis::Cmd::new();
        words.arg(command.split(' ').collect::<Vec<_>>());
        match words.query_async::<Value>(&mut connection).await {
            Err(error) if error.code() != Some("WRONGTYPE") => panic!("{command}: {error}"),
            _ => {}
        }
        self.note(from).await;
    }

    fn begins_to_write(&self) -> Instant {
        self.history.lock().expect("nobody panics with it").writing = true;
        Instant::now()
    }

    async fn note(&mut self, from: Instant) {
        let table = self.table().await;
        let now = Instant::now();
        let mut history = self.history.lock().expect("nobody panics with it");
        if let Some(last) = history.held.last_mut() {
            last.until = Some(now);
        }
        history.held.push(Held { table, from, until: None });
        history.writing = false;
    }

    async fn table(&self) -> Option<Table> {
        let mut connection = self.redis.connection().await;
        let answer: Result<Vec<(String, f64)>, _> = redis::cmd("ZRANGE")
            .arg("servers")
            .arg(0)
            .arg(-1)
            .arg("WITHSCORES")
            .query_async(&mut connection)
            .await;
        answer.ok().map(Table::from_iter).filter(|table| !table.is_empty())
    }

    fn member(&mut self) -> String {
        format!("10.0.0.{}:80", self.random.u32(1..=BACKENDS))
    }

    fn pause(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.random.u64(0..=most))
    }

    /// True if some proxy may hear nothing of what is written now.
    async fn breaks_something(&mut self) -> bool {
        let member = self.member();
        let weight = self.random.u32(0..1_000);
        let what = self.random.u32(if self.loses { 0..19 } else { 5..19 });
        match what {
            0 => self.writes(&format!("ZREM servers {member}")).await,
            1 => self.writes("DEL servers").await,
            2 => self.writes("SET servers nonsense").await,
            3 => self.writes("FLUSHALL").await,
            4 => {
                println!("  killed");
                let from = self.begins_to_write();
                self.redis.kill();
                sleep(self.pause(1_000)).await;
                self.redis.launch().await;
                self.note(from).await;
            }
            5..=8 => self.writes(&format!("ZADD servers {weight} {member}")).await,
            9 => {
                self.redis.run("DEL other").await;
                self.redis.run(&format!("ZADD other {weight} {member} 1 10.0.0.9:80")).await;
                self.writes("RENAME other servers").await;
            }
            10 => {
                for weight in 0..40 {
                    self.writes(&format!("ZADD servers {weight} {member}")).await;
                }
            }
            11 => {
                let mut elsewhere = redis::pipe();
                elsewhere.cmd("SELECT").arg(1).cmd("DEL").arg("servers").ignore();
                elsewhere.cmd("ZADD").arg("servers").arg(weight).arg(&member).ignore();
                let mut connection = self.redis.connection().await;
                elsewhere.query_async::<()>(&mut connection).await.expect("it is written");
                self.writes("SWAPDB 0 1").await;
            }
            12 => {
                println!("  frozen");
                self.redis.freeze();
                sleep(self.pause(1_500)).await;
                self.redis.thaw();
            }
            13 | 14 => {
                // Nobody is told, and the flags are what they should be when somebody looks again.
                self.redis.run_words(&["CONFIG", "SET", "notify-keyspace-events", ""]).await;
                self.writes(&format!("ZADD servers {weight} {member}")).await;
                self.redis.run("CONFIG SET notify-keyspace-events KA").await;
            }
            15 => drop(self.redis.run_words(&["CONFIG", "SET", "notify-keyspace-events", ""]).await),
            16 => drop(self.redis.run("CONFIG SET notify-keyspace-events KA").await),
            17 => {
                let passings = [Passing::All, Passing::Nothing, Passing::AllButTheWatch, Passing::Resets];
                let passing = passings[self.random.usize(0..passings.len())];
                println!("  link: {passing:?}");
                self.link.pass(passing);
                self.writes(&format!("ZADD servers {weight} {member}")).await;
            }
            _ => {
                println!("  clients killed");
                let mut connection = self.redis.connection().await;
                for kind in ["pubsub", "normal"] {
                    // Its answer may be lost with the connection.
                    let _: Result<Value, _> = redis::cmd("CLIENT")
                        .arg("KILL")
                        .arg("TYPE")
                        .arg(kind)
                        .query_async(&mut connection)
                        .await;
                }
            }
        }
        matches!(what, 11 | 13..=15 | 17)
    }

    /// Mends what is broken, without a word to the proxies, and leaves a table.
    async fn mends(&mut self) {
        self.link.pass(Passing::All);
        if self.table().await.is_none() {
            self.writes("DEL servers").await;
            let (member, weight) = (self.member(), self.random.u32(1..1_000));
            self.writes(&format!("ZADD servers {weight} {member}")).await;
        }
    }
}

async fn one_run(seed: u64, spells: u32) {
    println!("STATERA_SEED={seed}, {spells} spells");
    let redis = Redis::start().await;
    let link = Link::to(redis.port);
    let begun = Instant::now();
    let nothing = Held { table: None, from: begun, until: None };
    let history = Arc::new(Mutex::new(History { held: vec![nothing], writing: false }));
    let proxies = [(redis.port, "auto"), (link.port, "auto"), (redis.port, "poll")].map(|(port, watch)| {
        let url = format!("redis://127.0.0.1:{port}/0");
        Proxy::web(&format!("redis: {{url: \"{url}\", watch: {watch}, {SETTINGS}}}"), "weights_key: servers")
    });
    let watcher = Watcher::start(&proxies, &history);
    let mut hand = Hand { redis, link: &link, history, random: Rng::with_seed(seed), loses: true };
    for spell in 0..spells {
        println!("spell {spell}");
        // In every other spell nothing takes the table away, which would excuse any.
        hand.loses = spell % 2 == 0;
        for _ in 0..FAULTS_IN_A_SPELL {
            let silent = hand.breaks_something().await;
            let long = silent && hand.random.u8(..3) == 0;
            sleep(if long { LONG_PAUSE } else { hand.pause(120) }).await;
        }
        hand.mends().await;
        let wanted: Vec<(String, f64)> = hand.table().await.expect("it was left").into_iter().collect();
        for (number, proxy) in proxies.iter().enumerate() {
            let fresh = || proxy.running.observed.pools[0].cell.age().is_some_and(|age| age <= MAX_STALE);
            eventually(
                &format!("proxy {number} holds {wanted:?} after spell {spell} of seed {seed}"),
                || async { fresh() && proxy.weights() == wanted },
            )
            .await;
        }
    }
    let seen = watcher.end().unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    assert!(seen > u64::from(spells) * 100, "snapshots were hardly ever fresh: {seen} looks");
}

#[tokio::test]
async fn whatever_happens_a_fresh_snapshot_is_what_redis_held_a_moment_ago_and_all_agree_in_the_end() {
    if std::env::var_os("STATERA_SEED").is_some() {
        return one_run(seed(), LONG_SPELLS).await;
    }
    if std::env::var_os("STATERA_LONG").is_none() {
        return one_run(seed(), 4).await;
    }
    let (begun, mut seeds) = (Instant::now(), 0);
    while seeds < 20 || begun.elapsed() < Duration::from_secs(30 * 60) {
        one_run(fastrand::u64(..), LONG_SPELLS).await;
        seeds += 1;
    }
    println!("{seeds} seeds in {:?}", begun.elapsed());
}
