//! Runs a worker's tasks besides its sessions (the clock, the access log, the draining of backends), and
//! restarts them after a panic.

use std::sync::Arc;
use std::time::Duration;

use tracing::error;

use crate::control::supervised::{Defects, Pauses, caught};
use crate::observe::tasks::Task;
use crate::reactor;

/// The longest pause before a task that panicked runs again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Runs the future that `make` makes on this worker, and another one after each panic.
pub(super) fn keep_running<F>(task: Task, defects: &Arc<Defects>, make: impl Fn() -> F + 'static)
where
    F: Future<Output = ()> + 'static,
{
    let defects = Arc::clone(defects);
    reactor::spawn(async move {
        let mut pauses = Pauses::new(LONGEST_PAUSE);
        while let Err(panic) = caught(async { make().await }).await {
            let (task_name, pause) = (task.name(), pauses.pause());
            defects.restarts().count(task);
            if let Some(held_back) = defects.permit() {
                error!(
                    task = task_name,
                    panic,
                    ?pause,
                    held_back,
                    "a task of a worker panicked, which is a defect: it is restarted, and sessions go on"
                );
            }
            reactor::sleep(pause).await;
            pauses.begins();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn a_task_that_panics_runs_again_and_one_that_returns_has_ended() {
        let (defects, runs) = (Arc::new(Defects::new(Arc::default())), Rc::new(Cell::new(0)));
        let (counted, ended) = (Rc::clone(&runs), Rc::new(tokio::sync::Notify::new()));
        let end = Rc::clone(&ended);
        reactor::Runtime::new().expect("descriptors").block_on(async {
            keep_running(Task::WorkerClock, &defects, move || {
                counted.set(counted.get() + 1);
                assert!(counted.get() > 2, "a defect of this test");
                let end = Rc::clone(&end);
                async move { end.notify_one() }
            });
            ended.notified().await;
        });
        assert_eq!((runs.get(), defects.restarts().of(Task::WorkerClock)), (3, 2));
    }
}
