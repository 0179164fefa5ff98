//! Pools with sessions that begin and end: which backend gets the next one.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use tokio::time::Instant;

use super::*;
use crate::balance::backend::Ejection;
use crate::balance::pool::{NoPick, Pick, Pool};
use crate::balance::values::{AdminState, Balance, Capacity, Policy, Table, Weight};

const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

fn id(n: usize) -> BackendId {
    format!("10.0.{}.{}:80", n / 250, n % 250).parse().expect("an address")
}

/// A table whose weights are those of backends 0, 1, 2 and so on.
fn table(weights: &[f64]) -> Table {
    let member = |(n, weight): (usize, &f64)| (id(n), Weight::new(*weight).expect("a weight"));
    Table::new(weights.iter().enumerate().map(member).collect())
}

fn policy() -> Policy {
    Balance::LeastConn.into()
}

fn pool(policy: Policy, weights: &[f64]) -> Pool {
    let pool = Pool::new("web".into(), policy, table(weights), None, 1);
    // A slow start begins only with a table from the same source as the one before.
    pool.cell.publish(table(weights));
    pool
}

/// A pool and its sessions, which last until they are dropped.
struct Busy {
    pool: Pool,
    sessions: Vec<Pick>,
    rng: fastrand::Rng,
}

impl Busy {
    fn new(policy: Policy, weights: &[f64]) -> Self {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let rng = fastrand::Rng::with_seed(seed);
        Self { pool: pool(policy, weights), sessions: Vec::new(), rng }
    }

    async fn try_begin(&mut self) -> Result<BackendId, NoPick> {
        let pick = self.pool.pick(CLIENT, &[], self.rng.u64(..), Instant::now()).await?;
        let id = pick.backend.id().clone();
        self.sessions.push(pick);
        Ok(id)
    }

    async fn begin(&mut self, sessions: usize) -> HashMap<BackendId, usize> {
        let mut begun = HashMap::new();
        for _ in 0..sessions {
            *begun.entry(self.try_begin().await.expect("a backend")).or_default() += 1;
        }
        begun
    }

    fn end_all_of(&mut self, backend: &BackendId) {
        self.sessions.retain(|session| session.backend.id() != backend);
    }

    fn active(&self) -> Vec<u32> {
        let snapshot = self.pool.cell.load();
        let active: HashMap<_, _> =
            snapshot.members().iter().map(|member| (member.backend.id(), member.backend.active())).collect();
        (0..active.len()).map(|n| active[&id(n)]).collect()
    }
}

#[tokio::test]
async fn a_backend_that_lost_its_sessions_gets_all_new_ones_until_it_has_as_many_as_the_others() {
    for backends in [20, EXACT_MAX] {
        let mut busy = Busy::new(policy(), &vec![1.0; backends]);
        busy.begin(50 * backends).await;
        assert_eq!(busy.active(), vec![50; backends]);
        busy.end_all_of(&id(3));
        assert_eq!(busy.begin(40).await, HashMap::from([(id(3), 40)]));
        busy.begin(10).await;
        assert_eq!(busy.active(), vec![50; backends]);
    }
}

/// With more than 64 backends, each session looks at some of them. With two draws, the backend that lost its
/// sessions would get 2 % of the new ones.
#[tokio::test]
async fn in_a_large_pool_a_backend_that_lost_its_sessions_gets_several_times_its_share() {
    let mut busy = Busy::new(policy(), &[1.0; 100]);
    busy.begin(5_000).await;
    let mut regained = 0;
    for _ in 0..10 {
        busy.end_all_of(&id(3));
        regained += busy.begin(1_000).await.remove(&id(3)).unwrap_or_default();
    }
    // Four draws find the backend for 394 of them on average. Six standard deviations below that are 277; its
    // share is 100, and two draws would bring 199.
    assert!(regained >= 277, "{regained} of 10,000");
}

#[tokio::test]
async fn no_backend_has_one_session_more_than_its_weight_allows() {
    let mut rng = fastrand::Rng::with_seed(7);
    for backends in [2, 10, EXACT_MAX] {
        let weights: Vec<f64> = (0..backends).map(|_| 0.5 + 10.0 * rng.f64()).collect();
        let mut busy = Busy::new(policy(), &weights);
        busy.begin(20 * backends).await;
        let active = busy.active();
        let load = |n: usize, more: u32| f64::from(active[n] + more) / weights[n];
        for (one, other) in (0..backends).flat_map(|one| (0..backends).map(move |other| (one, other))) {
            assert!(load(one, 0) <= load(other, 1) * (1.0 + 1e-9), "{active:?} of {weights:?}");
        }
    }
}

#[tokio::test]
async fn of_backends_that_are_equally_busy_one_is_chosen_by_weight() {
    let busy = Busy::new(policy(), &[1.0, 3.0, 0.0]);
    let snapshot = Arc::clone(&busy.pool.cell.load());
    let heavy = snapshot.members().iter().find(|member| member.backend.id() == &id(1)).expect("it is there");
    // With one more, each has one session for a weight of 1.
    let _two = [(); 2].map(|()| crate::balance::backend::Active::take(&heavy.backend).expect("no limit"));
    let points = (0..1_000u64).map(|n| n * (u64::MAX / 1_000));
    let chosen = points.filter(|point| {
        snapshot.pick_least_busy(*point, &[]).expect("some have weight").backend.id() == &id(1)
    });
    let chosen = chosen.count();
    assert!((748..=752).contains(&chosen), "{chosen} of 1,000");
}

