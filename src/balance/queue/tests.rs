//! The line and the places, alone and under many threads.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Wake;
use std::thread::{self, Thread};

use tokio::time::Instant;

use crate::balance::backend::Ejection;
use crate::balance::pool::{NoPick, Pick, Pool};
use crate::balance::values::{BackendId, Balance, Capacity, Policy, Table, Weight};
use std::time::Duration;

use super::*;

const CLIENT: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn id(n: u32) -> BackendId {
    format!("10.0.{}.{}:80", n / 250, n % 250).parse().expect("an address")
}

fn table(backends: u32) -> Table {
    Table::new((0..backends).map(|n| (id(n), Weight::new(1.0).expect("a weight"))).collect())
}

fn pool(balance: Balance, backends: u32, max_connections: u32) -> Arc<Pool> {
    let capacity = Capacity { max_connections, queue_size: 64, queue_timeout: PATIENCE };
    let policy = Policy { capacity, ..balance.into() };
    Arc::new(Pool::new("web".into(), policy, table(backends), None, 1))
}

/// Without Redis a pick never waits.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
    }
}

fn pick_for(pool: &Pool, client: Ipv4Addr, tried: &[BackendId]) -> Result<Pick, NoPick> {
    let client = SocketAddr::from((client, 1));
    at_once(pool.pick(client, tried, fastrand::u64(..), Instant::now()))
}

fn pick(pool: &Pool) -> Result<Pick, NoPick> {
    pick_for(pool, CLIENT, &[])
}

fn pick_for_waiter(pool: &Pool) -> Result<Pick, NoPick> {
    at_once(pool.pick_for_waiter(SocketAddr::from((CLIENT, 1)), &[], fastrand::u64(..), Instant::now()))
}

fn has_turn(place: &mut Ticket) -> bool {
    place.poll_woken(&mut Context::from_waker(Waker::noop())).is_ready()
}

fn turns(line: &mut [Ticket]) -> Vec<bool> {
    line.iter_mut().map(has_turn).collect()
}

/// A line whose first has looked, and found that all is full.
fn full_line(queue: &Arc<Queue>, length: usize) -> Vec<Ticket> {
    let mut line: Vec<_> = (0..length).map(|_| queue.enter().expect("room")).collect();
    assert!(has_turn(&mut line[0]), "who comes first looks himself");
    line[0].found_none(false);
    assert_eq!(turns(&mut line), vec![false; length]);
    line
}

fn queue(size: u32) -> Arc<Queue> {
    Arc::new(Queue::new(size))
}

#[test]
fn a_place_that_is_taken_before_it_is_told_of_gives_two_no_turn_at_once() {
    let queue = queue(3);
    let mut line = Vec::new();
    queue.free(|| {
        let mut first = queue.enter().expect("room");
        line.extend([queue.enter().expect("room"), queue.enter().expect("room")]);
        assert!(has_turn(&mut first), "the line was empty");
        first.served();
        assert_eq!(turns(&mut line), [true, false]);
        line[0].found_none(false);
    });
    assert_eq!(turns(&mut line), [true, false], "nobody knows whether the place was taken");
    queue.free(|| {});
    assert_eq!(turns(&mut line), [true, false], "else the second might pick before the first");
    line.remove(0).served();
    assert_eq!(turns(&mut line), [true], "and yet no turn is lost");
}

#[test]
fn each_place_is_the_turn_of_the_next_one() {
    let queue = queue(3);
    let mut line = full_line(&queue, 3);
    assert!(queue.enter().is_none(), "it is full");
    queue.free(|| {});
    assert_eq!(turns(&mut line), [true, false, false]);
    queue.free(|| {});
    assert_eq!(turns(&mut line), [true, true, false]);
    line.remove(0).served();
    line.remove(0).served();
    assert_eq!((turns(&mut line), queue.waiting()), (vec![false], 1));
}

