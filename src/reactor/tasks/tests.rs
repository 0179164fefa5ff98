//! The order in which tasks run, their wakers, their panics, and the memory of their table.

use super::super::{Ready, Runtime, Watched};
use super::*;
use std::cell::Cell;
use std::future::{pending, poll_fn};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::thread;

use rustix::event::epoll::EventFlags;
use tokio::sync::oneshot;
use tokio::task::yield_now;

fn run<F: Future>(future: F) -> F::Output {
    Runtime::new().expect("descriptors").block_on(future)
}

/// The length of this thread's table of tasks.
fn table_length() -> usize {
    with(|reactor| reactor.tasks.entries.borrow().len()).expect("a reactor")
}

#[test]
fn tasks_run_in_the_order_in_which_they_were_woken() {
    run(async {
        let order = Rc::new(RefCell::new(Vec::new()));
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel()).unzip();
        for (number, receiver) in receivers.into_iter().enumerate() {
            let order = Rc::clone(&order);
            spawn(async move {
                order.borrow_mut().push(number);
                receiver.await.expect("it is sent");
                order.borrow_mut().push(number);
            });
        }
        yield_now().await;
        for sender in senders.into_iter().rev() {
            sender.send(()).expect("it waits");
        }
        yield_now().await;
        assert_eq!(*order.borrow(), [0, 1, 2, 2, 1, 0]);
    });
}

#[test]
fn a_task_that_is_woken_often_runs_once() {
    run(async {
        let (polls, waker) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(None::<Waker>)));
        let (counted, seen) = (Rc::clone(&polls), Rc::clone(&waker));
        spawn(poll_fn(move |cx| {
            counted.set(counted.get() + 1);
            seen.replace(Some(cx.waker().clone()));
            Poll::Pending
        }));
        yield_now().await;
        let waker = waker.take().expect("it ran");
        let elsewhere = waker.clone();
        let thread = thread::spawn(move || (0..100).for_each(|_| elsewhere.wake_by_ref()));
        thread.join().expect("it ends");
        (0..100).for_each(|_| waker.wake_by_ref());
        yield_now().await;
        yield_now().await;
        assert_eq!(polls.get(), 2);
    });
}

/// The table has as many entries as there were tasks at once, and a stale waker does no harm.
#[test]
fn an_entry_is_used_again_by_the_next_task() {
    run(async {
        let late = Rc::new(RefCell::new(Vec::<Waker>::new()));
        for _ in 0..100 {
            let (sender, receiver) = oneshot::channel();
            let kept = Rc::clone(&late);
            spawn(async move {
                let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
                kept.borrow_mut().push(waker);
                yield_now().await;
                kept.borrow().iter().for_each(Waker::wake_by_ref);
                sender.send(()).expect("it is waited for");
            });
            receiver.await.expect("it ends");
            late.borrow().iter().for_each(Waker::wake_by_ref);
            yield_now().await;
        }
        assert_eq!(table_length(), 1);
    });
}

#[test]
fn memory_is_given_back_after_a_peak_of_tasks_and_late_wakers_do_no_harm() {
    const PEAK: usize = 10_000;
    run(async {
        let late = Rc::new(RefCell::new(Vec::<Waker>::new()));
        for _ in 0..PEAK {
            let kept = Rc::clone(&late);
            spawn(poll_fn(move |cx| {
                kept.borrow_mut().push(cx.waker().clone());
                Poll::Ready(())
            }));
        }
        while late.borrow().len() < PEAK {
            yield_now().await;
        }
        let before = table_length();
        with(|reactor| reactor.tasks.shrink());
        let capacities = with(|reactor| {
            let tasks = &reactor.tasks;
            [tasks.entries.borrow().capacity(), tasks.free.borrow().capacity(), tasks.due.borrow().capacity()]
        });
        let after = capacities.expect("a reactor");
        assert!(before >= PEAK && after.iter().all(|capacity| *capacity <= 2048), "{before}, {after:?}");
        late.borrow().iter().for_each(Waker::wake_by_ref);
        let (sender, receiver) = oneshot::channel();
        spawn(async move { sender.send(7).expect("it is waited for") });
        assert_eq!(receiver.await, Ok(7));
    });
}

#[test]
fn a_task_that_panics_ends_alone() {
    struct PanicsToo;
    impl Drop for PanicsToo {
        fn drop(&mut self) {
            panic!("a defect in a drop");
        }
    }
    run(async {
        let (sender, receiver) = oneshot::channel::<()>();
        spawn(async move {
            let _sender = sender;
            panic!("a defect");
        });
        let (sender, dropped) = oneshot::channel::<()>();
        let held = (PanicsToo, sender);
        spawn(poll_fn(move |_| {
            let _ = &held;
            Poll::Ready(())
        }));
        let (sender, other) = oneshot::channel();
        spawn(async move {
            yield_now().await;
            sender.send(7).expect("it is waited for");
        });
        assert!(receiver.await.is_err());
        assert!(dropped.await.is_err());
        assert_eq!(other.await, Ok(7));
    });
}

