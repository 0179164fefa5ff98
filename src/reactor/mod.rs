//! The event loop of a worker thread: tasks wait here for sockets, for points in time and for other threads.
//!
//! - `runtime.rs`: runs the thread's tasks until the main future ends.
//! - `tasks.rs`: the queue of tasks that are due.
//! - `watched.rs`: a socket and its readiness.
//! - `timer.rs`: `sleep` and `timeout_at`.
//! - `thread_waker.rs`: how other threads wake this one.
//! - `shrink.rs`: gives memory back after a peak.
//!
//! One iteration of the loop runs the due tasks, waits in epoll, and then makes other tasks due: those whose
//! sockets have events, whose timers have expired, or that other threads have woken.
//!
//! This reactor replaces tokio's on the worker threads, because tokio is made for any program and a short
//! session pays for that: a thread-safe registration of 384 bytes for each socket, a system call to remove
//! it from epoll (closing the socket does that anyway), a timer wheel whose lock is taken at each wait, and
//! tasks that can be joined, aborted and woken by any thread at any moment. benches/README.md ("What the
//! runtime costs") has the figures. Here only the wakers are thread-safe.
//!
//! The reactor knows nothing of sessions; `data_plane/worker.rs` starts the tasks.

mod runtime;
mod shrink;
mod tasks;
mod thread_waker;
mod timer;
mod watched;

pub use runtime::Runtime;
pub use shrink::{is_mostly_free, shrink, shrink_table};
pub use tasks::{Panicked, defer_due_tasks_until_next_wait, panicked, spawn};
pub use timer::{Elapsed, sleep, sleep_until, timeout_at};
pub use watched::{Ready, Watched};

use std::cell::{Cell, Ref, RefCell};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;
use tokio::time::Instant;

use self::tasks::Tasks;
use self::thread_waker::ThreadWaker;
use self::timer::Timers;
use self::watched::Registrations;

/// The most events that one wait returns. The kernel keeps the others for the next wait.
const EVENTS_PER_WAIT: usize = 256;
/// The token of the thread waker's eventfd. No [`Registrations`] entry has this token, because an index of
/// `u32::MAX` is never reached.
const THREAD_WAKER_TOKEN: EventData = EventData::new_u64(u64::MAX);

thread_local! {
    /// The reactor of this thread.
    ///
    /// A plain reference, because a session reads it some 40 times: a value without a destructor is read in
    /// one instruction. For a value with a destructor the thread-local would first check whether it is still
    /// alive, and an `Rc` in a `RefCell` would also count borrows.
    static CURRENT: Cell<Option<&'static Reactor>> = const { Cell::new(None) };
}

/// The state of one thread's event loop.
#[derive(Debug)]
struct Reactor {
    /// `None` once [`Installed`] was dropped.
    handles: RefCell<Option<Handles>>,
    /// The address of the `ThreadWaker` in `handles`. A task's waker compares it with the address of its own
    /// `ThreadWaker`: if they are equal, the waker is called on the task's thread.
    thread_waker: *const ThreadWaker,
    tasks: Tasks,
    registrations: RefCell<Registrations>,
    timers: RefCell<Timers>,
    /// When the last wait ended.
    waited_at: Cell<Instant>,
    /// The number of waits so far, modulo 256.
    wait_count: Cell<u8>,
    /// Set by [`set_busy`].
    is_busy: Cell<bool>,
    /// False in tests that run beside a tokio runtime: they use tokio's timers, which a test can pause.
    has_timers: bool,
}

/// The descriptors of a reactor, and what other threads share with it.
#[derive(Debug)]
struct Handles {
    epoll: OwnedFd,
    thread_waker: Arc<ThreadWaker>,
}