#[test]
fn who_leaves_gives_his_turn_on() {
    let queue = queue(3);
    let mut line = full_line(&queue, 3);
    queue.free(|| {});
    drop(line.remove(0));
    assert_eq!(turns(&mut line), [true, false]);
    drop(line.remove(1));
    drop(line.remove(0));
    let mut line = vec![queue.enter().expect("room"), queue.enter().expect("room")];
    assert_eq!(turns(&mut line), [true, false], "what became free before is looked for");
}

#[test]
fn what_one_cannot_use_is_for_those_behind_and_for_who_comes_next() {
    let queue = queue(3);
    let mut line = full_line(&queue, 2);
    queue.free(|| {});
    for place in 0..2 {
        assert_eq!(turns(&mut line), [place == 0, place == 1]);
        line[place].found_none(true);
    }
    assert_eq!(turns(&mut line), [false, false]);
    line.push(queue.enter().expect("room"));
    assert_eq!(turns(&mut line), [false, false, true]);
    line[2].found_none(false);
    line.pop();
    line.push(queue.enter().expect("room"));
    assert_eq!(turns(&mut line), [false, false, false], "it was found that all is full");
}

#[test]
fn a_place_that_becomes_free_during_a_look_is_looked_for_again() {
    let queue = queue(3);
    let mut line = full_line(&queue, 2);
    queue.renewed();
    assert_eq!(turns(&mut line), [true, false]);
    queue.free(|| {});
    line[0].found_none(false);
    assert_eq!(turns(&mut line), [true, false]);
    line[0].found_none(false);
    assert_eq!(turns(&mut line), [false, false]);
}

#[test]
fn a_new_table_serves_one_after_the_other_until_all_is_full() {
    let pool = pool(Balance::WeightedRandom, 1, 1);
    let first = pick(&pool).expect("a place");
    let mut line = full_line(pool.queue(), 5);
    pool.cell.publish(table(4));
    let mut picks = Vec::new();
    while has_turn(&mut line[0]) {
        match pick_for_waiter(&pool) {
            Ok(pick) => {
                picks.push(pick);
                line.remove(0).served();
            }
            Err(no) => {
                assert_eq!(no, NoPick::Full);
                line[0].found_none(false);
            }
        }
    }
    assert_eq!((picks.len(), turns(&mut line)), (3, vec![false; 2]));
    assert_eq!(pick(&pool).expect_err("others wait"), NoPick::Full);
    drop(first);
    assert_eq!(turns(&mut line), [true, false]);
}

#[test]
fn the_one_place_among_ten_thousand_is_found_by_every_balance() {
    for (name, balance) in Balance::NAMES {
        let pool = pool(balance, 10_000, 1);
        let mut picks: Vec<_> = (0..10_000).map(|_| pick(&pool).expect("a place")).collect();
        for _ in 0..3 {
            assert_eq!(pick(&pool).expect_err("all are full"), NoPick::Full, "{name}");
            let last = picks.swap_remove(fastrand::usize(..picks.len()));
            let free = last.backend.id().clone();
            drop(last);
            let tried = [free.clone()];
            assert_eq!(pick_for(&pool, CLIENT, &tried).expect_err("it was tried"), NoPick::Full, "{name}");
            let pick = pick(&pool).expect("a place");
            assert_eq!(pick.backend.id(), &free, "{name}");
            picks.push(pick);
        }
    }
}

/// Beside full ones the others get what their weights say: not each the sessions of the full one before it.
#[test]
fn full_backends_favour_none_of_the_others() {
    for balance in [Balance::WeightedRandom, Balance::WeightedRoundRobin, Balance::SourceHash] {
        let pool = pool(balance, 100, 1_000);
        let full = |n: u32| !n.is_multiple_of(10) && n < 90;
        let backends = pool.registry.living();
        let mut held = Vec::new();
        for n in (0..100).filter(|n| full(*n)) {
            let backend = backends.iter().find(|backend| *backend.id() == id(n)).expect("it lives");
            held.extend(std::iter::from_fn(|| crate::balance::backend::Active::take(backend)));
        }
        let mut picked = std::collections::HashMap::<BackendId, u32>::new();
        for n in 0..1_900 {
            let client = Ipv4Addr::from_bits(0x0a00_0000 + n);
            let pick = pick_for(&pool, client, &[]).expect("a place");
            *picked.entry(pick.backend.id().clone()).or_default() += 1;
        }
        assert_eq!(picked.len(), 19, "{balance:?}: {picked:?}");
        // 100 each; a backend that had the sessions of the nine before it would have some 500.
        assert!(picked.values().all(|n| (50..170).contains(n)), "{balance:?}: {picked:?}");
    }
}

