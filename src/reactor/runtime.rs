//! Runs the tasks of a worker thread: the loop itself. Which tasks there are is decided in
//! `data_plane/worker.rs`.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};

use super::{Installed, Reactor, ThreadWaker};

/// The tasks of one thread, and the reactor that they wait on. Dropping it drops the tasks that are left.
///
/// Tokio's timers, sockets and `spawn` do not work on this runtime; use [`sleep`](super::sleep),
/// [`Watched`](super::Watched) and [`spawn`](super::spawn). Tokio's channels, `Notify` and `select!` work,
/// because they need no driver.
#[derive(Debug)]
pub struct Runtime(Installed);

impl Runtime {
    /// Creates the runtime of this thread.
    ///
    /// # Errors
    /// No descriptor is left for epoll or the eventfd.
    ///
    /// # Panics
    /// The thread has a runtime already.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Reactor::install(true)?))
    }

    /// Runs `future` and the tasks of this thread until `future` ends. Does not poll tasks after that.
    pub fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        let reactor = self.0.0;
        let thread_waker = Arc::clone(&reactor.handles().thread_waker);
        let main =
            Arc::new(MainWaker { due: AtomicBool::new(true), thread_waker: Arc::clone(&thread_waker) });
        let main_waker = Waker::from(Arc::clone(&main));
        let mut future = pin!(future);
        loop {
            reactor.tasks.schedule_all(thread_waker.take_woken_tasks());
            if main.due.swap(false, SeqCst)
                && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&main_waker))
            {
                return output;
            }
            reactor.tasks.run();
            reactor.wait();
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Drops the tasks while the reactor still works, because their sockets and timers remove their
        // entries from it.
        self.0.0.tasks.clear();
    }
}

