//! What the tasks of a thread promise one another.

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

/// How many places the tasks of this thread have taken up.
fn entries() -> usize {
    with(|reactor| reactor.tasks.entries.borrow().len()).expect("a reactor")
}

#[test]
fn tasks_run_in_the_order_in_which_they_were_woken() {
    run(async {
        let order = Rc::new(RefCell::new(Vec::new()));
        let (tells, told): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel()).unzip();
        for (number, told) in told.into_iter().enumerate() {
            let order = Rc::clone(&order);
            spawn(async move {
                order.borrow_mut().push(number);
                told.await.expect("it is told");
                order.borrow_mut().push(number);
            });
        }
        yield_now().await;
        for tell in tells.into_iter().rev() {
            tell.send(()).expect("it waits");
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

/// There are as many places as there were tasks at once, and a stale waker does no harm.
#[test]
fn a_place_serves_one_task_after_the_other() {
    run(async {
        let late = Rc::new(RefCell::new(Vec::<Waker>::new()));
        for _ in 0..100 {
            let (tell, told) = oneshot::channel();
            let kept = Rc::clone(&late);
            spawn(async move {
                let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
                kept.borrow_mut().push(waker);
                yield_now().await;
                kept.borrow().iter().for_each(Waker::wake_by_ref);
                tell.send(()).expect("it is waited for");
            });
            told.await.expect("it ends");
            late.borrow().iter().for_each(Waker::wake_by_ref);
            yield_now().await;
        }
        assert_eq!(entries(), 1);
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
        let before = entries();
        with(|reactor| reactor.tasks.shrink());
        let capacities = with(|reactor| {
            let tasks = &reactor.tasks;
            [tasks.entries.borrow().capacity(), tasks.free.borrow().capacity(), tasks.due.borrow().capacity()]
        });
        let after = capacities.expect("a reactor");
        assert!(before >= PEAK && after.iter().all(|capacity| *capacity <= 2048), "{before}, {after:?}");
        late.borrow().iter().for_each(Waker::wake_by_ref);
        let (tell, told) = oneshot::channel();
        spawn(async move { tell.send(7).expect("it is waited for") });
        assert_eq!(told.await, Ok(7));
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
        let (tell, told) = oneshot::channel::<()>();
        spawn(async move {
            let _tell = tell;
            panic!("a defect");
        });
        let (tell, dropped) = oneshot::channel::<()>();
        let held = (PanicsToo, tell);
        spawn(poll_fn(move |_| {
            let _ = &held;
            Poll::Ready(())
        }));
        let (tell, other) = oneshot::channel();
        spawn(async move {
            yield_now().await;
            tell.send(7).expect("it is waited for");
        });
        assert!(told.await.is_err());
        assert!(dropped.await.is_err());
        assert_eq!(other.await, Ok(7));
    });
}

/// Tasks that are woken or spawned while the last tasks of the thread are dropped.
#[test]
fn the_last_tasks_may_wake_and_spawn() {
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
        let (tell, told) = oneshot::channel();
        let both = [Rc::clone(&ended), Rc::clone(&ended)];
        let last = Last(Some(tell), Rc::clone(&has_spawned));
        let [first, second] = both;
        spawn(async move {
            let _held = first;
            let _ = told.await;
            unreachable!("nothing runs any more");
        });
        spawn(async move {
            let _held = (second, last);
            pending::<()>().await;
        });
        // Its place is the last one, free, and gone before the others.
        spawn(async {});
        yield_now().await;
    });
    assert!(has_spawned.get());
    assert_eq!(Rc::strong_count(&ended), 1);
}

/// One that always wants to run lets the sockets be looked at, and what came from them run.
#[test]
fn a_task_that_wakes_itself_runs_once_a_turn() {
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
fn tasks_that_wake_each_other_let_the_sockets_be_looked_at() {
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

/// The socket is ready before it is watched. A task that runs before the next look cannot know that.
#[test]
fn a_task_that_comes_after_the_look_knows_what_its_socket_is_ready_for() {
    for (waits, expected) in [(false, Ready::default()), (true, Ready::READ)] {
        run(async move {
            let (tell, told) = oneshot::channel();
            let (socket, mut other) = UnixStream::pair().expect("descriptors");
            other.write_all(&[7]).expect("room");
            // Spawned by a task, then by the future that the thread is blocked on.
            let (tell_of_task, told_by_task) = oneshot::channel();
            let (of_task, mut other) = UnixStream::pair().expect("descriptors");
            other.write_all(&[7]).expect("room");
            spawn(async move { begin(of_task, waits, tell_of_task) });
            assert_eq!(told_by_task.await, Ok(expected));
            begin(socket, waits, tell);
            assert_eq!(told.await, Ok(expected));
        });
    }
    fn begin(socket: UnixStream, waits: bool, tell: oneshot::Sender<Ready>) {
        socket.set_nonblocking(true).expect("a socket");
        let watched = Watched::new(socket, EventFlags::IN).expect("a reactor");
        spawn(async move { tell.send(watched.ready()).expect("it is waited for") });
        if waits {
            defer_due_tasks_until_next_wait();
        }
    }
}
