//! Spawns the tasks of the control plane, each under a name. A task that ends is restarted
//! (`control/supervised.rs`).
//!
//! All tasks that are restarted are spawned here; such a task may spawn others. The caller passes a function
//! that makes the task's future, so that the task can be restarted.

use std::convert::Infallible;
use std::fmt::Display;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::control::supervised::{self, Defects};
use crate::control::watchdog::{Pulse, Watchdog};
use crate::drain::{Drain, Phase};
use crate::observe::tasks::{Restarts, Task};

/// What restarts and watches the tasks of one proxy. Clones share the same counts and pulses.
#[derive(Clone, Debug)]
pub(super) struct Supervision {
    pub(super) defects: Arc<Defects>,
    pub(super) watchdog: Arc<Watchdog>,
    /// The pulse of the control thread.
    pulse: Arc<Pulse>,
    /// A task may return once the drain has begun.
    drain: Drain,
}

impl Supervision {
    /// Makes the supervision of one proxy, which counts in `restarts`, and the pulse of the control thread.
    pub(super) fn new(restarts: &Arc<Restarts>, drain: Drain) -> Self {
        let watchdog = Arc::new(Watchdog::default());
        let pulse = watchdog.pulse("statera-control");
        Self { defects: Arc::new(Defects::new(Arc::clone(restarts))), watchdog, pulse, drain }
    }
}

/// The tasks of one pool, or the tasks that belong to no pool. Dropping this ends the tasks.
#[derive(Debug)]
pub(super) struct Tasks {
    running: JoinSet<()>,
    pool: Option<Arc<str>>,
    supervision: Supervision,
}

impl Tasks {
    /// Makes an empty set. Tasks that are spawned in it belong to `pool`.
    pub(super) fn new(pool: Option<Arc<str>>, supervision: Supervision) -> Self {
        Self { running: JoinSet::new(), pool, supervision }
    }

    /// Runs the futures that `make` makes, one after the other, until `self` is dropped. Each is to run for
    /// ever, or until the drain begins.
    pub(super) fn spawn<F>(&mut self, task: Task, mut make: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_fallible(task, move || {
            let future = make();
            async move {
                future.await;
                Ok::<(), Infallible>(())
            }
        });
    }

    /// Like [`Tasks::spawn`], with futures that can fail.
    pub(super) fn spawn_fallible<F, E>(&mut self, task: Task, make: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let Supervision { defects, pulse, drain, .. } = self.supervision.clone();
        let is_over = move || drain.phase() >= Phase::Draining;
        self.running.spawn(supervised::run(task, self.pool.clone(), (defects, pulse), is_over, make));
    }

    /// Starts the watchdog, which notices any blocked thread of the control plane.
    pub(super) fn spawn_watchdog(&mut self) {
        let Supervision { watchdog, pulse, .. } = self.supervision.clone();
        self.spawn_fallible(Task::Watchdog, move || Arc::clone(&watchdog).run(Arc::clone(&pulse)));
    }

    /// Ends the tasks and waits for their ends.
    pub(super) async fn end(&mut self) {
        self.running.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use crate::drain;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_before_the_drain_is_run_again_and_others_are_left_alone() {
        let (control, drain) = drain::channel();
        let restarts = Arc::new(Restarts::default());
        let mut tasks = Tasks::new(Some("web".into()), Supervision::new(&restarts, drain));
        let runs = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&runs);
        tasks.spawn(Task::SlowStart, move || {
            let run = counted.fetch_add(1, Relaxed);
            async move {
                assert!(run > 0, "a defect of this test");
                if run > 1 {
                    std::future::pending().await
                }
            }
        });
        tasks.spawn(Task::Admin, std::future::pending);
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert_eq!((restarts.of(Task::SlowStart), runs.load(Relaxed)), (2, 3), "a panic and a return");
        control.advance(Phase::Draining);
        tasks.spawn(Task::ReportApplied, || async {});
        tasks.end().await;
        assert_eq!((restarts.of(Task::Admin), restarts.of(Task::ReportApplied)), (0, 0));
    }
}
