//! The tasks of a worker thread: run in the order in which they were woken, each once however often it was.
//!
//! One that wakes itself comes after the next look at the sockets, so that whoever yields lets them be looked at. What serves a
//! task for the next one, too, is kept: its place, and the waker that sockets and timers hold. So a task costs one allocation, of
//! its own size. A waker that outlives its task wakes the next one in its place for nothing, which a future has to bear from
//! anybody.
//!
//! Tasks are not joined, aborted or given a result: who wants to know of an end has a channel. Next: `runtime.rs` says when they
//! run, `waking.rs` how other threads reach them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel};
use std::task::{Context, Poll, Wake, Waker};

use super::waking::Waking;
use super::with;

/// Steps of one run, then the sockets are looked at; or as many as were due when it began, if those are more.
const STEPS: usize = 64;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Those of one thread.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    places: RefCell<Vec<Place>>,
    free: RefCell<Vec<u32>>,
    due: RefCell<VecDeque<u32>>,
    /// The one that runs.
    running: Cell<Option<u32>>,
    /// Those that are due once the sockets were looked at: they have woken themselves, or [`look_first`] has put them here.
    yielded: RefCell<Vec<u32>>,
    /// How many tasks were due at the begin of the current step.
    due_before: Cell<usize>,
}

/// One task's, or none's. There is one for each idle session, so its size counts.
struct Place {
    /// `None` too while it runs.
    task: Option<Task>,
    /// Of nobody while it runs, which then has it.
    waker: Waker,
    alarm: Arc<Alarm>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("alarm", &self.alarm).finish_non_exhaustive()
    }
}

/// What its waker knows of a place.
#[derive(Debug)]
struct Alarm {
    place: u32,
    /// It was woken, and has not run since.
    is_due: AtomicBool,
    thread: Arc<Waking>,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_due.swap(true, AcqRel) {
            return;
        }
        let is_ours = with(|reactor| {
            let is_ours = ptr::eq(&*reactor.waking, &*self.thread);
            if is_ours {
                reactor.tasks.woke(self.place);
            }
            is_ours
        });
        if is_ours != Some(true) {
            self.thread.wake_task(self.place);
        }
    }
}

impl Tasks {
    fn spawn(&self, task: Task, thread: &Arc<Waking>) {
        let place = self.free.borrow_mut().pop();
        let mut places = self.places.borrow_mut();
        let place = place.unwrap_or_else(|| {
            let place = u32::try_from(places.len()).expect("tasks are fewer");
            let alarm = Arc::new(Alarm { place, is_due: false.into(), thread: Arc::clone(thread) });
            places.push(Place { task: None, waker: Arc::clone(&alarm).into(), alarm });
            place
        });
        let new = &mut places[place as usize];
        new.task = Some(task);
        // One who still had the waker may have woken it already.
        if !new.alarm.is_due.swap(true, AcqRel) {
            self.due.borrow_mut().push_back(place);
        }
    }

    fn woke(&self, place: u32) {
        if self.running.get() == Some(place) {
            self.yielded.borrow_mut().push(place);
        } else {
            self.due.borrow_mut().push_back(place);
        }
    }

    /// Other threads have woken them.
    pub(super) fn woken(&self, places: impl IntoIterator<Item = u32>) {
        self.due.borrow_mut().extend(places);
    }

    /// None is due.
    pub(super) fn are_idle(&self) -> bool {
        self.due.borrow().is_empty() && self.yielded.borrow().is_empty()
    }

    /// The sockets were looked at.
    pub(super) fn looked(&self) {
        let mut yielded = self.yielded.borrow_mut();
        if !yielded.is_empty() {
            self.due.borrow_mut().extend(yielded.drain(..));
        }
    }

    /// Notes where the tasks begin that this step makes due.
    pub(super) fn begin_step(&self) {
        self.due_before.set(self.due.borrow().len());
    }

    fn look_first(&self) {
        let mut due = self.due.borrow_mut();
        let before = self.due_before.get().min(due.len());
        self.yielded.borrow_mut().extend(due.drain(before..));
    }

    /// Runs those that are due, and whom they wake meanwhile, within [`STEPS`]; each that wakes itself once.
    pub(super) fn run(&self) {
        let mut steps = self.due.borrow().len().max(STEPS);
        while steps > 0
            && let Some(place) = self.next()
        {
            self.step(place);
            steps -= 1;
        }
    }

    fn next(&self) -> Option<u32> {
        self.due.borrow_mut().pop_front()
    }

    fn step(&self, number: u32) {
        let (mut task, waker) = {
            let place = &mut self.places.borrow_mut()[number as usize];
            place.alarm.is_due.swap(false, AcqRel);
            let Some(task) = place.task.take() else { return };
            (task, mem::replace(&mut place.waker, Waker::noop().clone()))
        };
        self.running.set(Some(number));
        self.begin_step();
        // A task that panics, of which the thread's hook has told, is over; the others are not.
        let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(&waker))));
        self.running.set(None);
        let is_over = !matches!(polled, Ok(Poll::Pending));
        let left = if is_over {
            end(task);
            self.free.borrow_mut().push(number);
            None
        } else {
            Some(task)
        };
        let place = &mut self.places.borrow_mut()[number as usize];
        (place.task, place.waker) = (left, waker);
    }

    /// Drops all that have not ended, which may wake and spawn others.
    pub(super) fn clear(&self) {
        self.free.take();
        while let Some(place) = self.pop() {
            if let Some(task) = place.task {
                end(task);
            }
        }
    }

    fn pop(&self) -> Option<Place> {
        self.places.borrow_mut().pop()
    }
}

/// A drop that panics is the task's own affair, too.
fn end(task: Task) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(task)));
}

/// Lets this thread run `task` beside what it runs already, until it ends.
///
/// # Panics
/// On a thread without a [`Runtime`](super::Runtime).
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    // Outside of the reactor: what is large is not moved about there.
    let task = Box::pin(task);
    with(|reactor| reactor.tasks.spawn(task, &reactor.waking))
        .expect("tasks are spawned on the threads of workers");
}

/// Tasks that the caller has spawned or woken in this step run only after the next look at the sockets. So a task that was spawned
/// for a new socket knows by then what the socket is ready for.
pub fn look_first() {
    with(|reactor| reactor.tasks.look_first());
}

#[cfg(test)]
mod tests {
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
    fn places() -> usize {
        with(|reactor| reactor.tasks.places.borrow().len()).expect("a reactor")
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

    /// Places are as many as there were tasks at once, and whoever still has the waker of one that is over does no harm.
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
            assert_eq!(places(), 1);
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

    /// Whom a task wakes, or spawns, while it is dropped with the thread's last.
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
                look_first();
            }
        }
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
            assert_eq!(steps.get(), STEPS);
            yield_now().await;
            assert_eq!(steps.get(), 2 * STEPS);
        });
    }
}
