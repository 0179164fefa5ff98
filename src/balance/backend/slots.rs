//! The slots of a backend: how many are taken, and how many there are.
//!
//! `active.rs` takes and frees them. Which backend a session takes a slot at is decided in `pool/take.rs`.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32,
    Ordering::{Relaxed, SeqCst},
};

use crate::balance::queue::Queue;

/// The slots of one backend. All workers write the count at the start and the end of each session, so it
/// shares no cache line with the fields of the backend that each pick reads.
#[derive(Debug)]
#[repr(align(128))]
pub(in crate::balance) struct Slots {
    pub(super) active: AtomicU32,
    /// The number of slots; 0: no limit. A copy of the policy's `max_connections`, which saves each
    /// session a load.
    pub(super) limit: u32,
    /// The queue of the pool, which is notified of each freed slot.
    pub(super) queue: Arc<Queue>,
}

impl Slots {
    pub(in crate::balance) fn new(limit: u32, queue: Arc<Queue>) -> Self {
        Self { active: AtomicU32::new(0), limit, queue }
    }

    #[inline]
    pub(in crate::balance) fn active(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// True if the number of slots is limited.
    pub(in crate::balance) fn has_limit(&self) -> bool {
        self.limit > 0
    }

    /// The number of sessions. `None`: all slots are taken.
    #[inline]
    pub(in crate::balance) fn active_unless_full(&self) -> Option<u32> {
        let active = self.active.load(Relaxed);
        (self.limit == 0 || active < self.limit).then_some(active)
    }

    pub(in crate::balance) fn is_full(&self) -> bool {
        self.limit > 0 && self.active.load(SeqCst) >= self.limit
    }
}
