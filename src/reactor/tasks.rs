//! The tasks of a worker thread. They run in the order in which they were woken; a task that is woken
//! several times before it runs is polled once.
//!
//! A task that wakes itself runs again only after the next wait for events, so a task that yields lets the
//! reactor look at the sockets.
//!
//! A new task reuses a free entry of the table and its waker, so spawning a task costs one allocation, the
//! task itself. A socket or timer may still hold the waker of a task that has ended. Waking it causes one
//! needless poll of the entry's next task, which every future must tolerate anyway.
//!
//! Tasks cannot be joined or aborted and return nothing. A task reports its end through a channel, if
//! another task needs to know. Next: `runtime.rs` says when tasks run, `thread_waker.rs` how other threads
//! wake them.

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
use std::thread;

use super::thread_waker::ThreadWaker;
use super::{shrink_table, with};

#[cfg(test)]
mod tests;

/// Polls in one run before the next wait for events. A run that begins with more due tasks polls each of
/// those once.
const STEPS_PER_RUN: usize = 64;

/// The capacity of the queue of due tasks that is kept after a peak.
const DUE_CAPACITY_KEPT: usize = 1024;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// All tasks of one thread.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    entries: RefCell<Vec<TaskEntry>>,
    free: RefCell<Vec<u32>>,
    due: RefCell<VecDeque<u32>>,
    /// The task that is being polled.
    running: Cell<Option<u32>>,
    /// Tasks that become due after the next wait: they woke themselves, or
    /// [`defer_due_tasks_until_next_wait`] moved them here.
    yielded: RefCell<Vec<u32>>,
    /// A task that has panicked is being dropped.
    drops_panicked: Cell<bool>,
}

/// What panicked, so that a future is dropped before it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Panicked {
    /// The task of that future. All others go on.
    Task,
    /// Something else on this thread, which ends.
    Thread,
}

/// The entry of one task, or a free entry. Each idle session has one, so its size matters.
struct TaskEntry {
    /// `None` if the entry is free, and while the task is being polled.
    task: Option<Task>,
    /// The waker of `task_waker`. A no-op waker while the task is being polled, because the poll has taken
    /// this one.
    waker: Waker,
    task_waker: Arc<TaskWaker>,
}

impl fmt::Debug for TaskEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskEntry").field("task_waker", &self.task_waker).finish_non_exhaustive()
    }
}

/// The target of a task's waker. It belongs to the entry, not to the task, and is used by all tasks that the
/// entry ever has.
#[derive(Debug)]
struct TaskWaker {
    index: u32,
    /// The task was woken and has not been polled since.
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
            let index = u32::try_from(entries.len()).expect("fewer than 2^32 tasks");
            let task_waker = Arc::new(TaskWaker { index, is_due: false.into(), thread: Arc::clone(thread) });
            entries.push(TaskEntry { task: None, waker: Arc::clone(&task_waker).into(), task_waker });
            index
        });
        let new = &mut entries[index as usize];
        new.task = Some(task);
        // A stale waker may have woken the entry already; then its index is queued.
        if !new.task_waker.is_due.swap(true, AcqRel) {
            self.due.borrow_mut().push_back(index);
        }
    }

    /// Queues a task that this thread has woken. A task that wakes itself becomes due after the next wait.
    fn schedule(&self, index: u32) {
        if self.running.get() == Some(index) {
            self.yielded.borrow_mut().push(index);
        } else {
            self.due.borrow_mut().push_back(index);
        }
    }

    /// Queues tasks that other threads have woken.
    pub(super) fn schedule_all(&self, indices: impl IntoIterator<Item = u32>) {
        self.due.borrow_mut().extend(indices);
    }

    /// True if no task is due.
    pub(super) fn are_idle(&self) -> bool {
        self.due.borrow().is_empty() && self.yielded.borrow().is_empty()
    }

    /// Makes the yielded tasks due. Called after each wait for events.
    pub(super) fn after_wait(&self) {
        let mut yielded = self.yielded.borrow_mut();
        if !yielded.is_empty() {
            self.due.borrow_mut().extend(yielded.drain(..));
        }
    }

    fn defer_due_tasks_until_next_wait(&self) {
        self.yielded.borrow_mut().extend(self.due.borrow_mut().drain(..));
    }

    /// Polls the due tasks and the tasks that they wake: in all at most [`STEPS_PER_RUN`], or as many as
    /// were due at the start if these are more. A task that wakes itself is polled once.
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
            // A stale waker may have woken an entry that `shrink` has removed since.
            let Some(entry) = entries.get_mut(index as usize) else { return };
            entry.task_waker.is_due.swap(false, AcqRel);
            let Some(task) = entry.task.take() else { return };
            (task, mem::replace(&mut entry.waker, Waker::noop().clone()))
        };
        self.running.set(Some(index));
        // A panic ends this task alone; the panic hook has logged it.
        let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(&waker))));
        self.running.set(None);
        let is_over = !matches!(polled, Ok(Poll::Pending));
        let left = if is_over {
            self.drops_panicked.set(polled.is_err());
            drop_task(task);
            self.drops_panicked.set(false);
            self.free.borrow_mut().push(index);
            None
        } else {
            Some(task)
        };
        let entry = &mut self.entries.borrow_mut()[index as usize];
        (entry.task, entry.waker) = (left, waker);
    }

    fn panicked(&self) -> Option<Panicked> {
        // A task's values are dropped while its poll unwinds, or with the rest of the task after that.
        if self.drops_panicked.get() || thread::panicking() && self.running.get().is_some() {
            Some(Panicked::Task)
        } else {
            thread::panicking().then_some(Panicked::Thread)
        }
    }

    /// Gives memory back after a peak.
    pub(super) fn shrink(&self) {
        shrink_table(&mut self.entries.borrow_mut(), &mut self.free.borrow_mut());
        self.due.borrow_mut().shrink_to(DUE_CAPACITY_KEPT);
    }

    /// Drops all tasks. Their drops may wake and spawn others, which are dropped, too.
    pub(super) fn clear(&self) {
        self.free.take();
        while let Some(entry) = self.pop_entry() {
            if let Some(task) = entry.task {
                drop_task(task);
            }
        }
    }

    /// Frees the tables. There are no tasks any more.
    pub(super) fn release(&self) {
        drop((self.entries.take(), self.free.take(), self.due.take(), self.yielded.take()));
    }

    fn pop_entry(&self) -> Option<TaskEntry> {
        self.entries.borrow_mut().pop()
    }
}

/// Drops a task. A panic in its drop is caught, like one in its poll.
fn drop_task(task: Task) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(task)));
}

/// Runs `task` on this thread, beside its other tasks, until it ends.
///
/// # Panics
/// On a thread without a [`Runtime`](super::Runtime).
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    // Boxed here and not in `Tasks`, so that a large task is moved once only.
    let task = Box::pin(task);
    with(|reactor| reactor.tasks.spawn(task, &reactor.handles().thread_waker))
        .expect("tasks are spawned on the threads of workers");
}

/// For a drop on a worker thread: whether it is the consequence of a panic.
#[must_use]
pub fn panicked() -> Option<Panicked> {
    with(|reactor| reactor.tasks.panicked()).flatten()
}

/// Lets all tasks that are due now run only after the next wait for events. So a task that was just spawned
/// for a new socket knows, when it runs, what the socket is ready for.
pub fn defer_due_tasks_until_next_wait() {
    with(|reactor| reactor.tasks.defer_due_tasks_until_next_wait());
}
