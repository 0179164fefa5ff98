//! What a fleet costs one Redis: at rest, for one weight, and when Redis restarts under all of it at once.
//!
//! `make bench-herd` starts a redis-server and 50 proxies of one worker each, with the config's defaults, for
//! tables of 10, 1,000 and 10,000 members. Everything is counted by Redis itself (`INFO`); `--proxies N`
//! makes it another fleet. Then `at_rest.rs` shows that a fleet at rest costs its heartbeats, leases and full
//! reads, whatever Redis tells it; with `--at-rest` this comes alone. `--statera PATH` takes another build.

mod at_rest;
mod server;
#[path = "../shipped.rs"]
mod shipped;

use std::fmt::Write as _;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redis::{Connection, Value, cmd};
use server::{Counted, LIMIT, Redis, Running, connections, counted, number_at};
use tempfile::TempDir;
use tokio::time::Instant;

const SIZES: [u32; 4] = [10, 1_000, 10_000, 1_000_000];
/// Larger tables are not read whole, so only the pick is measured.
const LARGEST_TABLE: u32 = 100_000;
const REST: Duration = Duration::from_secs(10);
const CHANGES: u32 = 10;
const DOWN: Duration = Duration::from_secs(3);
const BACK: Duration = Duration::from_secs(7);
const WINDOW: Duration = Duration::from_millis(100);
const PICKS: u32 = 1_000;
const PICK: &str = include_str!("../../src/redis/pick/pick.lua");

fn fill(connection: &mut Connection, members: u32) -> Result<()> {
    let script = "redis.call('DEL', KEYS[1]) for i = 1, ARGV[1] do redis.call('ZADD', KEYS[1], 1 + i % 7, \
                  '10.' .. math.floor(i / 62500) .. '.' .. math.floor(i / 250) % 250 .. '.' .. i % 250 .. ':80') end";
    Ok(cmd("EVAL").arg(script).arg(1).arg("servers").arg(members).exec(connection)?)
}

/// Microseconds of Redis for one pick.
fn pick_cost(connection: &mut Connection) -> Result<f64> {
    let before = spent_on_picks(connection)?;
    for pick in 1..=PICKS {
        let point = f64::from(pick) / f64::from(PICKS + 1);
        let answer: Value = cmd("EVAL_RO")
            .arg(PICK)
            .arg(1)
            .arg("servers")
            .arg(point)
            .arg(pick)
            .arg(500)
            .arg(100)
            .query(connection)?;
        ensure!(matches!(answer, Value::Array(_)), "nothing was picked: {answer:?}");
    }
    Ok((spent_on_picks(connection)? - before) / f64::from(PICKS))
}

fn spent_on_picks(connection: &mut Connection) -> Result<f64> {
    let info: String = cmd("INFO").arg("commandstats").query(connection)?;
    let line =
        info.lines().find_map(|line| line.strip_prefix("cmdstat_eval_ro:calls=")?.split_once(",usec="));
    Ok(line.map_or(0.0, |(_, rest)| number_at(rest)))
}

