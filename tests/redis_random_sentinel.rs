//! Random failovers, in an order given by a seed: planned ones, and a primary that is killed, frozen, or
//! reachable by the proxies only. An old primary wakes up and accepts writes, or starts empty; replicas and
//! a sentinel are down; proxies are killed.
//!
//! The promise is that of `redis_random.rs`. Also, no proxy may ever have what is written to an old primary
//! later than two heartbeats after the sentinels named another one.
//!
//! STATERA_SEED replays the faults, but not their exact times. STATERA_LONG=1 runs at least 20 seeds and a
//! quarter of an hour.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::redis_random::{LONG_PAUSE, NOISE, PROMISE, SETTINGS};
use crate::support::{
    Promise, Proxy, RestartingProxy, Sentinels, Watched, Watcher, Writer, all_agree, info, notify, seed,
    table,
};

const HEARTBEAT: Duration = Duration::from_millis(100);
/// The only sentinel that is ever frozen: one that was frozen for two seconds starts no failover in the next
/// thirty.
const FREEZABLE: usize = 2;
const FAULTS_BETWEEN_FAILOVERS: u32 = 7;
/// Failovers of a short run, each of another kind.
const ROUNDS: u32 = 3;
/// Failovers of a long run, and of a seed that is replayed.
const LONG_ROUNDS: u32 = 12;

/// What happens to the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failover {
    /// It is demoted and stays up.
    Planned,
    /// It gets SIGKILL.
    Killed,
    /// It gets SIGSTOP. When it wakes up later it still acts as the primary.
    Frozen,
    /// It does not answer the sentinels and replicas any more, and still answers the proxies.
    CutOff,
}

const FAILOVERS: [Failover; 4] = [Failover::Planned, Failover::Killed, Failover::Frozen, Failover::CutOff];

/// Writes to Redis and breaks things.
struct Saboteur {
    set: Sentinels,
    primary: usize,
    writer: Writer,
    program: RestartingProxy,
    may_lose: bool,
    is_frozen: bool,
}

impl Saboteur {
    fn a_replica(&mut self) -> usize {
        (self.primary + self.writer.random.usize(1..=2)) % 3
    }

    /// Causes one fault. Returns true if a proxy may not be notified of writes now.
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
                self.is_frozen = !self.is_frozen;
                println!("  a sentinel is frozen: {}", self.is_frozen);
                let signal = if self.is_frozen { Signal::STOP } else { Signal::CONT };
                self.set.signal_sentinel(FREEZABLE, signal);
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
        println!("  failover of {old}: {failover:?}, all writes replicated: {is_whole}");
        // A write that is not replicated may be lost: the new primary may have an older table.
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
            // It starts empty.
            Failover::Killed => self.set.servers[old].launch().await,
            Failover::Frozen => self.set.servers[old].thaw(),
            Failover::Planned | Failover::CutOff => {}
        }
        self.old_primary_takes_a_write(old).await;
        self.set.servers[old].run("ACL SETUSER default +@all").await;
        self.set.follow(old, self.primary).await;
    }

    /// Writes to the old primary without a note in the history: no proxy may ever have this table.
    async fn old_primary_takes_a_write(&mut self, old: usize) {
        let server = &self.set.servers[old];
        // The write is refused if a sentinel has already made the server a replica.
        let mut connection = server.connection().await;
        let mut write = redis::cmd("ZADD");
        let taken =
            write.arg("servers").arg(1).arg("10.66.66.66:80").query_async::<u32>(&mut connection).await;
        println!("  the old primary takes a write: {taken:?}");
        let most = if self.writer.random.bool() { 50 } else { LONG_PAUSE.as_millis() as u64 };
        sleep(self.writer.pause(most)).await;
    }

    async fn mends(&mut self) {
        if std::mem::take(&mut self.is_frozen) {
            self.set.signal_sentinel(FREEZABLE, Signal::CONT);
        }
        for server in &self.set.servers {
            notify(server, true).await;
        }
        let primary = &self.set.servers[self.primary];
        assert!(
            info(primary, "replication").await.contains("role:master"),
            "the sentinels failed over by themselves"
        );
        self.writer.leaves_a_table(primary).await;
        // A sentinel that was frozen during its failover may not have reconfigured all replicas.
        for replica in [(self.primary + 1) % 3, (self.primary + 2) % 3] {
            self.set.follow(replica, self.primary).await;
        }
    }
}

async fn one_run(seed: u64, rounds: u32) {
    println!("STATERA_SEED={seed} make test ARGS=redis_random_sentinel:: replays it; {rounds} rounds");
    let (mut writer, set) = (Writer::new(seed), Sentinels::start_patient().await);
    let watches = writer.watches();
    println!("{watches:?}");
    let section = |watch| format!("{}, watch: {watch}, {SETTINGS}", set.section());
    let inside = [watches[0], watches[1]]
        .map(|watch| Proxy::web(&format!("redis: {{{}}}", section(watch)), "weights_key: servers"));
    let program = RestartingProxy::start(section(watches[2])).await;
    let mut watched: Vec<Watched> = inside.iter().map(Watched::from).collect();
    watched.push(program.watched());
    // The proxy leaves a primary at most two heartbeats after another was named.
    let promise = Promise { overtaken: PROMISE.overtaken + 2 * HEARTBEAT, ..PROMISE };
    let watcher = Watcher::start(&watched, &writer.history, promise);
    let mut failovers = FAILOVERS;
    writer.random.shuffle(&mut failovers);
    let mut saboteur = Saboteur { set, primary: 0, writer, program, may_lose: true, is_frozen: false };
    for round in 0..rounds {
        println!("round {round}");
        // In every other round no fault loses the table: while it is lost, any snapshot is allowed.
        saboteur.may_lose = round % 2 == 1;
        saboteur.writer.changes(&saboteur.set.servers[saboteur.primary]).await;
        for _ in 0..FAULTS_BETWEEN_FAILOVERS {
            let silent = saboteur.breaks_something().await;
            let long = silent && saboteur.writer.random.u8(..3) == 0;
            sleep(if long { LONG_PAUSE } else { saboteur.writer.pause(60) }).await;
        }
        let failover = failovers[round as usize % failovers.len()];
        saboteur.fails_over(failover).await;
        saboteur.mends().await;
        if watcher.has_seen_enough() {
            break;
        }
        let primary = &saboteur.set.servers[saboteur.primary];
        all_agree(&watched, primary, PROMISE.max_stale, &format!("after round {round} of seed {seed}")).await;
    }
    let seen = watcher.end().unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    println!("fresh snapshots seen: {seen:?}");
    // One look at the program needs two scrapes of its metrics, so it has the fewest looks.
    assert!(seen.iter().all(|looks| *looks > u64::from(rounds) * 5), "hardly ever fresh: {seen:?} looks");
}

#[tokio::test]
async fn through_failovers_a_fresh_snapshot_is_what_the_primary_had_and_all_agree_in_the_end() {
    if std::env::var_os("STATERA_SEED").is_some() {
        return one_run(seed(), LONG_ROUNDS).await;
    }
    if std::env::var_os("STATERA_LONG").is_none() {
        return one_run(seed(), ROUNDS).await;
    }
    let (begun, mut seeds) = (Instant::now(), 0);
    while seeds < 20 || begun.elapsed() < Duration::from_secs(15 * 60) {
        one_run(fastrand::u64(..), LONG_ROUNDS).await;
        seeds += 1;
        println!("{seeds} seeds passed in {:?}", begun.elapsed());
    }
}
