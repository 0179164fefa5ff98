//! What the newest snapshot says of a backend: whether the backend is in it, and since when the backend is
//! draining.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// How long a backend, or an address of a name, is remembered after it left. A later return makes a new
/// one.
pub(super) const REMEMBERED_FOR: Duration = Duration::from_secs(300);

/// Whether a backend is in the newest snapshot. Written by the control plane.
#[derive(Debug, Default)]
pub(in crate::balance) struct Presence {
    /// The version of the newest snapshot that has the backend.
    pub(super) snapshot: AtomicU64,
    /// The key of the backend in `Departed`, or 0 if the backend is not departed.
    pub(super) departure: AtomicU64,
}

impl Presence {
    /// The references that the memory of departed backends holds: 1 while the backend is in it, else 0.
    pub(in crate::balance) fn references(&self) -> usize {
        usize::from(self.departure.load(Relaxed) != 0)
    }
}

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Since when one backend is draining. Written by the control plane.
#[derive(Debug, Default)]
pub struct DrainingSince(AtomicU64);

impl DrainingSince {
    /// Returns the time at which the backend began to drain. `None`: it is not draining.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        let millis = self.0.load(Relaxed);
        (millis > 0).then(|| *EPOCH + Duration::from_millis(millis - 1))
    }

    /// Starts draining at `now`, unless it has started already.
    pub(in crate::balance) fn begin(&self, now: Instant) {
        if self.0.load(Relaxed) == 0 {
            let millis = u64::try_from(now.saturating_duration_since(*EPOCH).as_millis());
            self.0.store(millis.unwrap_or(u64::MAX - 1) + 1, Relaxed);
        }
    }

    pub(in crate::balance) fn end(&self) {
        self.0.store(0, Relaxed);
    }
}
