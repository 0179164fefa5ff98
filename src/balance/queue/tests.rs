//! The queue and the slots, alone and under many threads.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Wake;
use std::thread::{self, Thread};

use tokio::time::Instant;

use crate::balance::backend::{Active, Ejection};
use crate::balance::pool::{NoPick, Pick, Pool};
use crate::balance::values::{BackendId, Balance, Capacity, Policy, Table, Weight};
use std::time::Duration;

use super::*;

const CLIENT: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Far longer than each wait in these tests.
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

/// Polls once: without Redis a pick never waits.
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

fn is_woken(ticket: &mut Ticket) -> bool {
    ticket.poll_woken(&mut Context::from_waker(Waker::noop())).is_ready()
}

fn woken(tickets: &mut [Ticket]) -> Vec<bool> {
    tickets.iter_mut().map(is_woken).collect()
}

/// A queue with `length` waiters, of which the first was woken and found no slot.
fn full_queue(queue: &Arc<Queue>, length: usize) -> Vec<Ticket> {
    let mut tickets: Vec<_> = (0..length).map(|_| queue.enter().expect("room")).collect();
    assert!(is_woken(&mut tickets[0]), "the first waiter picks at once");
    tickets[0].found_none(false);
    assert_eq!(woken(&mut tickets), vec![false; length]);
    tickets
}

fn queue(size: u32) -> Arc<Queue> {
    Arc::new(Queue::new(size))
}

#[test]
fn a_slot_that_is_taken_before_it_is_reported_does_not_wake_two_waiters() {
    let queue = queue(3);
    let mut tickets = Vec::new();
    queue.free(|| {
        let mut first = queue.enter().expect("room");
        tickets.extend([queue.enter().expect("room"), queue.enter().expect("room")]);
        assert!(is_woken(&mut first), "the queue was empty");
        first.served();
        assert_eq!(woken(&mut tickets), [true, false]);
        tickets[0].found_none(false);
    });
    assert_eq!(woken(&mut tickets), [true, false], "whether the slot was taken is not known");
    queue.free(|| {});
    assert_eq!(woken(&mut tickets), [true, false], "otherwise the second might pick before the first");
    tickets.remove(0).served();
    assert_eq!(woken(&mut tickets), [true], "no wake-up is lost");
}

#[test]
fn each_free_slot_wakes_the_next_waiter() {
    let queue = queue(3);
    let mut tickets = full_queue(&queue, 3);
    assert!(queue.enter().is_none(), "it is full");
    queue.free(|| {});
    assert_eq!(woken(&mut tickets), [true, false, false]);
    queue.free(|| {});
    assert_eq!(woken(&mut tickets), [true, true, false]);
    tickets.remove(0).served();
    tickets.remove(0).served();
    assert_eq!((woken(&mut tickets), queue.waiting()), (vec![false], 1));
}

#[test]
fn a_woken_waiter_that_leaves_passes_its_wake_up_on() {
    let queue = queue(3);
    let mut tickets = full_queue(&queue, 3);
    queue.free(|| {});
    drop(tickets.remove(0));
    assert_eq!(woken(&mut tickets), [true, false]);
    drop(tickets.remove(1));
    drop(tickets.remove(0));
    let mut tickets = vec![queue.enter().expect("room"), queue.enter().expect("room")];
    assert_eq!(woken(&mut tickets), [true, false], "a slot that became free earlier is looked for");
}

#[test]
fn a_slot_that_one_waiter_cannot_use_is_for_those_behind_it_and_for_the_next_to_enter() {
    let queue = queue(3);
    let mut tickets = full_queue(&queue, 2);
    queue.free(|| {});
    for index in 0..2 {
        assert_eq!(woken(&mut tickets), [index == 0, index == 1]);
        tickets[index].found_none(true);
    }
    assert_eq!(woken(&mut tickets), [false, false]);
    tickets.push(queue.enter().expect("room"));
    assert_eq!(woken(&mut tickets), [false, false, true]);
    tickets[2].found_none(false);
    tickets.pop();
    tickets.push(queue.enter().expect("room"));
    assert_eq!(woken(&mut tickets), [false, false, false], "the last pick found all backends full");
}

#[test]
fn a_slot_that_becomes_free_during_a_pick_is_looked_for_again() {
    let queue = queue(3);
    let mut tickets = full_queue(&queue, 2);
    queue.renewed();
    assert_eq!(woken(&mut tickets), [true, false]);
    queue.free(|| {});
    tickets[0].found_none(false);
    assert_eq!(woken(&mut tickets), [true, false]);
    tickets[0].found_none(false);
    assert_eq!(woken(&mut tickets), [false, false]);
}

#[test]
fn a_new_table_serves_one_waiter_after_the_other_until_all_backends_are_full() {
    let pool = pool(Balance::WeightedRandom, 1, 1);
    let first = pick(&pool).expect("a slot");
    let mut tickets = full_queue(pool.queue(), 5);
    pool.cell.publish(table(4));
    let mut picks = Vec::new();
    while is_woken(&mut tickets[0]) {
        match pick_for_waiter(&pool) {
            Ok(pick) => {
                picks.push(pick);
                tickets.remove(0).served();
            }
            Err(no) => {
                assert_eq!(no, NoPick::Full);
                tickets[0].found_none(false);
            }
        }
    }
    assert_eq!((picks.len(), woken(&mut tickets)), (3, vec![false; 2]));
    assert_eq!(pick(&pool).expect_err("others wait"), NoPick::Full);
    drop(first);
    assert_eq!(woken(&mut tickets), [true, false]);
}

