//! Notices a thread of the control plane that is blocked: a task on it has not returned for seconds, so none
//! of its other tasks runs.
//!
//! A [`Pulse`] beats on each such thread once a second. The watchdog looks at the beats from a thread of its
//! own, and logs when they stop and when they go on. The watchdog counts its looks and reads no clock, so a
//! process that was stopped for a while does not count as blocked. A task that blocks cannot be ended.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;
use tracing::{error, warn};

use crate::observe::tasks::Task;

/// The time between two beats, and between two looks at the beats.
const BEAT: Duration = Duration::from_secs(1);
/// Looks without a new beat after which a thread counts as blocked.
const PATIENCE: u32 = 5;

/// Shows that one thread still runs its tasks, and which of them it polls.
#[derive(Debug)]
pub struct Pulse {
    thread: &'static str,
    beats: AtomicU64,
    polled: Mutex<Option<Polled>>,
}

/// The task that is being polled.
#[derive(Clone, Debug)]
struct Polled {
    task: Task,
    pool: Option<Arc<str>>,
}

impl Pulse {
    /// Beats for ever. To be run on the thread.
    pub async fn beat(&self) {
        loop {
            self.beats.fetch_add(1, Relaxed);
            sleep(BEAT).await;
        }
    }

    /// Runs `future`, which is a task of this thread. While the future is polled, the pulse names the task.
    pub async fn polls<F: Future>(&self, task: Task, pool: Option<Arc<str>>, future: F) -> F::Output {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            let _polled = self.shows(Polled { task, pool: pool.clone() });
            future.as_mut().poll(cx)
        })
        .await
    }

    fn shows(&self, polled: Polled) -> ShownUntilDropped<'_> {
        self.set(Some(polled));
        ShownUntilDropped(self)
    }

    fn set(&self, polled: Option<Polled>) {
        *self.polled.lock().unwrap_or_else(PoisonError::into_inner) = polled;
    }

    fn polled(&self) -> Option<Polled> {
        self.polled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Clears the polled task when dropped, also if the task panics.
struct ShownUntilDropped<'a>(&'a Pulse);

impl Drop for ShownUntilDropped<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

/// The pulses of all threads that are watched.
#[derive(Debug, Default)]
pub struct Watchdog {
    pulses: Mutex<Vec<Weak<Pulse>>>,
}

impl Watchdog {
    /// Makes the pulse of the thread with this name. The pulse is watched from its first beat until it is
    /// dropped.
    pub fn pulse(&self, thread: &'static str) -> Arc<Pulse> {
        let pulse = Arc::new(Pulse { thread, beats: AtomicU64::new(0), polled: Mutex::default() });
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&pulse));
        pulse
    }

    /// Watches all pulses on a thread of its own, and lets `own` beat on the caller's thread. Returns only
    /// if the watchdog's thread dies.
    ///
    /// # Errors
    /// The system gives no thread.
    ///
    /// # Cancel safety
    /// Dropping the future ends the thread.
    pub async fn run(self: Arc<Self>, own: Arc<Pulse>) -> io::Result<()> {
        let (_runs, dropped) = channel::<()>();
        let (lives, died) = oneshot::channel::<()>();
        thread::Builder::new().name("statera-watchdog".to_owned()).spawn(move || {
            let _lives = lives;
            self.look_until(&dropped);
        })?;
        tokio::select! {
            _ = died => Ok(()),
            () = own.beat() => Ok(()),
        }
    }

    fn look_until(&self, dropped: &Receiver<()>) {
        let mut seen = Vec::new();
        while dropped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
            self.look(&mut seen);
        }
    }

    fn look(&self, seen: &mut Vec<Seen>) {
        let mut pulses = self.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        pulses.retain(|pulse| pulse.strong_count() > 0);
        let present: Vec<_> = pulses.iter().filter_map(Weak::upgrade).collect();
        drop(pulses);
        seen.retain(|seen| present.iter().any(|pulse| Arc::as_ptr(pulse) == Weak::as_ptr(&seen.pulse)));
        for pulse in present {
            let known = seen.iter().position(|seen| Weak::as_ptr(&seen.pulse) == Arc::as_ptr(&pulse));
            let index = known.unwrap_or_else(|| {
                seen.push(Seen { pulse: Arc::downgrade(&pulse), beats: 0, looks: 0, polled: None });
                seen.len() - 1
            });
            seen[index].look(&pulse);
        }
    }
}

