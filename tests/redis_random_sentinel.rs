//! Failovers in any order, as a seed says, planned and by force, and what comes between: a primary killed, frozen, or cut off
//! from everybody but the proxies; an old one that wakes up and takes writes, or starts empty; replicas and a sentinel that
//! are away; proxies killed.
//!
//! Held to the same promise as under the faults of `redis_random.rs`. And nobody may ever have what is written to an old
//! primary two heartbeats after the sentinels named another.
//!
//! STATERA_SEED replays what was done, though not when; STATERA_LONG=1 takes 20 seeds and a quarter of an hour.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::redis_random::{LONG_PAUSE, NOISE, PROMISE, SETTINGS};
use crate::support::{
    Promise, Proxy, Restarted, Sentinels, Watched, Watcher, Writer, all_agree, info, notify, seed, table,
};

const HEARTBEAT: Duration = Duration::from_millis(100);
/// The only sentinel that is ever frozen: whoever sleeps for two seconds starts no failover in the next thirty.
const SLEEPY: usize = 2;
const FAULTS_BETWEEN_FAILOVERS: u32 = 7;
/// Failovers of a short run, each of another kind.
const SPELLS: u32 = 3;
/// Of a long run, and of a seed that is replayed.
const LONG_SPELLS: u32 = 12;

/// How the primary is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failover {
    /// Nobody is lost.
    Planned,
    /// kill -9.
    Killed,
    /// SIGSTOP; it wakes up later, and thinks that it still is the primary.
    Frozen,
    /// The sentinels and the replicas think that it is dead; it answers the proxies all the time.
    CutOff,
}

const FAILOVERS: [Failover; 4] = [Failover::Planned, Failover::Killed, Failover::Frozen, Failover::CutOff];

/// The one who writes to Redis and breaks it.
struct Hand {
    set: Sentinels,
    primary: usize,
    writer: Writer,
    program: Restarted,
    may_lose: bool,
    is_asleep: bool,
}

impl Hand {
    fn a_replica(&mut self) -> usize {
        (self.primary + self.writer.random.usize(1..=2)) % 3
    }

    /// True if some proxy may hear nothing of what is written now.
    async fn breaks_something(&mut self) -> bool {
        let what = self.writer.random.u32(0..16);
        let primary = &self.set.servers[self.primary];
        match what {
            0..=8 => return self.writer.writes_something(primary, self.may_lose).await,
            9 => {
                let on = self.writer.random.bool();
                println!("  notifications: {on}");
                notify(primary, on).await;
                self.writer.changes(primary).await;
            }
            10 => {
                println!("  clients: killed");
                primary.run("CLIENT KILL TYPE pubsub").await;
            }
            11 => {
                let replica = self.a_replica();
                println!("  replica {replica}: restarted");
                self.set.servers[replica].kill();
                self.writer.changes(&self.set.servers[self.primary]).await;
                self.set.servers[replica].launch().await;
                self.set.follow(replica, self.primary).await;
            }
            12 => {
                let replica = self.a_replica();
                println!("  replica {replica}: frozen");
                self.set.servers[replica].freeze();
                sleep(self.writer.pause(500)).await;
                self.set.servers[replica].thaw();
            }
            13 | 14 => {
                self.is_asleep = !self.is_asleep;
                println!("  a sentinel is asleep: {}", self.is_asleep);
                let signal = if self.is_asleep { Signal::STOP } else { Signal::CONT };
                self.set.signal_sentinel(SLEEPY, signal);
            }
            _ => {
                let signal = if self.writer.random.bool() { Signal::TERM } else { Signal::KILL };
                println!("  proxy: {signal:?}");
                self.program.restart(signal).await;
            }
        }
        what == 9
    }

    async fn fails_over(&mut self, failover: Failover) {
        let old = self.primary;
        self.set.is_settled(old).await;
        let is_whole = self.writer.random.bool();
        println!("  failover of {old}: {failover:?}, of all that was written: {is_whole}");
        // What is not replicated may be lost, and an older table come back with the new primary.
        let from = if is_whole {
            assert!(self.set.is_replicated(old).await, "the replicas do not get what is written");
            None
        } else {
            self.writer.changes(&self.set.servers[old]).await;
            Some(self.writer.history.begins_to_write())
        };
        match failover {
            Failover::Planned => self.set.fail_over().await,
            Failover::Killed => self.set.servers[old].kill(),
            Failover::Frozen => self.set.servers[old].freeze(),
            Failover::CutOff => {
                self.set.servers[old].run("ACL SETUSER default -ping -slaveof -replicaof").await;
            }
        }
        self.primary = self.set.new_primary(old).await;
        println!("  primary: {}", self.primary);
        let primary = &self.set.servers[self.primary];
        if let Some(from) = from {
            self.writer.history.holds(from, table(primary).await);
        }
        for _ in 0..self.writer.random.u32(0..3) {
            self.writer.changes(primary).await;
        }
        if failover == Failover::Planned {
            return;
        }
        sleep(2 * HEARTBEAT + NOISE).await;
        match failover {
            // It knows nothing any more.
            Failover::Killed => self.set.servers[old].launch().await,
            Failover::Frozen => self.set.servers[old].thaw(),
            Failover::Planned | Failover::CutOff => {}
        }
        self.old_one_takes_a_write(old).await;
        self.set.servers[old].run("ACL SETUSER default +@all").await;
        self.set.follow(old, self.primary).await;
    }

