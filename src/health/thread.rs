//! The thread of the health checks.
//!
//! Thousands of checks a second are some tens of µs of work each, and whoever has to wait for a core while many are done in a row
//! is a session. So the thread gives way after each (`active.rs`), which is why it is no other task's: on a machine without a free
//! core it would have to wait as often.

use std::io;
use std::thread::Builder;

use tokio::runtime;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::error;

use super::active::Checks;

/// Runs `checks`. Ends only where there can be no thread, or it dies.
///
/// # Cancel safety
/// Dropping the future ends the thread.
pub async fn run(checks: Vec<Checks>) {
    let (running, dropped) = oneshot::channel::<()>();
    let (alive, died) = oneshot::channel::<()>();
    if let Err(error) = spawn(checks, dropped, alive) {
        error!(%error, "no thread for health checks");
        return;
    }
    // Nothing is ever sent: its end of the channel goes with the thread.
    let _ = died.await;
    drop(running);
}

fn spawn(checks: Vec<Checks>, dropped: oneshot::Receiver<()>, alive: oneshot::Sender<()>) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    // Not waited for: it ends by itself once `dropped` is ready.
    drop(Builder::new().name("statera-checks".to_owned()).spawn(move || {
        let _alive = alive;
        runtime.block_on(async {
            let mut running: JoinSet<()> = checks.into_iter().map(Checks::run).collect();
            tokio::select! {
                _ = dropped => {}
                Some(ended) = running.join_next() => error!(?ended, "health checks ended"),
            }
        });
    })?);
    Ok(())
}