impl Reactor {
    /// Creates a reactor for this thread. It works until the returned guard is dropped.
    fn install(has_timers: bool) -> io::Result<Installed> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let thread_waker = Arc::new(ThreadWaker::new()?);
        // Edge-triggered: each write to the eventfd is a new event, so the counter is never read.
        epoll::add(&epoll, thread_waker.event(), THREAD_WAKER_TOKEN, EventFlags::IN | EventFlags::ET)?;
        // Leaked: some 400 bytes for each thread that ever had a reactor. Its contents are dropped with the
        // guard.
        let reactor: &'static Self = Box::leak(Box::new(Self {
            thread_waker: Arc::as_ptr(&thread_waker),
            handles: RefCell::new(Some(Handles { epoll, thread_waker })),
            tasks: Tasks::default(),
            registrations: RefCell::default(),
            timers: RefCell::default(),
            waited_at: Cell::new(Instant::now()),
            wait_count: Cell::default(),
            is_busy: Cell::default(),
            has_timers,
        }));
        let before = CURRENT.replace(Some(reactor));
        assert!(before.is_none(), "a thread has one reactor");
        Ok(Installed(reactor))
    }

    fn handles(&self) -> Ref<'_, Handles> {
        Ref::map(self.handles.borrow(), |handles| handles.as_ref().expect("the guard was not dropped"))
    }

    /// Waits for events and wakes the tasks that they concern, then those whose timers have expired.
    ///
    /// It waits until the next timer, or not at all if a task is due or another thread has woken this one.
    /// Returns the number of events; if it is [`EVENTS_PER_WAIT`], there may be more.
    fn wait(&self) -> usize {
        let handles = self.handles();
        let timeout = if self.tasks.are_idle() && handles.thread_waker.announce_sleep() {
            self.until_next_timer()
        } else {
            Some(Duration::ZERO)
        };
        let timeout = timeout.map(|time| Timespec::try_from(time).expect("at most an hour"));
        let mut events = [const { MaybeUninit::<Event>::uninit() }; EVENTS_PER_WAIT];
        let events: &[Event] = match epoll::wait(&handles.epoll, &mut events, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => &[],
            Err(error) => panic!("epoll_wait on a descriptor of our own: {error}"),
        };
        handles.thread_waker.end_sleep();
        drop(handles);
        self.waited_at.set(Instant::now());
        self.wait_count.set(self.wait_count.get().wrapping_add(1));
        let mut registrations = self.registrations.borrow_mut();
        for &Event { data, flags, .. } in events {
            if data != THREAD_WAKER_TOKEN {
                registrations.on_event(data.u64(), flags);
            }
        }
        drop(registrations);
        timer::fire(&self.timers, self.waited_at.get());
        self.tasks.after_wait();
        events.len()
    }

    /// The time from the end of the last wait to the next timer. The clock is read once per iteration, at
    /// the end of the wait. So a timer is late by the time that the tasks have run since then.
    fn until_next_timer(&self) -> Option<Duration> {
        /// The kernel refuses timeouts of more than 24 days.
        const LONGEST_WAIT: Duration = Duration::from_secs(3600);
        let next = self.timers.borrow().next_deadline()?;
        Some(next.saturating_duration_since(self.waited_at.get()).min(LONGEST_WAIT))
    }
}

/// Keeps a reactor installed on its thread. Dropping it drops the reactor's contents.
#[derive(Debug)]
struct Installed(&'static Reactor);

impl Drop for Installed {
    fn drop(&mut self) {
        CURRENT.take();
        let Reactor { handles, tasks, registrations, timers, .. } = self.0;
        tasks.release();
        drop((registrations.take(), timers.take(), handles.take()));
    }
}

/// The number of times that this thread has waited for events, modulo 256.
#[must_use]
pub fn wait_count() -> u8 {
    with(|reactor| reactor.wait_count.get()).unwrap_or_default()
}

/// Records whether this thread is busy: it has accepted 64 connections without EAGAIN. The accept loops call
/// this. If a thread has several accept loops, the last call counts.
pub fn set_busy(is_busy: bool) {
    with(|reactor| reactor.is_busy.set(is_busy));
}

/// The last value of [`set_busy`] on this thread; false without a reactor.
#[must_use]
pub fn is_busy() -> bool {
    with(|reactor| reactor.is_busy.get()).unwrap_or_default()
}

/// Calls `f` with this thread's reactor. `None` if the thread has none, or none any more.
fn with<T>(f: impl FnOnce(&Reactor) -> T) -> Option<T> {
    CURRENT.get().map(f)
}

/// Lets tests run sessions on a tokio runtime, whose clock they can stop. The reactor watches the sockets.
#[cfg(test)]
pub mod beside_tokio {
    use super::*;
    use std::task::Wake as _;
    use tokio::io::unix::AsyncFd;

    /// Lets the tasks of this thread watch sockets until it is dropped.
    #[derive(Debug)]
    pub struct Beside(#[expect(dead_code, reason = "for its drop")] Installed);

    /// Installs a reactor. Must be called in a current-thread runtime.
    #[must_use]
    pub fn install() -> Beside {
        let installed = Reactor::install(false).expect("descriptors");
        let epoll = installed.0.handles().epoll.try_clone().expect("a descriptor");
        tokio::spawn(async move {
            #[expect(deprecated, reason = "the new form is unsafe for types whose descriptor may change")]
            let epoll = AsyncFd::new(epoll).expect("a runtime");
            while let Ok(mut ready) = epoll.readable().await {
                ready.clear_ready();
                let all = || {
                    with(|reactor| {
                        // Tokio's runtime has waited already, so this wait must return at once.
                        reactor.handles().thread_waker.wake_by_ref();
                        reactor.wait()
                    })
                };
                while all() == Some(EVENTS_PER_WAIT) {}
            }
        });
        Beside(installed)
    }
}
