//! Random faults, in an order given by a seed: writes, floods of writes, wrong types, FLUSHALL,
//! notifications switched off, rights revoked, users deleted, connections killed, links silenced and reset,
//! proxies killed, Redis frozen, killed and started again without its data.
//!
//! After each round of faults every proxy has the table that Redis has. At every moment a proxy with a fresh
//! snapshot has a table that Redis had no longer ago than is promised (docs/decisions/0007-freshness.md).
//! Failovers are in `redis_random_sentinel.rs`.
//!
//! STATERA_SEED replays the faults, but not their exact times. STATERA_LONG=1 runs at least 20 seeds and
//! half an hour.

use std::time::Duration;

use redis::Value;
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::support::{
    Authority, LEAST_RIGHTS, Link, Passing, Promise, Proxy, Redis, RestartingProxy, TlsRedis, Watched,
    Watcher, Writer, all_agree, notify, path_text, seed,
};

const RESYNC: Duration = Duration::from_millis(500);
const MAX_STALE: Duration = Duration::from_millis(500);
/// Settings for the `redis` section of every proxy in a random run.
pub const SETTINGS: &str = "resync_interval: 500ms, heartbeat_interval: 100ms, poll_interval: 100ms, response_timeout: 300ms, \
                            connect_timeout: 300ms, max_stale: 500ms";
/// How late this process and its proxies may be on a busy machine.
pub const NOISE: Duration = Duration::from_millis(500);
/// The promise under [`SETTINGS`]. The resync interval varies by a tenth.
pub const PROMISE: Promise = Promise {
    max_stale: MAX_STALE,
    overtaken: RESYNC.saturating_add(Duration::from_millis(50)).saturating_add(NOISE),
};
/// Longer than all of these times together: a change that is still missing after this pause breaks the
/// promise.
pub const LONG_PAUSE: Duration = Duration::from_millis(1_700);
const FAULTS_IN_A_ROUND: u32 = 14;
/// Rounds of a short run; in half of them tables may be lost.
const ROUNDS: u32 = 2;
/// Rounds of a long run, and of a seed that is replayed.
const LONG_ROUNDS: u32 = 14;

/// Writes to Redis and breaks things.
struct Saboteur<'a> {
    redis: Redis,
    link: &'a Link,
    writer: Writer,
    program: RestartingProxy,
    /// True while faults may also lose the table.
    may_lose: bool,
}

impl Saboteur<'_> {
    /// Causes one fault. Returns true if a proxy may not be notified of writes now.
    async fn breaks_something(&mut self) -> bool {
        let what = self.writer.random.u32(0..26);
        match what {
            0..=9 => return self.writer.writes_something(&self.redis, self.may_lose).await,
            10 if self.may_lose => {
                println!("  redis: killed");
                let from = self.writer.history.begins_to_write();
                self.redis.kill();
                sleep(self.writer.pause(1_000)).await;
                self.redis.launch().await;
                self.redis.grant(LEAST_RIGHTS).await;
                self.writer.history.holds(from, None);
            }
            10 | 11 => {
                println!("  redis: frozen");
                self.redis.freeze();
                sleep(self.writer.pause(1_500)).await;
                self.redis.thaw();
            }
            12 => {
                println!("  notifications: off");
                notify(&self.redis, false).await;
            }
            13 => {
                println!("  notifications: on");
                notify(&self.redis, true).await;
            }
            14 | 15 => {
                let passings = [Passing::All, Passing::Nothing, Passing::AllButTheWatch, Passing::Resets];
                let passing = passings[self.writer.random.usize(0..passings.len())];
                println!("  link: {passing:?}");
                self.link.pass(passing);
                self.writer.changes(&self.redis).await;
            }
            16 | 17 => self.kills_clients().await,
            18 => {
                let seconds = self.writer.random.u8(0..=1);
                println!("  idle clients: {seconds} s");
                self.redis.run(&format!("CONFIG SET timeout {seconds}")).await;
            }
            19..=22 => {
                // Redis 6 cannot revoke a subcommand.
                let changes = ["resetchannels", "resetkeys", "off", "-zrange"];
                let change = changes[self.writer.random.usize(0..changes.len())];
                println!("  user: {change}");
                self.redis.run(&format!("ACL SETUSER statera {change}")).await;
                self.writer.changes(&self.redis).await;
            }
            23 => {
                println!("  user: deleted");
                self.redis.run("ACL DELUSER statera").await;
                self.writer.changes(&self.redis).await;
            }
            24 => {
                println!("  user: as before");
                self.redis.grant(LEAST_RIGHTS).await;
            }
            _ => {
                let signal = if self.writer.random.bool() { Signal::TERM } else { Signal::KILL };
                println!("  proxy: {signal:?}");
                self.program.restart(signal).await;
            }
        }
        matches!(what, 12 | 14 | 15 | 19..=23)
    }

    async fn kills_clients(&mut self) {
        println!("  clients: killed");
        let mut connection = self.redis.connection().await;
        for kind in [["TYPE", "pubsub"], ["TYPE", "normal"], ["USER", "statera"]] {
            // The command may kill its own connection, and then its answer is lost.
            let _: Result<Value, _> =
                redis::cmd("CLIENT").arg("KILL").arg(&kind).query_async(&mut connection).await;
        }
    }

    /// Repairs everything without notifying the proxies, and leaves a table in Redis.
    async fn mends(&mut self) {
        self.link.pass(Passing::All);
        self.redis.grant(LEAST_RIGHTS).await;
        self.writer.leaves_a_table(&self.redis).await;
    }
}

