//! Runs the tasks of a worker thread. Who works for whom is `data_plane/worker.rs`'s.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};

use super::{Installed, Reactor, ThreadWaker};

/// A thread's tasks and what they wait on. Dropped, it drops what is left of them.
///
/// Neither tokio's timers nor its sockets work here, nor its ways to spawn ([`spawn`](super::spawn) is this thread's); its channels
/// and its other ways to wait for one another do.
#[derive(Debug)]
pub struct Runtime(Installed);

impl Runtime {
    /// For this thread.
    ///
    /// # Errors
    /// No descriptor.
    ///
    /// # Panics
    /// It has one already.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Reactor::install(true)?))
    }

    /// Runs `future`, and the tasks that it spawns, until it ends: not a step further.
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
        // While they still can give back what they waited on.
        self.0.0.tasks.clear();
    }
}

/// Wakes the future that is blocked on, which need not be looked at whenever a task was woken.
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

    /// The reactor itself is leaked, for the sake of a cheap look at it. What it holds must not be.
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
            let (told, tells) = oneshot::channel();
            spawn(async move {
                sleep(Duration::from_millis(5)).await;
                other.write_all(&[7]).expect("room");
            });
            assert_eq!(read(&socket).await, 7);
            let thread = thread::spawn(move || {
                thread::sleep(Duration::from_millis(5));
                told.send(9)
            });
            assert_eq!(tells.await, Ok(9));
            assert_eq!(thread.join().expect("it ends"), Ok(()));
        });
    }

    /// From a thread that answers at once or a little later, so that many answers come just when this one goes to sleep. One
    /// that is lost is noticed when its time is over.
    #[test]
    fn no_wake_up_of_another_thread_is_lost() {
        run(async {
            let (to, from) = std::sync::mpsc::channel::<oneshot::Sender<u32>>();
            let thread = thread::spawn(move || {
                let mut number = 0;
                loop {
                    match from.try_recv() {
                        Ok(told) => {
                            (0..number % 499).for_each(|_| std::hint::spin_loop());
                            told.send(number).expect("it is waited for");
                            number += 1;
                        }
                        Err(std::sync::mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
                        Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
                    }
                }
            });
            for number in 0..20_000 {
                let (told, tells) = oneshot::channel();
                to.send(told).expect("it runs");
                let limit = Instant::now() + Duration::from_secs(20);
                assert_eq!(timeout_at(limit, tells).await, Ok(Ok(number)));
            }
            drop(to);
            thread.join().expect("it ends");
        });
    }

    /// However long the thread has slept without any timer: the first one that is set then is as punctual as any other.
    #[test]
    fn a_timer_after_a_long_sleep_is_not_late() {
        run(async {
            let (told, tells) = oneshot::channel();
            let thread = thread::spawn(move || {
                thread::sleep(Duration::from_secs(2));
                told.send(())
            });
            tells.await.expect("it is told");
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
            // Over already, and still asked once.
            assert_eq!(timeout_at(at(0), async { 3 }).await, Ok(3));
            assert!(timeout_at(at(0), std::future::pending::<()>()).await.is_err());
            let order = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            let tasks = [30, 10, 20].map(|millis| {
                let (order, (tell, ended)) = (std::rc::Rc::clone(&order), oneshot::channel());
                spawn(async move {
                    sleep_until(at(millis)).await;
                    order.borrow_mut().push(millis);
                    tell.send(()).expect("it is waited for");
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

    /// Its place goes to the next one, and what still comes for it is not taken for the next one's.
    #[test]
    fn an_event_of_a_socket_that_is_closed_is_nobody_elses() {
        run(async {
            let (first, mut other) = pair();
            // As a child process that was just forked would: epoll still has it after the close.
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

    /// A task that always wants to run keeps nobody from his socket or his time.
    #[test]
    fn a_busy_task_starves_nobody() {
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
    fn what_is_left_is_dropped_with_the_runtime() {
        let (told, mut tells) = oneshot::channel::<()>();
        run(async move {
            let (socket, other) = pair();
            spawn(async move {
                let _told = told;
                let _other = other;
                read(&socket).await;
            });
            tokio::task::yield_now().await;
        });
        assert_eq!(tells.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }

    #[test]
    #[should_panic(expected = "a defect")]
    fn a_panic_of_the_first_task_is_the_threads() {
        run(async { panic!("a defect") });
    }
}
