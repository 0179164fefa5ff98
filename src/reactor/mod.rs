//! What the tasks of a worker thread wait on: sockets, points in time, and other threads.
//!
//! - `watched.rs`: a socket, and what it is ready for.
//! - `tasks.rs`: the tasks.
//! - `timer.rs`: `sleep` and `timeout_at`.
//! - `thread_waker.rs`: how other threads wake this one.
//! - `shrink.rs`: gives memory back after a peak.
//! - `runtime.rs`: runs the thread's tasks until the first of them ends.
//!
//! Tokio's own drivers and tasks do the same for any program, and that is what a short session pays for: a thread-safe
//! registration of 384 bytes for each socket, a system call to take it out of epoll again (the kernel does so at the close), a
//! timer wheel with a lock that is asked at each wait, and tasks that may be joined, aborted and woken by anybody in the middle
//! of a step, of which many run between two looks at the sockets. benches/README.md ("What the runtime costs") has the figures.
//! Nothing here is thread-safe but `thread_waker.rs`, and nothing knows what the tasks do.

mod runtime;
mod shrink;
mod tasks;
mod thread_waker;
mod timer;
mod watched;

pub use runtime::Runtime;
pub use shrink::{is_mostly_free, shrink, shrink_table};
pub use tasks::{defer_due_tasks_until_next_wait, spawn};
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

/// Events of one wait. Those that are left over come with the next.
const EVENTS_PER_WAIT: usize = 256;
/// Of `ThreadWaker`'s descriptor, which has no place.
const THREAD_WAKER_TOKEN: EventData = EventData::new_u64(u64::MAX);

thread_local! {
    /// A reference that needs no drop: reading it is one instruction, where a thread-local value with a destructor is checked for
    /// whether it still lives, and an `Rc` in a `RefCell` counts its borrows. A session reads it some 40 times.
    static CURRENT: Cell<Option<&'static Reactor>> = const { Cell::new(None) };
}

/// What one thread's tasks wait on.
#[derive(Debug)]
struct Reactor {
    /// `None` once the thread has no reactor any more.
    handles: RefCell<Option<Handles>>,
    /// The address of the `ThreadWaker` among the handles, which tells a wake-up of this thread from one of another.
    thread_waker: *const ThreadWaker,
    tasks: Tasks,
    registrations: RefCell<Registrations>,
    timers: RefCell<Timers>,
    /// When it last waited.
    waited_at: Cell<Instant>,
    /// How often it has waited, modulo 256.
    wait_count: Cell<u8>,
    /// As [`set_busy`] says.
    is_busy: Cell<bool>,
    /// False where tokio's clock runs, which tests can stop.
    has_timers: bool,
}

/// The descriptors of a reactor.
#[derive(Debug)]
struct Handles {
    epoll: OwnedFd,
    thread_waker: Arc<ThreadWaker>,
}

impl Reactor {
    /// Makes a reactor this thread's, until the guard is dropped.
    fn install(has_timers: bool) -> io::Result<Installed> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let thread_waker = Arc::new(ThreadWaker::new()?);
        // Edge-triggered, each write is an event of its own, and nobody has to read.
        epoll::add(&epoll, thread_waker.event(), THREAD_WAKER_TOKEN, EventFlags::IN | EventFlags::ET)?;
        // Leaked: some 400 bytes for each thread that ever had a reactor. What it holds is dropped with the guard.
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
        Ref::map(self.handles.borrow(), |handles| handles.as_ref().expect("they go with the guard"))
    }

    /// Waits for events, at most until the next timer, and not at all if a task is due; then wakes whom they
    /// concern. Returns how many there were; with [`EVENTS_PER_WAIT`] of them there may be more.
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

    /// Counted from the end of the last wait, not from now: one look at the clock a turn is enough. The tasks that have run since
    /// make a timer late by as much as they took.
    fn until_next_timer(&self) -> Option<Duration> {
        /// The kernel takes no wait of more than 24 days.
        const LONGEST_WAIT: Duration = Duration::from_secs(3600);
        let next = self.timers.borrow().next_deadline()?;
        Some(next.saturating_duration_since(self.waited_at.get()).min(LONGEST_WAIT))
    }
}

/// Keeps a reactor installed on its thread, and releases what it holds when dropped.
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

/// How often this thread has looked for events, modulo 256.
#[must_use]
pub fn wait_count() -> u8 {
    with(|reactor| reactor.wait_count.get()).unwrap_or_default()
}

/// This thread cannot keep up with what comes, or can again: as who accepts says, and of several the last.
pub fn set_busy(is_busy: bool) {
    with(|reactor| reactor.is_busy.set(is_busy));
}

/// What [`set_busy`] was last told.
#[must_use]
pub fn is_busy() -> bool {
    with(|reactor| reactor.is_busy.get()).unwrap_or_default()
}

/// `None` on a thread without, and while one ends.
fn with<T>(f: impl FnOnce(&Reactor) -> T) -> Option<T> {
    CURRENT.get().map(f)
}

/// For tests of what runs on a worker: its sockets, on a runtime of tokio's whose clock can be stopped.
#[cfg(test)]
pub mod beside_tokio {
    use super::*;
    use std::task::Wake as _;
    use tokio::io::unix::AsyncFd;

    /// Until it is dropped, tasks of this thread may watch sockets.
    #[derive(Debug)]
    pub struct Beside(#[expect(dead_code, reason = "for its drop")] Installed);

    /// Must be called in a runtime of one thread.
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
                        // Tokio's runtime has waited already.
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