async fn one_run(seed: u64, rounds: u32) {
    println!("STATERA_SEED={seed} make test ARGS=redis_random:: replays it; {rounds} rounds");
    let mut writer = Writer::new(seed);
    let (wants_tls, is_user, watches) =
        (writer.random.u8(..3) == 0, writer.random.u8(..3) != 0, writer.watches());
    let mut more = String::from(SETTINGS);
    if is_user {
        more += ", username: statera, password: secret";
    }
    let authority = Authority::new();
    let (redis, port, scheme) = if wants_tls && Redis::speaks_tls() {
        more += &format!(", tls: {{ca_file: \"{}\"}}", path_text(&authority.file()));
        let TlsRedis { redis, port } = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
        (redis, port, "rediss")
    } else {
        let redis = Redis::start().await;
        let port = redis.port;
        (redis, port, "redis")
    };
    println!("{scheme}, user: {is_user}, {watches:?}");
    redis.grant(LEAST_RIGHTS).await;
    let link = Link::to(port);
    let section =
        |port: u16, watch| format!("url: \"{scheme}://127.0.0.1:{port}/0\", watch: {watch}, {more}");
    let inside = [(port, watches[0]), (link.port, watches[1]), (port, watches[2])].map(|(port, watch)| {
        Proxy::web(&format!("redis: {{{}}}", section(port, watch)), "weights_key: servers")
    });
    let program = RestartingProxy::start(section(link.port, watches[3])).await;
    let mut watched: Vec<Watched> = inside.iter().map(Watched::from).collect();
    watched.push(program.watched());
    let watcher = Watcher::start(&watched, &writer.history, PROMISE);
    let mut saboteur = Saboteur { redis, link: &link, writer, program, may_lose: true };
    for round in 0..rounds {
        println!("round {round}");
        // In every other round no fault loses the table: while it is lost, any snapshot is allowed.
        saboteur.may_lose = round % 2 == 0;
        for _ in 0..FAULTS_IN_A_ROUND {
            let silent = saboteur.breaks_something().await;
            let long = silent && saboteur.writer.random.u8(..3) == 0;
            sleep(if long { LONG_PAUSE } else { saboteur.writer.pause(120) }).await;
            if watcher.has_seen_enough() {
                break;
            }
        }
        saboteur.mends().await;
        if watcher.has_seen_enough() {
            break;
        }
        all_agree(&watched, &saboteur.redis, MAX_STALE, &format!("after round {round} of seed {seed}")).await;
    }
    let seen = watcher.end().unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    println!("fresh snapshots seen: {seen:?}");
    // One look at the program needs two scrapes of its metrics, so it has the fewest looks.
    assert!(seen.iter().all(|looks| *looks > u64::from(rounds) * 5), "hardly ever fresh: {seen:?} looks");
}

#[tokio::test]
async fn whatever_happens_a_fresh_snapshot_is_what_redis_held_a_moment_ago_and_all_agree_in_the_end() {
    if std::env::var_os("STATERA_SEED").is_some() {
        return one_run(seed(), LONG_ROUNDS).await;
    }
    if std::env::var_os("STATERA_LONG").is_none() {
        return one_run(seed(), ROUNDS).await;
    }
    let (begun, mut seeds) = (Instant::now(), 0);
    while seeds < 20 || begun.elapsed() < Duration::from_secs(30 * 60) {
        one_run(fastrand::u64(..), LONG_ROUNDS).await;
        seeds += 1;
        println!("{seeds} seeds passed in {:?}", begun.elapsed());
    }
}
