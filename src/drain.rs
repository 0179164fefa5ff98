//! The phases of the process, from the start to the end, and how all parts hear of them.

use tokio::sync::watch;

/// The phases of the process. They follow each other in this order; the process never goes back to an
/// earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not accepting yet; clients wait in the kernel's queue.
    Starting,
    /// Accepting and ready.
    Serving,
    /// Not ready, but still accepting: load balancers and orchestrators in front have time to notice.
    Leaving,
    /// Not accepting; sessions may finish.
    Draining,
    /// The remaining sessions are closed by force.
    Closing,
}

/// Reads the phase and waits for later ones. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<Phase>);

/// Sets the phase.
#[derive(Debug)]
pub struct DrainControl(watch::Sender<Phase>);

/// Creates the control of the phase and its reader, in [`Phase::Starting`].
#[must_use]
pub fn channel() -> (DrainControl, Drain) {
    let (sender, receiver) = watch::channel(Phase::Starting);
    (DrainControl(sender), Drain(receiver))
}

impl DrainControl {
    /// Moves on to `phase`. A phase earlier than the current one is ignored.
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
    /// The current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Waits for [`Phase::Draining`], in which listeners stop accepting. Cancel safe.
    pub async fn started(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits for [`Phase::Closing`], in which sessions are closed by force. Cancel safe.
    pub async fn closing(&self) {
        self.reached(Phase::Closing).await;
    }

    async fn reached(&self, phase: Phase) {
        // An error means that the control plane has dropped its end, which counts as the last phase.
        let _ = self.0.clone().wait_for(|current| *current >= phase).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_move_forward() {
        let (control, drain) = channel();
        control.advance(Phase::Draining);
        control.advance(Phase::Leaving);
        assert_eq!(drain.phase(), Phase::Draining);
        drain.started().await;
        drop(control);
        drain.closing().await;
    }
}