#[test]
fn the_one_free_slot_among_ten_thousand_is_found_by_every_balance() {
    for (name, balance) in Balance::NAMES {
        let pool = pool(balance, 10_000, 1);
        let mut picks: Vec<_> = (0..10_000).map(|_| pick(&pool).expect("a slot")).collect();
        for _ in 0..3 {
            assert_eq!(pick(&pool).expect_err("all are full"), NoPick::Full, "{name}");
            let last = picks.swap_remove(fastrand::usize(..picks.len()));
            let free = last.backend.id().clone();
            drop(last);
            let tried = [free.clone()];
            assert_eq!(pick_for(&pool, CLIENT, &tried).expect_err("it was tried"), NoPick::Full, "{name}");
            let pick = pick(&pool).expect("a slot");
            assert_eq!(pick.backend.id(), &free, "{name}");
            picks.push(pick);
        }
    }
}

/// Sessions that full backends refuse are spread over the others by weight, and do not all go to the next
/// one.
#[test]
fn full_backends_favour_no_other_backend() {
    for balance in [Balance::WeightedRandom, Balance::WeightedRoundRobin, Balance::SourceHash] {
        let pool = pool(balance, 100, 1_000);
        let full = |n: u32| !n.is_multiple_of(10) && n < 90;
        let backends = pool.registry.living();
        let mut held = Vec::new();
        for n in (0..100).filter(|n| full(*n)) {
            let backend = backends.iter().find(|backend| *backend.id() == id(n)).expect("it lives");
            held.extend(std::iter::from_fn(|| Active::take(backend)));
        }
        let mut picked = std::collections::HashMap::<BackendId, u32>::new();
        for n in 0..1_900 {
            let client = Ipv4Addr::from_bits(0x0a00_0000 + n);
            let pick = pick_for(&pool, client, &[]).expect("a slot");
            *picked.entry(pick.backend.id().clone()).or_default() += 1;
        }
        assert_eq!(picked.len(), 19, "{balance:?}: {picked:?}");
        // About 100 each. A backend that took over the sessions of the nine before it would have about 500.
        assert!(picked.values().all(|n| (50..170).contains(n)), "{balance:?}: {picked:?}");
    }
}

#[test]
fn a_backend_with_a_trial_session_gets_a_second_one_only_when_no_other_backend_is_full() {
    let pool = pool(Balance::WeightedRandom, 2, 1);
    let [ejected, other] = [0, 1].map(|n| {
        let living = pool.registry.living();
        living.into_iter().find(|backend| *backend.id() == id(n)).expect("it lives")
    });
    ejected.condition.set_ejection(Ejection::Trial);
    pool.cell.refresh();
    let held = Active::take(&other).expect("a slot");
    let trial = pick(&pool).expect("the trial session");
    assert!(trial.trial.is_some());
    drop(trial);
    assert_eq!(pick(&pool).expect_err("the other is full"), NoPick::Full);
    drop(held);
    assert_eq!(pick(&pool).expect("a slot").backend.id(), other.id());
    let left = pick_for(&pool, CLIENT, &[other.id().clone()]).expect("no other backend is left");
    assert_eq!(left.backend.id(), ejected.id());
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits in the queue until a pick succeeds. Panics when no wake-up comes.
fn wait(pool: &Pool) -> (u64, Pick) {
    let mut ticket = pool.queue().enter().expect("room");
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let limit = Instant::now() + PATIENCE;
    loop {
        while ticket.poll_woken(&mut Context::from_waker(&waker)).is_pending() {
            thread::park_timeout(Duration::from_secs(1));
            assert!(Instant::now() < limit, "a wake-up was lost: {:?}", pool.queue());
        }
        match pick_for_waiter(pool) {
            Ok(pick) => {
                let number = ticket.number;
                ticket.served();
                return (number, pick);
            }
            Err(NoPick::Full) => ticket.found_none(false),
            Err(NoPick::NoBackend) => panic!("all have weight"),
        }
    }
}

/// Threads that pick, wait if they must and free their slots, as fast as they can, while the snapshot is
/// replaced.
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
fn no_backend_exceeds_its_limit_and_no_wake_up_is_lost_under_many_threads() {
    for (_, balance) in Balance::NAMES {
        many_threads(&pool(balance, 1, 1), 5_000, 1);
        many_threads(&pool(balance, 3, 2), 5_000, 2);
    }
}

#[test]
fn waiters_get_slots_in_the_order_in_which_they_entered_under_many_threads() {
    let pool = pool(Balance::WeightedRandom, 1, 1);
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    let (number, pick) = wait(&pool);
                    served.lock().expect("no thread panics while it holds the lock").push(number);
                    drop(pick);
                }
            });
        }
    });
    let served = served.into_inner().expect("no thread panics while it holds the lock");
    assert!(
        served.is_sorted(),
        "{} of {} in order",
        served.windows(2).filter(|w| w[0] < w[1]).count(),
        served.len()
    );
}