/// What the watchdog has seen of one pulse.
#[derive(Debug)]
struct Seen {
    pulse: Weak<Pulse>,
    beats: u64,
    /// Looks without a new beat.
    looks: u32,
    /// What blocked the thread, as far as it is known.
    polled: Option<Polled>,
}

impl Seen {
    fn look(&mut self, pulse: &Pulse) {
        let beats = pulse.beats.load(Relaxed);
        // A pulse that has never beaten belongs to a thread that is just starting.
        if beats == 0 {
            return;
        }
        let thread = pulse.thread;
        if beats != std::mem::replace(&mut self.beats, beats) {
            let blocked = BEAT * self.looks;
            if std::mem::take(&mut self.looks) >= PATIENCE {
                let (task, pool) = names(self.polled.take().as_ref());
                warn!(thread, task, pool, ?blocked, "a thread of the control plane runs its tasks again");
            }
            return;
        }
        self.looks = self.looks.saturating_add(1);
        if self.looks == PATIENCE {
            self.polled = pulse.polled();
            let (blocked, (task, pool)) = (BEAT * self.looks, names(self.polled.as_ref()));
            error!(
                thread,
                task,
                pool,
                ?blocked,
                "a task blocks a thread of the control plane, which is a defect: nothing else runs there, \
                 and traffic goes on with the last snapshot"
            );
        }
    }
}

fn names(polled: Option<&Polled>) -> (Option<&'static str>, Option<String>) {
    let pool = polled.and_then(|polled| polled.pool.as_deref()).map(str::to_owned);
    (polled.map(|polled| polled.task.name()), pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_thread_counts_as_blocked_after_five_looks_without_a_beat() {
        let watchdog = Watchdog::default();
        let pulse = watchdog.pulse("a test");
        let mut seen = Vec::new();
        let mut looks = |count| {
            (0..count).for_each(|_| watchdog.look(&mut seen));
            (seen[0].looks, seen[0].polled.as_ref().map(|polled| polled.task))
        };
        assert_eq!(looks(10), (0, None), "it has not begun");
        pulse.beats.fetch_add(1, Relaxed);
        assert_eq!(looks(5), (4, None));
        let _polled = pulse.shows(Polled { task: Task::Admin, pool: None });
        assert_eq!(looks(1), (5, Some(Task::Admin)));
        pulse.beats.fetch_add(1, Relaxed);
        assert_eq!(looks(1), (0, None));
    }

    #[tokio::test]
    async fn what_is_polled_is_shown_until_it_returns_or_panics() {
        let watchdog = Watchdog::default();
        let pulse = watchdog.pulse("a test");
        let shown = || pulse.polled().map(|polled| polled.task);
        let seen = pulse.polls(Task::LuaPick, None, async { shown() }).await;
        assert_eq!((seen, shown()), (Some(Task::LuaPick), None));
        let panics = pulse.polls(Task::LuaPick, None, async { panic!("a defect of this test") });
        let result: Result<(), String> = super::super::supervised::caught(panics).await;
        assert_eq!((result, shown()), (Err("a defect of this test".to_owned()), None));
    }

    #[tokio::test]
    async fn the_watchdogs_thread_ends_with_its_task() {
        let watchdog = Arc::new(Watchdog::default());
        let running = Arc::clone(&watchdog).run(watchdog.pulse("a test"));
        assert!(tokio::time::timeout(Duration::from_millis(20), running).await.is_err());
        while Arc::strong_count(&watchdog) > 1 {
            sleep(Duration::from_millis(5)).await;
        }
    }
}