#[test]
fn a_drop_knows_whether_its_task_or_its_thread_has_panicked() {
    struct Asks(Rc<RefCell<Vec<Option<Panicked>>>>);
    impl Drop for Asks {
        fn drop(&mut self) {
            self.0.borrow_mut().push(panicked());
        }
    }
    let answers = Rc::new(RefCell::new(Vec::new()));
    let asks = || Asks(Rc::clone(&answers));
    let dies = catch_unwind(AssertUnwindSafe(|| {
        run(async {
            let held = asks();
            spawn(async move { drop(held) });
            let held = asks();
            // Dropped by the poll that unwinds.
            spawn(async move {
                let _held = held;
                panic!("a defect of this test");
            });
            let held = asks();
            // Dropped after the poll has unwound.
            spawn(poll_fn(move |_| {
                let _ = &held;
                panic!("a defect of this test");
            }));
            let held = asks();
            spawn(async move {
                let _held = held;
                pending::<()>().await;
            });
            yield_now().await;
            yield_now().await;
            panic!("a defect of the thread");
        });
    }));
    assert!(dies.is_err());
    assert_eq!(*answers.borrow(), [None, Some(Panicked::Task), Some(Panicked::Task), Some(Panicked::Thread)]);
}

/// The drop of a task wakes one task and spawns another while the runtime drops its tasks.
#[test]
fn tasks_that_the_runtime_drops_may_wake_and_spawn_others() {
    struct Last(Option<oneshot::Sender<()>>, Rc<Cell<bool>>);
    impl Drop for Last {
        fn drop(&mut self) {
            let _ = self.0.take().expect("once").send(());
            spawn(pending());
            self.1.set(true);
        }
    }
    let (ended, has_spawned) = (Rc::new(()), Rc::new(Cell::new(false)));
    run(async {
        let (sender, receiver) = oneshot::channel();
        let both = [Rc::clone(&ended), Rc::clone(&ended)];
        let last = Last(Some(sender), Rc::clone(&has_spawned));
        let [first, second] = both;
        spawn(async move {
            let _held = first;
            let _ = receiver.await;
            unreachable!("nothing runs any more");
        });
        spawn(async move {
            let _held = (second, last);
            pending::<()>().await;
        });
        // Its entry is the last of the table and free, and is removed before the others.
        spawn(async {});
        yield_now().await;
    });
    assert!(has_spawned.get());
    assert_eq!(Rc::strong_count(&ended), 1);
}

/// Between two polls of a task that is always due, the reactor waits for events and other tasks run.
#[test]
fn a_task_that_wakes_itself_runs_once_per_iteration() {
    run(async {
        let steps = Rc::new(Cell::new(0));
        let counted = Rc::clone(&steps);
        spawn(async move {
            loop {
                counted.set(counted.get() + 1);
                yield_now().await;
            }
        });
        yield_now().await;
        assert_eq!(steps.get(), 1);
        yield_now().await;
        assert_eq!(steps.get(), 2);
    });
}

#[test]
fn tasks_that_wake_each_other_let_the_reactor_wait_for_events() {
    run(async {
        let (steps, wakers) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new([None::<Waker>, None])));
        for number in 0..2 {
            let (counted, wakers) = (Rc::clone(&steps), Rc::clone(&wakers));
            spawn(poll_fn(move |cx| {
                counted.set(counted.get() + 1);
                let mut wakers = wakers.borrow_mut();
                wakers[number] = Some(cx.waker().clone());
                if let Some(other) = &wakers[1 - number] {
                    other.wake_by_ref();
                }
                Poll::Pending
            }));
        }
        yield_now().await;
        assert_eq!(steps.get(), STEPS_PER_RUN);
        yield_now().await;
        assert_eq!(steps.get(), 2 * STEPS_PER_RUN);
    });
}

/// The socket is ready before it is watched. A task that runs before the next wait for events cannot know
/// that.
#[test]
fn a_task_deferred_until_the_next_wait_knows_what_its_socket_is_ready_for() {
    for (waits, expected) in [(false, Ready::default()), (true, Ready::READ)] {
        run(async move {
            let (sender, receiver) = oneshot::channel();
            let (socket, mut other) = UnixStream::pair().expect("descriptors");
            other.write_all(&[7]).expect("room");
            // Spawned by a task, then by the main future.
            let (sender_of_task, receiver_of_task) = oneshot::channel();
            let (of_task, mut other) = UnixStream::pair().expect("descriptors");
            other.write_all(&[7]).expect("room");
            spawn(async move { begin(of_task, waits, sender_of_task) });
            assert_eq!(receiver_of_task.await, Ok(expected));
            begin(socket, waits, sender);
            assert_eq!(receiver.await, Ok(expected));
        });
    }
    fn begin(socket: UnixStream, waits: bool, sender: oneshot::Sender<Ready>) {
        socket.set_nonblocking(true).expect("a socket");
        let watched = Watched::new(socket, EventFlags::IN).expect("a reactor");
        spawn(async move { sender.send(watched.ready()).expect("it is waited for") });
        if waits {
            defer_due_tasks_until_next_wait();
        }
    }
}
