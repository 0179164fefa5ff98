//! Writes the weights of a random run, to Redis and to its history alike.

use std::time::Duration;

use fastrand::Rng;
use redis::Value;

use super::{History, Redis, Table, Watched, eventually, without_zeros};

const BACKENDS: u32 = 6;
/// The watch modes that a config can set.
const WATCHES: [&str; 4] = ["auto", "notifications", "tracking", "poll"];

/// Writes random changes to the key `servers`.
pub struct Writer {
    pub history: History,
    pub random: Rng,
}

impl Writer {
    pub fn new(seed: u64) -> Self {
        Self { history: History::new(), random: Rng::with_seed(seed) }
    }

    /// All watch modes, in random order.
    pub fn watches(&mut self) -> [&'static str; 4] {
        let mut watches = WATCHES;
        self.random.shuffle(&mut watches);
        watches
    }

    pub fn pause(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.random.u64(0..=most))
    }

    fn member(&mut self) -> String {
        format!("10.0.0.{}:80", self.random.u32(1..=BACKENDS))
    }

    /// Runs a command that may change the key, and records what the key holds then. WRONGTYPE is no failure:
    /// an earlier command may have made the key a text.
    pub async fn writes(&mut self, redis: &Redis, command: &str) {
        println!("  {command}");
        let from = self.history.begins_to_write();
        let mut connection = redis.connection().await;
        let mut words = redis::Cmd::new();
        words.arg(command.split(' ').collect::<Vec<_>>());
        match words.query_async::<Value>(&mut connection).await {
            Err(error) if error.code() != Some("WRONGTYPE") => panic!("{command}: {error}"),
            _ => {}
        }
        self.history.holds(from, table(redis).await);
    }

    /// Writes the weight of a random member.
    pub async fn changes(&mut self, redis: &Redis) {
        let (member, weight) = (self.member(), self.random.u32(0..1_000));
        self.writes(redis, &format!("ZADD servers {weight} {member}")).await;
    }

    /// Changes the table by a random kind of command; if `may_lose`, also by one that deletes or replaces
    /// the table. True if a proxy may have got no notification of it.
    pub async fn writes_something(&mut self, redis: &Redis, may_lose: bool) -> bool {
        let (member, weight) = (self.member(), self.random.u32(0..1_000));
        let what = self.random.u32(if may_lose { 0..13 } else { 4..13 });
        match what {
            0 => self.writes(redis, &format!("ZREM servers {member}")).await,
            1 => self.writes(redis, "DEL servers").await,
            2 => self.writes(redis, "SET servers nonsense").await,
            3 => self.writes(redis, "FLUSHALL").await,
            4 => {
                redis.run("DEL other").await;
                redis.run(&format!("ZADD other {weight} {member} 1 10.0.0.9:80")).await;
                self.writes(redis, "RENAME other servers").await;
            }
            5 => {
                for weight in 0..40 {
                    self.writes(redis, &format!("ZADD servers {weight} {member}")).await;
                }
            }
            6 => {
                let mut elsewhere = redis::pipe();
                elsewhere.cmd("SELECT").arg(1).cmd("DEL").arg("servers").ignore();
                elsewhere.cmd("ZADD").arg("servers").arg(weight).arg(&member).ignore();
                let mut connection = redis.connection().await;
                elsewhere.query_async::<()>(&mut connection).await.expect("it is written");
                self.writes(redis, "SWAPDB 0 1").await;
            }
            7 | 8 => {
                // No proxy is notified, and the flags are right again when a proxy checks them.
                notify(redis, false).await;
                self.writes(redis, &format!("ZADD servers {weight} {member}")).await;
                notify(redis, true).await;
            }
            _ => self.writes(redis, &format!("ZADD servers {weight} {member}")).await,
        }
        (6..=8).contains(&what)
    }

    /// Makes sure that the key holds a table at the end.
    pub async fn leaves_a_table(&mut self, redis: &Redis) {
        if table(redis).await.is_none() {
            self.writes(redis, "DEL servers").await;
            self.changes(redis).await;
        }
    }
}

/// Switches keyspace notifications on or off.
pub async fn notify(redis: &Redis, on: bool) {
    redis.run_words(&["CONFIG", "SET", "notify-keyspace-events", if on { "KA" } else { "" }]).await;
}

/// The table that Redis holds; `None` if the key is empty or of another type.
pub async fn table(redis: &Redis) -> Option<Table> {
    let mut zrange = redis::cmd("ZRANGE");
    zrange.arg("servers").arg(0).arg(-1).arg("WITHSCORES");
    let answer: Result<Vec<(String, f64)>, _> = zrange.query_async(&mut redis.connection().await).await;
    answer.ok().map(Table::from_iter).filter(|table| !table.is_empty())
}

/// Waits until each proxy has the table that this Redis holds, as a fresh snapshot.
pub async fn all_agree(proxies: &[Watched], redis: &Redis, max_stale: Duration, when: &str) {
    let wanted = table(redis).await.expect("a table was left");
    for (number, proxy) in proxies.iter().enumerate() {
        eventually(&format!("proxy {number} holds {wanted:?} {when}"), || async {
            let Some(observation) = proxy.observe().await else { return false };
            let equals = if observation.has_zeros {
                observation.table == wanted
            } else {
                observation.table == without_zeros(&wanted)
            };
            equals && observation.age.is_some_and(|age| age <= max_stale)
        })
        .await;
    }
}
