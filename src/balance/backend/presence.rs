//! What the newest snapshot says of a backend: whether it is in there, and since when it is to lose its sessions.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// A backend that was away for longer is new when it returns.
pub(super) const REMEMBERED_FOR: Duration = Duration::from_secs(300);

/// Whether a backend is in the newest snapshot. Written by the control plane.
#[derive(Debug, Default)]
pub(in crate::balance) struct Presence {
    /// The version of the newest snapshot that it was in.
    pub(super) snapshot: AtomicU64,
    /// Its key in [`Departed`]; 0: it is not in there.
    pub(super) departure: AtomicU64,
}

impl Presence {
    /// 1 while the backend is remembered, which is one reference beside those that use it.
    pub(in crate::balance) fn references(&self) -> usize {
        usize::from(self.departure.load(Relaxed) != 0)
    }
}

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Since when one backend is leaving. Written by the control plane.
#[derive(Debug, Default)]
pub struct DrainingSince(AtomicU64);

impl DrainingSince {
    /// `None`: it takes sessions.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        let millis = self.0.load(Relaxed);
        (millis > 0).then(|| *EPOCH + Duration::from_millis(millis - 1))
    }

    /// It was in use until `now`, if it was.
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
