//! What a fleet of four pools each costs one Redis at rest: in each watch mode, for each state of the keys,
//! and under limits of the server that make it tell of what was only read.
//!
//! Expected are the heartbeats, the leases of what is applied, and the full reads: the fleet may cost no more
//! than half as much again. Where changes can be noticed by polling alone, or by a tracking table that
//! forgets what it is told, it is one read each second.

use std::fmt::Write as _;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use redis::{Connection, cmd};
use tempfile::TempDir;
use tokio::time::Instant;

use super::server::{self, Counted, Redis, Running, counted};

const POOLS: u32 = 4;
const MODES: [&str; 4] = ["notifications", "tracking", "auto", "poll"];
/// After the keys were written, until rests have grown.
const SETTLING: Duration = Duration::from_millis(2_500);
const WINDOW: Duration = Duration::from_secs(12);
/// How much of what is expected a fleet may cost. Full reads come in waves here, since the whole fleet is
/// started at once.
const MOST: f64 = 1.5;

/// The mean of an interval of the config, which is at random up to a fifth shorter.
const fn a_second(interval: f64) -> f64 {
    1.0 / (0.9 * interval)
}

/// What limits a server has, and what its tables hold.
struct Server {
    name: &'static str,
    arguments: &'static [&'static str],
    members: u32,
    /// The tracking table holds one key, so each read makes it forget another.
    forgets: bool,
    /// No table can be read whole.
    cuts: bool,
}

const SERVERS: [Server; 4] = [
    Server {
        name: "`KEA`",
        arguments: &["--notify-keyspace-events", "KEA"],
        members: 10,
        forgets: false,
        cuts: false,
    },
    Server {
        name: "`KEAm`",
        arguments: &["--notify-keyspace-events", "KEAm"],
        members: 10,
        forgets: false,
        cuts: false,
    },
    Server {
        name: "`KEAm`, tracking table of 1 key",
        arguments: &["--notify-keyspace-events", "KEAm", "--tracking-table-max-keys", "1"],
        members: 10,
        forgets: true,
        cuts: false,
    },
    Server {
        name: "`KEAm`, output buffers of 16 kB, tables of 2,000 members",
        arguments: &["--notify-keyspace-events", "KEAm", "--client-output-buffer-limit", "pubsub 16kb 0 0"],
        members: 2_000,
        forgets: false,
        cuts: true,
    },
];

/// What stands under the keys of a pool, and under those of its admin states.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Keys {
    Missing,
    There,
    Empty,
    WrongType,
}

impl Keys {
    /// In an order in which each state can be made from the one before.
    const ALL: [Self; 4] = [Self::Missing, Self::There, Self::Empty, Self::WrongType];

    fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::There => "there",
            Self::Empty => "emptied",
            Self::WrongType => "wrong type",
        }
    }

    fn write(self, connection: &mut Connection, members: u32) -> Result<()> {
        for pool in 0..POOLS {
            let (weights, states) = (format!("servers{pool}"), format!("{{servers{pool}}}:states"));
            if self != Self::Missing {
                cmd("DEL").arg(&[&weights, &states]).exec(connection)?;
            }
            match self {
                Self::Missing | Self::Empty => {}
                Self::There => {
                    let mut table = cmd("ZADD");
                    table.arg(&weights);
                    for member in 0..members {
                        table.arg(1).arg(format!("10.{pool}.{}.{}:80", member / 250, member % 250));
                    }
                    table.exec(connection)?;
                    cmd("HSET")
                        .arg(&states)
                        .arg(format!("10.{pool}.0.0:80"))
                        .arg("drain")
                        .exec(connection)?;
                }
                Self::WrongType => {
                    cmd("MSET").arg(&weights).arg("x").arg(&states).arg("x").exec(connection)?;
                }
            }
        }
        Ok(())
    }

    /// Commands of one read of a pool: ZRANGE and HLEN, and HGETALL where there are states.
    fn a_read(self) -> f64 {
        if self == Self::There { 3.0 } else { 2.0 }
    }
}

