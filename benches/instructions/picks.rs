//! Picks, as a program of its own: this one, started again under valgrind.

use std::hint::black_box;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use statera::balance::pool::{Pool, Sync};
use statera::balance::{Balance, Table, Weight};
use tokio::time::Instant;

use super::valgrind::{Counts, Valgrind};

/// The instructions of a process that picks so many times.
pub fn count(valgrind: &Valgrind, algorithm: &str, backends: usize, picks: u64) -> Result<Counts> {
    let program = std::env::current_exe()?;
    let (backends, picks) = (backends.to_string(), picks.to_string());
    let arguments = ["--picks", algorithm, &backends, &picks];
    valgrind.start(&format!("pick {algorithm} {backends}"), &program, &arguments)?.wait()
}

/// What is counted: the whole of a pick, as a session pays for it (the cell, freshness, the reference count).
pub fn run(arguments: &[String]) -> Result<()> {
    let [algorithm, backends, picks] = arguments else { bail!("--picks ALGORITHM BACKENDS PICKS") };
    let named = Balance::NAMES.into_iter().find(|(name, _)| name == algorithm);
    let (_, balance) = named.context("no such algorithm")?;
    let (backends, picks): (usize, u64) = (backends.parse()?, picks.parse()?);

    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let sync = Sync { max_stale: Duration::from_secs(3600), lua: None };
        let pool = Pool::new("web".into(), balance, Table::default(), Some(sync), 1);
        pool.cell.publish(table(backends)?);
        // The seed makes the random picks the same in each run. Those of the even spread begin at a random
        // point, which so many picks average out.
        let (mut rng, now) = (fastrand::Rng::with_seed(7), Instant::now());
        for _ in 0..picks {
            let client = SocketAddr::from((rng.u32(..).to_be_bytes(), 1));
            ensure!(
                black_box(pool.pick(client, &[], rng.u64(..), now).await).is_ok(),
                "a pick found no backend"
            );
        }
        Ok(())
    })
}

/// Weights from 1 to 100, so that neighbours differ: the same as in `../pick.rs`.
fn table(backends: usize) -> Result<Table> {
    let member = |i: usize| {
        let id = format!("10.{}.{}.{}:80", i / 65_536, i / 256 % 256, i % 256).parse()?;
        Ok((id, Weight::new((i * 7_919 % 100 + 1) as f64)?))
    };
    Ok(Table::new((0..backends).map(member).collect::<Result<_>>()?))
}
