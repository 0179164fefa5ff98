//! How everything hears that the process is to end, and how far that has come.

use tokio::sync::watch;

/// The phases of a life, in order; none is ever gone back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not accepting yet; clients wait in the kernel's queue.
    Starting,
    /// Ready.
    Serving,
    /// Not ready, but still accepting: whoever steers traffic here has time to see it.
    Leaving,
    /// Not accepting; sessions may finish.
    Draining,
    /// Sessions that are left are cut.
    Closing,
}

/// Hears the phases. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<Phase>);

/// Sets the phases.
#[derive(Debug)]
pub struct DrainControl(watch::Sender<Phase>);

/// Begins with [`Phase::Starting`].
#[must_use]
pub fn channel() -> (DrainControl, Drain) {
    let (sender, receiver) = watch::channel(Phase::Starting);
    (DrainControl(sender), Drain(receiver))
}

impl DrainControl {
    /// Moves on to `phase`; an earlier one than the present is ignored.
    pub fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|current| {
            let forward = phase > *current;
            if forward {
                *current = phase;
            }
            forward
        });
    }
}

impl Drain {
    /// The present phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Waits until accepting ends. Cancel safe.
    pub async fn started(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits until sessions are cut. Cancel safe.
    pub async fn closing(&self) {
        self.reached(Phase::Closing).await;
    }

    async fn reached(&self, phase: Phase) {
        // An error means that the sender is gone, and with it the process's control: the same as the last phase.
        let _ = self.0.clone().wait_for(|current| *current >= phase).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_move_on() {
        let (control, drain) = channel();
        control.advance(Phase::Draining);
        control.advance(Phase::Leaving);
        assert_eq!(drain.phase(), Phase::Draining);
        drain.started().await;
        drop(control);
        drain.closing().await;
    }
}
