//! Wakes a thread that waits for events, from any other.
//!
//! While the thread runs, a wake-up is a store; only one that comes while it sleeps, or is just about to, costs a system call.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};

/// One thread's, known to whoever may wake it.
#[derive(Debug)]
pub(super) struct ThreadWaker {
    event: OwnedFd,
    was_woken: AtomicBool,
    is_asleep: AtomicBool,
    /// Each once at most, until the thread has taken it.
    tasks: Mutex<Vec<u32>>,
}

impl ThreadWaker {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            was_woken: AtomicBool::new(false),
            is_asleep: AtomicBool::new(false),
            tasks: Mutex::default(),
        })
    }

    /// Readable once it was written to.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// What was woken before runs now: these tasks, and maybe what is no task.
    pub(super) fn take_woken_tasks(&self) -> Vec<u32> {
        if self.was_woken.swap(false, SeqCst) { mem::take(&mut *self.tasks()) } else { Vec::new() }
    }

    /// To be called by other threads.
    pub(super) fn wake_task(self: &Arc<Self>, index: u32) {
        self.tasks().push(index);
        self.wake_by_ref();
    }

    /// A thread that panicked with the lock has only pushed, or not.
    fn tasks(&self) -> MutexGuard<'_, Vec<u32>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if something was woken since [`ThreadWaker::take_woken_tasks`]. From here until [`ThreadWaker::end_sleep`] the first who wakes writes to the
    /// descriptor: either he sees `asleep`, or this sees `woken`.
    pub(super) fn announce_sleep(&self) -> bool {
        self.is_asleep.store(true, SeqCst);
        !self.was_woken.load(SeqCst)
    }

    pub(super) fn end_sleep(&self) {
        self.is_asleep.store(false, SeqCst);
    }
}

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.was_woken.store(true, SeqCst);
        if self.is_asleep.swap(false, SeqCst) {
            // It can only fail where 2⁶⁴ are unread, and then the thread was woken.
            let _ = rustix::io::write(self.event.as_fd(), &1u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    /// Two threads at full speed, so that many wake-ups fall between the last look and the sleep.
    #[test]
    fn no_wake_up_is_lost_on_the_way_to_sleep() {
        const WAKE_UPS: u32 = 300_000;
        let thread_waker = Arc::new(ThreadWaker::new().expect("a descriptor"));
        let (told, seen) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let other = {
            let (thread_waker, told, seen) =
                (Arc::clone(&thread_waker), Arc::clone(&told), Arc::clone(&seen));
            thread::spawn(move || {
                for number in 1..=WAKE_UPS {
                    while seen.load(SeqCst) < number - 1 {
                        std::hint::spin_loop();
                    }
                    told.store(number, SeqCst);
                    thread_waker.wake_by_ref();
                }
            })
        };
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        while seen.load(SeqCst) < WAKE_UPS {
            thread_waker.take_woken_tasks();
            let number = told.load(SeqCst);
            if number > seen.load(SeqCst) {
                seen.store(number, SeqCst);
                continue;
            }
            if thread_waker.announce_sleep() {
                let woken = poll(&mut [PollFd::new(&thread_waker.event, PollFlags::IN)], Some(&limit));
                assert_eq!(woken, Ok(1), "it sleeps on after {number} wake-ups");
                rustix::io::read(&thread_waker.event, &mut [0; 8]).expect("it was written");
            }
            thread_waker.end_sleep();
        }
        other.join().expect("it ends");
    }
}