#[test]
fn a_probed_backend_is_taken_only_where_the_others_are_not_merely_full() {
    let pool = pool(Balance::WeightedRandom, 2, 1);
    let [probed, other] = [0, 1].map(|n| {
        let living = pool.registry.living();
        living.into_iter().find(|backend| *backend.id() == id(n)).expect("it lives")
    });
    probed.condition.set_ejection(Ejection::Trial);
    pool.cell.refresh();
    let place = crate::balance::backend::Active::take(&other).expect("a place");
    let probe = pick(&pool).expect("the probe");
    assert!(probe.trial.is_some());
    drop(probe);
    assert_eq!(pick(&pool).expect_err("the other is full"), NoPick::Full);
    drop(place);
    assert_eq!(pick(&pool).expect("a place").backend.id(), other.id());
    let left = pick_for(&pool, CLIENT, &[other.id().clone()]).expect("nobody else is left");
    assert_eq!(left.backend.id(), probed.id());
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits in the line until a pick has succeeded. Panics where a turn was lost.
fn wait(pool: &Pool) -> (u64, Pick) {
    let mut place = pool.queue().enter().expect("room");
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let limit = Instant::now() + PATIENCE;
    loop {
        while place.poll_woken(&mut Context::from_waker(&waker)).is_pending() {
            thread::park_timeout(Duration::from_secs(1));
            assert!(Instant::now() < limit, "a turn was lost: {:?}", pool.queue());
        }
        match pick_for_waiter(pool) {
            Ok(pick) => {
                let number = place.number;
                place.served();
                return (number, pick);
            }
            Err(NoPick::Full) => place.found_none(false),
            Err(NoPick::NoBackend) => panic!("all have weight"),
        }
    }
}

/// Threads that pick, wait if they must, and give back, as fast as they can. What they hold is counted beside.
fn many_threads(pool: &Arc<Pool>, sessions: u32, most: u32) {
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    for n in 0..sessions {
                        let pick = pick(pool).unwrap_or_else(|_| wait(pool).1);
                        assert!(pick.backend.active() <= most, "{}", pick.backend.active());
                        if n.is_multiple_of(7) {
                            thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !end.load(Relaxed) {
                pool.cell.refresh();
                thread::yield_now();
            }
        });
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        end.store(true, Relaxed);
        assert!(ended.iter().all(Result::is_ok), "a thread failed");
    });
    assert_eq!(pool.queue().waiting(), 0);
    assert!(pool.registry.living().iter().all(|backend| backend.active() == 0));
}

#[test]
fn no_backend_has_more_than_it_may_and_no_turn_is_lost_under_many_threads() {
    for (_, balance) in Balance::NAMES {
        many_threads(&pool(balance, 1, 1), 5_000, 1);
        many_threads(&pool(balance, 3, 2), 5_000, 2);
    }
}

#[test]
fn places_are_given_in_the_order_in_which_they_were_waited_for_under_many_threads() {
    let pool = pool(Balance::WeightedRandom, 1, 1);
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    let (number, pick) = wait(&pool);
                    served.lock().expect("nobody panics with it").push(number);
                    drop(pick);
                }
            });
        }
    });
    let served = served.into_inner().expect("nobody panics with it");
    assert!(
        served.is_sorted(),
        "{} of {} in order",
        served.windows(2).filter(|w| w[0] < w[1]).count(),
        served.len()
    );
}