#[tokio::test]
async fn weights_of_any_size_are_obeyed() {
    for backends in [3, 100] {
        let mut weights = vec![1.7e308; backends];
        weights[0] = 5e-324;
        weights[1] = 0.0;
        let mut busy = Busy::new(policy(), &weights);
        busy.begin(10 * backends).await;
        assert_eq!(busy.active()[..2], [0, 0], "{backends}");

        let mut busy = Busy::new(policy(), &vec![5e-324; backends]);
        busy.begin(10 * backends).await;
        assert!(busy.active().iter().all(|active| *active > 0), "{backends}: {:?}", busy.active());
    }
}

#[tokio::test]
async fn full_backends_are_skipped_and_the_least_busy_of_the_others_is_taken() {
    let capacity = Capacity { max_connections: 4, ..Capacity::default() };
    for backends in [10, 100] {
        // By its weight the first backend is the least busy one, but it has a limit.
        let mut weights = vec![1.0; backends];
        weights[0] = 100.0;
        let mut busy = Busy::new(Policy { capacity, ..policy() }, &weights);
        for _ in 0..4 * backends {
            busy.try_begin().await.expect("some have room");
        }
        assert_eq!(busy.active(), vec![4; backends]);
        assert_eq!(busy.try_begin().await, Err(NoPick::Full), "full, not without backends");
        busy.end_all_of(&id(7));
        assert_eq!(busy.try_begin().await, Ok(id(7)));
    }
}

#[tokio::test]
async fn while_an_ejected_backend_has_its_trial_session_the_least_busy_of_the_others_is_taken() {
    let mut busy = Busy::new(policy(), &[1.0; 10]);
    busy.begin(50).await;
    for n in [2, 5] {
        busy.end_all_of(&id(n));
    }
    let ejected = busy.pool.registry.get_or_create(&id(2));
    ejected.condition.set_ejection(Ejection::Trial);
    busy.pool.cell.refresh();
    let begun = busy.begin(6).await;
    assert_eq!(begun, HashMap::from([(id(2), 1), (id(5), 5)]), "there is one trial session");
}

#[tokio::test]
async fn a_retry_takes_the_least_busy_of_those_that_were_not_tried() {
    let mut busy = Busy::new(policy(), &[1.0; 10]);
    busy.begin(50).await;
    for n in [2, 5] {
        busy.end_all_of(&id(n));
    }
    for (tried, next) in [(2, 5), (5, 2)] {
        let pick = busy.pool.pick(CLIENT, &[id(tried)], 7, Instant::now()).await.expect("a backend");
        assert_eq!(pick.backend.id(), &id(next));
    }
}

#[tokio::test(start_paused = true)]
async fn a_joining_backend_in_its_slow_start_gets_its_share_so_far_and_no_flood() {
    let policy = Policy { slow_start: Duration::from_secs(100), ..policy() };
    let mut busy = Busy::new(policy, &[1.0; 19]);
    busy.begin(50 * 19).await;
    busy.pool.cell.publish(table(&[1.0; 20]));
    let joiner = |busy: &Busy| busy.active()[19];
    busy.begin(200).await;
    // A tenth of what the others have, which is 60.
    assert!((5..=7).contains(&joiner(&busy)), "{}", joiner(&busy));
    tokio::time::advance(Duration::from_secs(50)).await;
    busy.pool.cell.refresh();
    busy.begin(200).await;
    assert!((28..=36).contains(&joiner(&busy)), "half of 66: {}", joiner(&busy));
}

/// Each choice counts at once, so other threads see it, except for the choices that are made at that moment.
#[test]
fn workers_that_choose_at_the_same_time_spread_over_equal_backends() {
    const WORKERS: u32 = 8;
    let pool = Arc::new(pool(policy(), &[1.0; 20]));
    let begin = Arc::new(Barrier::new(WORKERS as usize));
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (pool, begin) = (Arc::clone(&pool), Arc::clone(&begin));
            std::thread::spawn(move || {
                let mut rng = fastrand::Rng::with_seed(worker.into());
                let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                begin.wait();
                runtime.block_on(async {
                    let mut sessions = Vec::new();
                    for _ in 0..2_000 {
                        let pick = pool.pick(CLIENT, &[], rng.u64(..), Instant::now()).await;
                        sessions.push(pick.expect("a backend"));
                    }
                    sessions
                })
            })
        })
        .collect();
    let sessions: Vec<_> = workers.into_iter().map(|worker| worker.join().expect("it ends")).collect();
    let snapshot = pool.cell.load();
    let active = || snapshot.members().iter().map(|member| member.backend.active());
    let (least, most) = (active().min().expect("some"), active().max().expect("some"));
    // No session has ended, so each count that a thread saw was at most the least of all at its choice.
    assert!(most - least <= WORKERS, "{least} to {most}");
    drop(sessions);
    assert_eq!(active().sum::<u32>(), 0);
}

#[tokio::test]
async fn a_backend_in_drain_is_never_the_least_busy_one() {
    let mut busy = Busy::new(policy(), &[1.0, 1.0, 1.0, 0.0]);
    busy.pool.cell.publish(table(&[1.0, 1.0, 1.0, 0.0]).with_states(vec![(id(0), AdminState::Drain)]));
    busy.begin(20).await;
    assert_eq!(busy.active(), [0, 10, 10, 0]);
}
