//! Spawns the tasks of the control plane, each under a name, and tells the supervisor of one that ends.
//!
//! The only place that spawns them. None of them ends by itself: one that does, or that panics, is a
//! [`Defect`]. A task is given as a function that makes its future, so that it can be made anew.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// A task that ended though the proxy was not told to end.
#[derive(Debug)]
pub(super) struct Defect {
    /// The task's name.
    pub(super) task: &'static str,
    /// The pool that it belongs to, if it belongs to one.
    pub(super) pool: Option<Arc<str>>,
    /// What it panicked with, or that it returned.
    pub(super) reason: String,
}

/// Where the tasks report defects.
pub(super) type Defects = mpsc::UnboundedSender<Defect>;

/// The tasks of one pool, or those of no pool. Dropped, they end.
#[derive(Debug)]
pub(super) struct Tasks {
    running: JoinSet<()>,
    pool: Option<Arc<str>>,
    defects: Defects,
}

impl Tasks {
    /// Without tasks. Those that are spawned belong to `pool`.
    pub(super) fn new(pool: Option<Arc<str>>, defects: Defects) -> Self {
        Self { running: JoinSet::new(), pool, defects }
    }

    /// Runs the future that `make` makes, until it ends or `self` is dropped.
    pub(super) fn spawn<F>(&mut self, task: &'static str, mut make: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (pool, defects) = (self.pool.clone(), self.defects.clone());
        self.running.spawn(async move {
            let reason = match caught(make()).await {
                Ok(()) => "it returned".to_owned(),
                Err(panic) => panic,
            };
            // The supervisor listens until it is told to end.
            let _ = defects.send(Defect { task, pool, reason });
        });
    }

    /// Ends the tasks, and waits until they have.
    pub(super) async fn end(&mut self) {
        self.running.shutdown().await;
    }
}

/// Runs `future`; the error is the text of its panic.
async fn caught(future: impl Future<Output = ()>) -> Result<(), String> {
    let mut future = pin!(future);
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(text(&*panic))),
    })
    .await
}

fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("it panicked: {}", text.unwrap_or("without a text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_or_panics_is_reported_by_its_name_and_pool() {
        let (defects, mut reported) = mpsc::unbounded_channel();
        let mut tasks = Tasks::new(Some("web".into()), defects);
        tasks.spawn("returns", || async {});
        tasks.spawn("panics", || async { panic!("a defect of this test") });
        tasks.spawn("goes_on", std::future::pending);
        let mut found = Vec::new();
        for _ in 0..2 {
            let Defect { task, pool, reason } = reported.recv().await.expect("a report");
            assert_eq!(pool.as_deref(), Some("web"));
            found.push((task, reason));
        }
        found.sort_unstable();
        assert_eq!(found[0], ("panics", "it panicked: a defect of this test".to_owned()));
        assert_eq!(found[1], ("returns", "it returned".to_owned()));
        tasks.end().await;
        drop(tasks);
        assert!(reported.recv().await.is_none(), "the end of the others is no defect");
    }
}