    /// It is not noted: nobody may have it.
    async fn old_one_takes_a_write(&mut self, old: usize) {
        let server = &self.set.servers[old];
        // A sentinel may have been faster, and then it refuses.
        let mut connection = server.connection().await;
        let mut write = redis::cmd("ZADD");
        let taken =
            write.arg("servers").arg(1).arg("10.66.66.66:80").query_async::<u32>(&mut connection).await;
        println!("  the old primary takes a write: {taken:?}");
        let most = if self.writer.random.bool() { 50 } else { LONG_PAUSE.as_millis() as u64 };
        sleep(self.writer.pause(most)).await;
    }

    async fn mends(&mut self) {
        if std::mem::take(&mut self.is_asleep) {
            self.set.signal_sentinel(SLEEPY, Signal::CONT);
        }
        for server in &self.set.servers {
            notify(server, true).await;
        }
        let primary = &self.set.servers[self.primary];
        assert!(
            info(primary, "replication").await.contains("role:master"),
            "a failover that nobody asked for"
        );
        self.writer.leaves_a_table(primary).await;
        // A sentinel that fell asleep over its failover has not told everybody.
        for replica in [(self.primary + 1) % 3, (self.primary + 2) % 3] {
            self.set.follow(replica, self.primary).await;
        }
    }
}

async fn one_run(seed: u64, spells: u32) {
    println!("STATERA_SEED={seed} make test ARGS=redis_random_sentinel:: replays it; {spells} spells");
    let (mut writer, set) = (Writer::new(seed), Sentinels::start_patient().await);
    let watches = writer.watches();
    println!("{watches:?}");
    let section = |watch| format!("{}, watch: {watch}, {SETTINGS}", set.section());
    let inside = [watches[0], watches[1]]
        .map(|watch| Proxy::web(&format!("redis: {{{}}}", section(watch)), "weights_key: servers"));
    let program = Restarted::start(section(watches[2])).await;
    let mut watched: Vec<Watched> = inside.iter().map(Watched::from).collect();
    watched.push(program.watched());
    // A primary is left two heartbeats after another was named, at the latest.
    let promise = Promise { overtaken: PROMISE.overtaken + 2 * HEARTBEAT, ..PROMISE };
    let watcher = Watcher::start(&watched, &writer.history, promise);
    let mut failovers = FAILOVERS;
    writer.random.shuffle(&mut failovers);
    let mut hand = Hand { set, primary: 0, writer, program, may_lose: true, is_asleep: false };
    for spell in 0..spells {
        println!("spell {spell}");
        // In every other spell nothing takes the table away, which would excuse any.
        hand.may_lose = spell % 2 == 1;
        hand.writer.changes(&hand.set.servers[hand.primary]).await;
        for _ in 0..FAULTS_BETWEEN_FAILOVERS {
            let silent = hand.breaks_something().await;
            let long = silent && hand.writer.random.u8(..3) == 0;
            sleep(if long { LONG_PAUSE } else { hand.writer.pause(60) }).await;
        }
        let failover = failovers[spell as usize % failovers.len()];
        hand.fails_over(failover).await;
        hand.mends().await;
        if watcher.has_seen_enough() {
            break;
        }
        let primary = &hand.set.servers[hand.primary];
        all_agree(&watched, primary, PROMISE.max_stale, &format!("after spell {spell} of seed {seed}")).await;
    }
    let seen = watcher.end().unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    println!("fresh snapshots seen: {seen:?}");
    // The program gives two pages of metrics for a look.
    assert!(seen.iter().all(|looks| *looks > u64::from(spells) * 5), "hardly ever fresh: {seen:?} looks");
}

#[tokio::test]
async fn whoever_is_the_primary_a_fresh_snapshot_is_what_it_held_a_moment_ago_and_all_agree_in_the_end() {
    if std::env::var_os("STATERA_SEED").is_some() {
        return one_run(seed(), LONG_SPELLS).await;
    }
    if std::env::var_os("STATERA_LONG").is_none() {
        return one_run(seed(), SPELLS).await;
    }
    let (begun, mut seeds) = (Instant::now(), 0);
    while seeds < 20 || begun.elapsed() < Duration::from_secs(15 * 60) {
        one_run(fastrand::u64(..), LONG_SPELLS).await;
        seeds += 1;
        println!("{seeds} seeds passed in {:?}", begun.elapsed());
    }
}
