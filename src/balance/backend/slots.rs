//! A session's place at a backend: taken by the pick, given back when the session ends.
//!
//! Whatever may refuse a session though the backend has weight is asked here and nowhere else: `max_connections`, and the one
//! session that probes an ejected backend. Where nothing is limited, a place costs one atomic add. Where the first choice
//! refuses, others are drawn; a pick that says that all are full has asked each of them.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32,
    Ordering::{Relaxed, SeqCst},
};

use crate::balance::queue::Queue;

/// One backend's places. Written at each session's begin and end, of all workers, so it shares no cache line with what is
/// read at each pick.
#[derive(Debug)]
#[repr(align(128))]
pub(in crate::balance) struct Slots {
    pub(super) active: AtomicU32,
    /// 0: any number.
    pub(super) limit: u32,
    /// Who waits for one: the pool's.
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

    /// It may have only so many sessions.
    pub(in crate::balance) fn has_limit(&self) -> bool {
        self.limit > 0
    }

    /// `None`: it has as many sessions as it may have.
    #[inline]
    pub(in crate::balance) fn active_unless_full(&self) -> Option<u32> {
        let active = self.active.load(Relaxed);
        (self.limit == 0 || active < self.limit).then_some(active)
    }

    pub(in crate::balance) fn is_full(&self) -> bool {
        self.limit > 0 && self.active.load(SeqCst) >= self.limit
    }
}