/// A fleet with one pool, whose weights are under the key `servers`.
fn fleet(program: &Path, redis: &Redis, folder: &Path, proxies: u32) -> Result<Vec<Running>> {
    let yaml = format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{weights_key: servers, backends: {{\"127.0.0.1:9\": 1}}}}}}\nredis: {{url: \"redis://127.0.0.1:{}/0\"}}\n",
        redis.port
    );
    let started = server::start_fleet(program, folder, &yaml, proxies)?;
    server::all_report(&mut redis.connect()?, "{servers}:applied", proxies)?;
    Ok(started)
}

/// What one second without any change costs.
fn rest_of(connection: &mut Connection) -> Result<Counted> {
    sleep(Duration::from_secs(2));
    let (before, begun) = (counted(connection)?, Instant::now());
    sleep(REST);
    let (after, seconds) = (counted(connection)?, begun.elapsed().as_secs_f64());
    Ok(Counted {
        cpu_seconds: (after.cpu_seconds - before.cpu_seconds) / seconds,
        commands: (after.commands - before.commands) / seconds,
        ..Counted::default()
    })
}

/// CPU seconds that one change of a weight takes; each is measured over a second.
fn changes(connection: &mut Connection, rest: &Counted) -> Result<f64> {
    let (before, begun) = (counted(connection)?, Instant::now());
    for change in 0..CHANGES {
        cmd("ZADD").arg("servers").arg(1000 + change).arg("10.0.0.1:80").exec(connection)?;
        sleep(Duration::from_secs(1));
    }
    let spent = counted(connection)?.cpu_seconds - before.cpu_seconds;
    Ok((spent - rest.cpu_seconds * begun.elapsed().as_secs_f64()) / f64::from(CHANGES))
}

/// What a restart took: counted, the largest part of the connections within [`WINDOW`], until the last of the
/// first two thirds (who watches, and who picks) was back.
fn restart(redis: &mut Redis, proxies: u32, rest: &Counted) -> Result<(Counted, f64, Duration)> {
    cmd("SAVE").exec(&mut redis.connect()?)?;
    redis.server = None;
    sleep(DOWN);
    let mut connection = redis.launch()?;
    let (before, begun) = (counted(&mut connection)?, Instant::now());
    let mut seen = vec![(Duration::ZERO, 0.0)];
    let wanted = f64::from(3 * proxies);
    // The connections that report come back last, within 5 s.
    while begun.elapsed() < BACK {
        seen.push((begun.elapsed(), connections(&mut connection)? - before.connections));
        sleep(Duration::from_millis(20));
    }
    let after = counted(&mut connection)?;
    let seconds = begun.elapsed().as_secs_f64();
    let within = |(from, before): &(Duration, f64)| {
        let last = seen.iter().filter(|(until, _)| *until <= *from + WINDOW).map(|(_, count)| *count);
        last.fold(0.0, f64::max) - before
    };
    let most = seen.iter().map(within).fold(0.0, f64::max) / wanted;
    let back = seen.iter().find(|(_, count)| *count >= wanted * 2.0 / 3.0).map_or(LIMIT, |(at, _)| *at);
    let spent = Counted {
        cpu_seconds: after.cpu_seconds - before.cpu_seconds - rest.cpu_seconds * seconds,
        commands: after.commands - before.commands,
        connections: after.connections - before.connections,
        reads: after.reads - before.reads,
        picks: after.picks - before.picks,
    };
    Ok((spent, most, back))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let wanted = arguments.iter().skip_while(|argument| *argument != "--proxies").nth(1);
    let proxies: u32 = wanted.map_or(Ok(50), |text| text.parse()).context("--proxies: a number")?;
    let program = arguments.iter().skip_while(|argument| *argument != "--statera").nth(1);
    let program = program.map_or_else(shipped::build, |path| Ok(path.into()))?;
    if !arguments.iter().any(|argument| argument == "--at-rest") {
        by_table_size(&program, proxies)?;
    }
    at_rest::run(&program, proxies)
}

fn by_table_size(program: &Path, proxies: u32) -> Result<()> {
    let mut table = format!(
        "| members | one pick | at rest, a second and proxy | one weight, a proxy | a restart, a proxy | ZRANGE and picks in it | \
         most connections within {WINDOW:?} | two thirds back after |\n|---|---|---|---|---|---|---|---|\n"
    );
    let of_each = |whole: f64| whole / f64::from(proxies);
    for members in SIZES {
        let mut redis = Redis::start(&["--notify-keyspace-events", "KA"])?;
        let mut connection = redis.connect()?;
        fill(&mut connection, members)?;
        let pick = pick_cost(&mut connection)?;
        if members > LARGEST_TABLE {
            writeln!(table, "| {members} | {pick:.0} µs | | | | | | |")?;
            continue;
        }
        let folder = TempDir::new()?;
        let fleet = fleet(program, &redis, folder.path(), proxies)?;
        let rest = rest_of(&mut connection)?;
        let change = changes(&mut connection, &rest)?;
        let (spent, most, back) = restart(&mut redis, proxies, &rest)?;
        drop(fleet);
        writeln!(
            table,
            "| {members} | {pick:.0} µs | {:.1} commands, {:.0} µs | {:.0} µs | {:.0} µs, {:.1} commands | {}, {} | {:.0} % | {} ms |",
            of_each(rest.commands),
            of_each(rest.cpu_seconds) * 1e6,
            of_each(change) * 1e6,
            of_each(spent.cpu_seconds) * 1e6,
            of_each(spent.commands),
            spent.reads,
            spent.picks,
            most * 100.0,
            back.as_millis(),
        )?;
    }
    println!("CPU time of one Redis for {proxies} proxies, by its own INFO\n\n{table}");
    Ok(())
}