/// Commands a second that one proxy should cost.
fn expected(server: &Server, mode: &str, keys: Keys) -> f64 {
    // One on the connection that watches, one on that for Lua picks.
    let heartbeats = 2.0 * a_second(1.0);
    // EVAL, and TIME, HSET and PEXPIRE within it.
    let leases = f64::from(POOLS) * 4.0 * a_second(5.0);
    let polls = mode == "poll" || mode == "tracking" && server.forgets;
    let reads = if polls { a_second(1.0) } else { a_second(15.0) };
    // CONFIG GET tests the watch mode again.
    heartbeats + leases + f64::from(POOLS) * keys.a_read() * reads + a_second(15.0)
}

struct Fleet {
    mode: &'static str,
    redis: Redis,
    connection: Connection,
    _folder: TempDir,
    _proxies: Vec<Running>,
}

impl Fleet {
    fn start(program: &Path, server: &Server, mode: &'static str, proxies: u32) -> Result<Self> {
        let redis = Redis::start(server.arguments)?;
        let folder = TempDir::new()?;
        let mut pools = String::new();
        for pool in 0..POOLS {
            write!(pools, "p{pool}: {{weights_key: servers{pool}, backends: {{\"127.0.0.1:9\": 1}}}}, ")?;
        }
        let yaml = format!(
            "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: p0}}}}\npools: {{{pools}}}\n\
             redis: {{url: \"redis://127.0.0.1:{}/0\", watch: {mode}}}\n",
            redis.port
        );
        let started = server::start_fleet(program, folder.path(), &yaml, proxies)?;
        let connection = redis.connect()?;
        Ok(Self { mode, redis, connection, _folder: folder, _proxies: started })
    }

    fn all_report(&mut self, proxies: u32) -> Result<()> {
        for pool in 0..POOLS {
            server::all_report(&mut self.redis.connect()?, &format!("{{servers{pool}}}:applied"), proxies)?;
        }
        Ok(())
    }
}

/// Prints a table.
///
/// # Errors
/// A fleet cost more than it should.
pub fn run(program: &Path, proxies: u32) -> Result<()> {
    let mut table =
        format!("| server | keys | {} |\n|---|---|{}\n", MODES.join(" | "), "---|".repeat(MODES.len()));
    let mut loud = Vec::new();
    for server in &SERVERS {
        let start = |mode| Fleet::start(program, server, mode, proxies);
        let mut fleets = MODES.into_iter().map(start).collect::<Result<Vec<_>>>()?;
        fleets.iter_mut().try_for_each(|fleet| fleet.all_report(proxies))?;
        for keys in Keys::ALL {
            write!(table, "| {} | {} |", server.name, keys.name())?;
            for fleet in &mut fleets {
                keys.write(&mut fleet.connection, server.members)?;
            }
            sleep(SETTLING);
            let count = |fleets: &mut Vec<Fleet>| {
                fleets
                    .iter_mut()
                    .map(|fleet| counted(&mut fleet.connection))
                    .collect::<Result<Vec<Counted>>>()
            };
            let (before, begun) = (count(&mut fleets)?, Instant::now());
            sleep(WINDOW);
            let (after, seconds) = (count(&mut fleets)?, begun.elapsed().as_secs_f64());
            for ((fleet, before), after) in fleets.iter().zip(&before).zip(&after) {
                let commands = (after.commands - before.commands) / seconds;
                let cpu = (after.cpu_seconds - before.cpu_seconds) / seconds * 100.0;
                if server.cuts && keys == Keys::There {
                    // Every connection ends with its first read, and is made again at growing intervals.
                    write!(table, " {commands:.0}, {cpu:.1} % |")?;
                    continue;
                }
                let wanted = expected(server, fleet.mode, keys) * f64::from(proxies);
                write!(table, " {commands:.0} of {wanted:.0}, {cpu:.1} % |")?;
                if commands > wanted * MOST {
                    let (mode, name, keys) = (fleet.mode, server.name, keys.name());
                    loud.push(format!("{name}, {mode}, {keys}: {commands:.0} of {wanted:.0}"));
                }
            }
            table.push('\n');
        }
        drop(fleets);
    }
    println!(
        "Commands a second of one Redis for {proxies} proxies of {POOLS} pools at rest, of those expected, and its CPU time, \
         by its own INFO\n\n{table}"
    );
    ensure!(loud.is_empty(), "more commands than expected: {loud:?}");
    Ok(())
}
