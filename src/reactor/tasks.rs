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

use super::thread_waker::ThreadWaker;
use super::{shrink_table, with};

#[cfg(test)]
mod tests;

/// Steps of one run, then the sockets are looked at; or as many as were due when it began, if those are more.
const STEPS_PER_RUN: usize = 64;

/// Tasks that are due together in a small table.
const DUE_CAPACITY_KEPT: usize = 1024;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Those of one thread.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    entries: RefCell<Vec<TaskEntry>>,
    free: RefCell<Vec<u32>>,
    due: RefCell<VecDeque<u32>>,
    /// The one that runs.
    running: Cell<Option<u32>>,
    /// Those that are due once the sockets were looked at: they have woken themselves, or [`defer_due_tasks_until_next_wait`] has put them here.
    yielded: RefCell<Vec<u32>>,
}

/// One task's, or none's. There is one for each idle session, so its size counts.
struct TaskEntry {
    /// `None` too while it runs.
    task: Option<Task>,
    /// Of nobody while it runs, which then has it.
    waker: Waker,
    task_waker: Arc<TaskWaker>,
}

impl fmt::Debug for TaskEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskEntry").field("task_waker", &self.task_waker).finish_non_exhaustive()
    }
}

/// What its waker knows of a place.
#[derive(Debug)]
struct TaskWaker {
    index: u32,
    /// It was woken, and has not run since.
    is_due: AtomicBool,
    thread: Arc<ThreadWaker>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_due.swap(true, AcqRel) {
            return;
        }
        let is_ours = with(|reactor| {
            let is_ours = ptr::eq(reactor.thread_waker, &*self.thread);
            if is_ours {
                reactor.tasks.schedule(self.index);
            }
            is_ours
        });
        if is_ours != Some(true) {
            self.thread.wake_task(self.index);
        }
    }
}

impl Tasks {
    fn spawn(&self, task: Task, thread: &Arc<ThreadWaker>) {
        let index = self.free.borrow_mut().pop();
        let mut entries = self.entries.borrow_mut();
        let index = index.unwrap_or_else(|| {
            let index = u32::try_from(entries.len()).expect("tasks are fewer");
            let task_waker = Arc::new(TaskWaker { index, is_due: false.into(), thread: Arc::clone(thread) });
            entries.push(TaskEntry { task: None, waker: Arc::clone(&task_waker).into(), task_waker });
            index
        });
        let new = &mut entries[index as usize];
        new.task = Some(task);
        // One who still had the waker may have woken it already.
        if !new.task_waker.is_due.swap(true, AcqRel) {
            self.due.borrow_mut().push_back(index);
        }
    }

    fn schedule(&self, index: u32) {
        if self.running.get() == Some(index) {
            self.yielded.borrow_mut().push(index);
        } else {
            self.due.borrow_mut().push_back(index);
        }
    }

    /// Other threads have woken them.
    pub(super) fn schedule_all(&self, indices: impl IntoIterator<Item = u32>) {
        self.due.borrow_mut().extend(indices);
    }

    /// None is due.
    pub(super) fn are_idle(&self) -> bool {
        self.due.borrow().is_empty() && self.yielded.borrow().is_empty()
    }

    /// The sockets were looked at.
    pub(super) fn after_wait(&self) {
        let mut yielded = self.yielded.borrow_mut();
        if !yielded.is_empty() {
            self.due.borrow_mut().extend(yielded.drain(..));
        }
    }

    fn defer_due_tasks_until_next_wait(&self) {
        self.yielded.borrow_mut().extend(self.due.borrow_mut().drain(..));
    }

    /// Runs the due tasks and those that they wake meanwhile, within [`STEPS_PER_RUN`]. A task that wakes itself runs once.
    pub(super) fn run(&self) {
        let mut steps = self.due.borrow().len().max(STEPS_PER_RUN);
        while steps > 0
            && let Some(index) = self.next()
        {
            self.step(index);
            steps -= 1;
        }
    }

    fn next(&self) -> Option<u32> {
        self.due.borrow_mut().pop_front()
    }

    fn step(&self, index: u32) {
        let (mut task, waker) = {
            let mut entries = self.entries.borrow_mut();
            // Woken late, it may have been given up after a peak.
            let Some(entry) = entries.get_mut(index as usize) else { return };
            entry.task_waker.is_due.swap(false, AcqRel);
            let Some(task) = entry.task.take() else { return };
            (task, mem::replace(&mut entry.waker, Waker::noop().clone()))
        };
        self.running.set(Some(index));
        // A task that panics, of which the thread's hook has told, is over; the others are not.
        let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(&waker))));
        self.running.set(None);
        let is_over = !matches!(polled, Ok(Poll::Pending));
        let left = if is_over {
            drop_task(task);
            self.free.borrow_mut().push(index);
            None
        } else {
            Some(task)
        };
        let entry = &mut self.entries.borrow_mut()[index as usize];
        (entry.task, entry.waker) = (left, waker);
    }

    /// Gives back what it does not need any more.
    pub(super) fn shrink(&self) {
        shrink_table(&mut self.entries.borrow_mut(), &mut self.free.borrow_mut());
        self.due.borrow_mut().shrink_to(DUE_CAPACITY_KEPT);
    }

    /// Drops all that have not ended, which may wake and spawn others.
    pub(super) fn clear(&self) {
        self.free.take();
        while let Some(entry) = self.pop_entry() {
            if let Some(task) = entry.task {
                drop_task(task);
            }
        }
    }

    /// Frees the tables, once there are no tasks.
    pub(super) fn release(&self) {
        drop((self.entries.take(), self.free.take(), self.due.take(), self.yielded.take()));
    }

    fn pop_entry(&self) -> Option<TaskEntry> {
        self.entries.borrow_mut().pop()
    }
}

/// A drop that panics is the task's own affair, too.
fn drop_task(task: Task) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(task)));
}

/// Lets this thread run `task` beside what it runs already, until it ends.
///
/// # Panics
/// On a thread without a [`Runtime`](super::Runtime).
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    // Outside of the reactor: what is large is not moved about there.
    let task = Box::pin(task);
    with(|reactor| reactor.tasks.spawn(task, &reactor.handles().thread_waker))
        .expect("tasks are spawned on the threads of workers");
}

/// All tasks that are due run only after the next look at the sockets. So a task that was spawned for a new socket knows by then
/// what the socket is ready for.
pub fn defer_due_tasks_until_next_wait() {
    with(|reactor| reactor.tasks.defer_due_tasks_until_next_wait());
}