/// The waker of the future passed to [`Runtime::block_on`]. Its flag lets the loop poll that future only
/// when the future itself was woken, not whenever a task was woken.
struct MainWaker {
    due: AtomicBool,
    thread_waker: Arc<ThreadWaker>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.due.store(true, SeqCst);
        self.thread_waker.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ready, Watched, sleep, sleep_until, spawn, timeout_at};
    use super::*;
    use std::future::poll_fn;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use rustix::event::epoll::EventFlags;
    use tokio::sync::oneshot;
    use tokio::time::Instant;

    fn run<F: Future>(future: F) -> F::Output {
        Runtime::new().expect("descriptors").block_on(future)
    }

    fn pair() -> (Watched<UnixStream>, UnixStream) {
        let (inner, outer) = UnixStream::pair().expect("descriptors");
        inner.set_nonblocking(true).expect("a socket");
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
        (Watched::new(inner, flags).expect("a reactor"), outer)
    }

    async fn read(socket: &Watched<UnixStream>) -> u8 {
        let mut byte = [0];
        loop {
            poll_fn(|cx| socket.poll_ready(cx, Ready::READ)).await;
            match socket.socket().read(&mut byte) {
                Ok(_) => return byte[0],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.clear(Ready::READ),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The reactor itself is leaked, so that it can be read without a check. Its contents must not be.
    #[test]
    fn a_runtime_that_is_dropped_leaves_no_descriptors_and_no_tables() {
        for _ in 0..3 {
            let runtime = Runtime::new().expect("descriptors");
            let reactor = runtime.0.0;
            let thread_waker = Arc::downgrade(&reactor.handles().thread_waker);
            spawn(std::future::pending());
            drop(runtime);
            assert!(reactor.handles.borrow().is_none() && thread_waker.upgrade().is_none());
            assert!(crate::reactor::with(|_| ()).is_none());
        }
    }

    #[test]
    fn a_task_is_woken_by_its_socket_by_time_and_by_other_threads() {
        run(async {
            let (socket, mut other) = pair();
            let (sender, receiver) = oneshot::channel();
            spawn(async move {
                sleep(Duration::from_millis(5)).await;
                other.write_all(&[7]).expect("room");
            });
            assert_eq!(read(&socket).await, 7);
            let thread = thread::spawn(move || {
                thread::sleep(Duration::from_millis(5));
                sender.send(9)
            });
            assert_eq!(receiver.await, Ok(9));
            assert_eq!(thread.join().expect("it ends"), Ok(()));
        });
    }

    /// The other thread answers at once or a little later, so that many answers come just when this thread
    /// goes to sleep. A lost wake-up shows as a timeout.
    #[test]
    fn no_wake_up_of_another_thread_is_lost() {
        run(async {
            let (to, from) = std::sync::mpsc::channel::<oneshot::Sender<u32>>();
            let thread = thread::spawn(move || {
                let mut number = 0;
                loop {
                    match from.try_recv() {
                        Ok(sender) => {
                            (0..number % 499).for_each(|_| std::hint::spin_loop());
                            sender.send(number).expect("it is waited for");
                            number += 1;
                        }
                        Err(std::sync::mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
                        Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
                    }
                }
            });
            for number in 0..20_000 {
                let (sender, receiver) = oneshot::channel();
                to.send(sender).expect("it runs");
                let limit = Instant::now() + Duration::from_secs(20);
                assert_eq!(timeout_at(limit, receiver).await, Ok(Ok(number)));
            }
            drop(to);
            thread.join().expect("it ends");
        });
    }

    /// The deadline of a timer is compared with the time at which the last wait ended. After a long sleep
    /// without timers, that time must be the end of the sleep.
    #[test]
    fn a_timer_after_a_long_sleep_is_not_late() {
        run(async {
            let (sender, receiver) = oneshot::channel();
            let thread = thread::spawn(move || {
                thread::sleep(Duration::from_secs(2));
                sender.send(())
            });
            receiver.await.expect("the thread sends");
            let begun = Instant::now();
            sleep(Duration::from_millis(5)).await;
            let slept = begun.elapsed();
            assert!(slept < Duration::from_secs(1), "{slept:?}");
            thread.join().expect("it ends").expect("it was waited for");
        });
    }

    #[test]
    fn timers_fire_in_order_never_early_and_not_once_they_are_dropped() {
        run(async {
            let begun = Instant::now();
            let at = move |millis| begun + Duration::from_millis(millis);
            assert!(timeout_at(at(5), std::future::pending::<()>()).await.is_err());
            assert!(Instant::now() >= at(5));
            // The deadline is over already, and the future is still polled once.
            assert_eq!(timeout_at(at(0), async { 3 }).await, Ok(3));
            assert!(timeout_at(at(0), std::future::pending::<()>()).await.is_err());
            let order = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            let tasks = [30, 10, 20].map(|millis| {
                let (order, (sender, ended)) = (std::rc::Rc::clone(&order), oneshot::channel());
                spawn(async move {
                    sleep_until(at(millis)).await;
                    order.borrow_mut().push(millis);
                    sender.send(()).expect("it is waited for");
                });
                ended
            });
            for task in tasks {
                task.await.expect("it ends");
            }
            assert_eq!(*order.borrow(), [10, 20, 30]);
            super::super::with(|reactor| assert_eq!(reactor.timers.borrow().next_deadline(), None))
                .expect("a reactor");
        });
    }

    /// The entry of a closed socket is reused. Late events of the old socket must not reach the new one.
    #[test]
    fn a_late_event_of_a_closed_socket_does_not_reach_its_successor() {
        run(async {
            let (first, mut other) = pair();
            // As in a forked child process: the copy keeps the socket in epoll after the close.
            let forked = first.socket().try_clone().expect("a descriptor");
            drop(first);
            let (second, mut to_second) = pair();
            poll_fn(|cx| second.poll_ready(cx, Ready::WRITE)).await;
            other.write_all(&[1]).expect("room");
            drop(other);
            sleep(Duration::from_millis(20)).await;
            assert_eq!(second.ready(), Ready::WRITE);
            to_second.write_all(&[2]).expect("room");
            assert_eq!(read(&second).await, 2);
            drop(forked);
        });
    }

    /// A task that is always due lets other tasks' sockets and timers be served.
    #[test]
    fn a_busy_task_starves_no_other() {
        run(async {
            spawn(async {
                loop {
                    tokio::task::yield_now().await;
                }
            });
            let (socket, mut other) = pair();
            let writer = thread::spawn(move || {
                thread::sleep(Duration::from_millis(5));
                other.write_all(&[7]).expect("room");
                other
            });
            assert_eq!(read(&socket).await, 7);
            sleep(Duration::from_millis(5)).await;
            drop(writer.join().expect("it ends"));
        });
    }

    #[test]
    fn tasks_that_are_left_are_dropped_with_the_runtime() {
        let (sender, mut receiver) = oneshot::channel::<()>();
        run(async move {
            let (socket, other) = pair();
            spawn(async move {
                let _sender = sender;
                let _other = other;
                read(&socket).await;
            });
            tokio::task::yield_now().await;
        });
        assert_eq!(receiver.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }

    #[test]
    #[should_panic(expected = "a defect")]
    fn a_panic_of_the_main_future_reaches_the_caller() {
        run(async { panic!("a defect") });
    }
}
