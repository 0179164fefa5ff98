//! Wakes the reactor's thread from other threads.
//!
//! While the thread runs, a wake-up from another thread costs two atomic operations and, for a task, a push
//! under an uncontended lock. Only a wake-up while the thread sleeps, or is about to sleep, costs a system
//! call: a write to an eventfd that epoll watches.
//!
//! The race: a wake-up may come between the thread's last look at `was_woken` and its `epoll_wait`. So each
//! side writes its own flag before it reads the other's. The thread sets `is_asleep`, then reads
//! `was_woken`; a waking thread sets `was_woken`, then reads `is_asleep`. With sequentially consistent
//! operations at least one of them sees the other's flag: either the thread does not sleep, or the eventfd
//! is written and ends the sleep at once.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};

/// Wakes one thread. The wakers of its tasks share it.
#[derive(Debug)]
pub(super) struct ThreadWaker {
    event: OwnedFd,
    was_woken: AtomicBool,
    is_asleep: AtomicBool,
    /// The tasks that other threads have woken since the thread last took them. No task is in it twice.
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

    /// The eventfd, which becomes readable when it is written to.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Takes the tasks that other threads have woken. The main future's wake-up sets `was_woken` without a
    /// task.
    pub(super) fn take_woken_tasks(&self) -> Vec<u32> {
        if self.was_woken.swap(false, SeqCst) { mem::take(&mut *self.tasks()) } else { Vec::new() }
    }

    /// Wakes a task of this waker's thread from another thread.
    pub(super) fn wake_task(self: &Arc<Self>, index: u32) {
        self.tasks().push(index);
        self.wake_by_ref();
    }

    /// Locks the list. A panic with the lock held cannot leave the vector half changed, so a poisoned lock
    /// is used like any other.
    fn tasks(&self) -> MutexGuard<'_, Vec<u32>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces that the thread is about to sleep. Returns false if it must not: something was woken since
    /// [`ThreadWaker::take_woken_tasks`]. From here until [`ThreadWaker::end_sleep`], the first wake-up
    /// writes to the eventfd.
    pub(super) fn announce_sleep(&self) -> bool {
        self.is_asleep.store(true, SeqCst);
        !self.was_woken.load(SeqCst)
    }

    /// Ends the announcement, so that wake-ups need no system call any more.
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
            // The write cannot fail: the counter would have to be full, after 2^64 wake-ups.
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

    /// Both threads run at full speed, so that many wake-ups fall between the announcement and the sleep.
    #[test]
    fn no_wake_up_is_lost_while_the_thread_goes_to_sleep() {
        const WAKE_UPS: u32 = 300_000;
        let thread_waker = Arc::new(ThreadWaker::new().expect("a descriptor"));
        let (sent, seen) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let other = {
            let (thread_waker, sent, seen) =
                (Arc::clone(&thread_waker), Arc::clone(&sent), Arc::clone(&seen));
            thread::spawn(move || {
                for number in 1..=WAKE_UPS {
                    while seen.load(SeqCst) < number - 1 {
                        std::hint::spin_loop();
                    }
                    sent.store(number, SeqCst);
                    thread_waker.wake_by_ref();
                }
            })
        };
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        while seen.load(SeqCst) < WAKE_UPS {
            thread_waker.take_woken_tasks();
            let number = sent.load(SeqCst);
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
