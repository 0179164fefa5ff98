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
use super::{shrink_table, with};

#[cfg(test)]
mod tests;

/// Steps of one run, then the sockets are looked at; or as many as were due when it began, if those are more.
const STEPS: usize = 64;

/// Tasks that are due together in a small table.
const DUE_KEPT: usize = 1024;

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
            let is_ours = ptr::eq(reactor.waking, &*self.thread);
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

    fn look_first(&self) {
        self.yielded.borrow_mut().extend(self.due.borrow_mut().drain(..));
    }

    /// Runs the due tasks and those that they wake meanwhile, within [`STEPS`]. A task that wakes itself runs once.
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
            let mut places = self.places.borrow_mut();
            // Woken late, it may have been given up after a peak.
            let Some(place) = places.get_mut(number as usize) else { return };
            place.alarm.is_due.swap(false, AcqRel);
            let Some(task) = place.task.take() else { return };
            (task, mem::replace(&mut place.waker, Waker::noop().clone()))
        };
        self.running.set(Some(number));
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

    /// Gives back what it does not need any more.
    pub(super) fn shrink(&self) {
        shrink_table(&mut self.places.borrow_mut(), &mut self.free.borrow_mut());
        self.due.borrow_mut().shrink_to(DUE_KEPT);
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

    /// Frees the tables, once there are no tasks.
    pub(super) fn release(&self) {
        drop((self.places.take(), self.free.take(), self.due.take(), self.yielded.take()));
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
    with(|reactor| reactor.tasks.spawn(task, &reactor.handles().waking))
        .expect("tasks are spawned on the threads of workers");
}

/// All tasks that are due run only after the next look at the sockets. So a task that was spawned for a new socket knows by then
/// what the socket is ready for.
pub fn look_first() {
    with(|reactor| reactor.tasks.look_first());
}
