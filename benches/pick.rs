//! What a pick and a snapshot cost, at the table sizes that the targets name: a pick ≤ 30 ns at 10 backends
//! and ≤ 80 ns at 10,000, a snapshot of 10,000 ≤ 1 ms; any algorithm ≤ 100 ns at 1,000, `least_conn` ≤ 150 ns
//! at 64, and ≤ 20 ms to build for `source_hash`.
//!
//! `cargo bench --bench pick`

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use statera::balance::backend::Registry;
use statera::balance::pool::{Pool, Sync};
use statera::balance::snapshot::{Origin, Snapshot};
use statera::balance::{Balance, Table, Weight};

const SIZES: [usize; 5] = [10, 64, 100, 1_000, 10_000];

const CLIENT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

fn client(rng: &mut fastrand::Rng) -> SocketAddr {
    SocketAddr::from((rng.u32(..).to_be_bytes(), 1))
}

/// Weights from 1 to 100, so that neighbours differ and no bucket of the lookup table is like another.
fn table(backends: usize) -> Table {
    let member = |i: usize| {
        let id = format!("10.{}.{}.{}:80", i / 65_536, i / 256 % 256, i % 256).parse().expect("an address");
        (id, Weight::new((i * 7_919 % 100 + 1) as f64).expect("a weight"))
    };
    Table::new((0..backends).map(member).collect())
}

fn picks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pick");
    for size in SIZES {
        let snapshot =
            Snapshot::new(1, Origin::Redis, &table(size), Balance::WeightedRandom, &Registry::new(1));
        let mut rng = fastrand::Rng::with_seed(7);
        group.bench_function(BenchmarkId::new("snapshot", size), |bencher| {
            bencher.iter(|| black_box(snapshot.pick(rng.u64(..), &[])).map(|member| member.weight));
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for (name, balance) in Balance::NAMES {
        for size in SIZES {
            // The whole of it: the cell, the pick, and the backend's reference count, as a session pays for
            // it.
            let sync = Sync { max_stale: Duration::from_secs(3600), lua: None };
            let pool = Arc::new(Pool::new("web".into(), balance, Table::default(), Some(sync), 1));
            pool.cell.publish(table(size));
            let mut rng = fastrand::Rng::with_seed(7);
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter_custom(|rounds| {
                    runtime.block_on(async {
                        let started = tokio::time::Instant::now();
                        for _ in 0..rounds {
                            drop(black_box(pool.pick(client(&mut rng), &[], rng.u64(..), started).await));
                        }
                        started.elapsed()
                    })
                });
            });
        }
    }
    for size in [10, 64, 100, 1_000] {
        // With sessions that stay, as in a pool in use: counts cannot be foreseen, and ties are rare.
        let pool = Pool::new("web".into(), Balance::LeastConn, table(size), None, 1);
        let (mut rng, now) = (fastrand::Rng::with_seed(7), tokio::time::Instant::now());
        let mut pick = || runtime.block_on(pool.pick(CLIENT, &[], rng.u64(..), now)).expect("a backend");
        let mut sessions: Vec<_> = (0..50 * size).map(|_| pick()).collect();
        let mut rng = fastrand::Rng::with_seed(8);
        group.bench_function(BenchmarkId::new("least_conn_busy", size), |bencher| {
            bencher.iter_custom(|rounds| {
                runtime.block_on(async {
                    let started = tokio::time::Instant::now();
                    for _ in 0..rounds {
                        let picked = pool.pick(CLIENT, &[], rng.u64(..), started).await.expect("a backend");
                        let place = rng.usize(..sessions.len());
                        sessions[place] = black_box(picked);
                    }
                    started.elapsed()
                })
            });
        });
    }
    group.finish();
}

fn builds(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot_build");
    for size in SIZES {
        let (table, registry) = (table(size), Registry::new(1));
        // Backends live on from snapshot to snapshot, so the first one is built outside.
        let _living = Snapshot::new(1, Origin::Redis, &table, Balance::WeightedRandom, &registry);
        for (name, balance) in [Balance::NAMES[0], Balance::NAMES[3]] {
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter(|| Snapshot::new(2, Origin::Redis, black_box(&table), balance, &registry));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, picks, builds);
criterion_main!(benches);
