//! A session that holds a slot of a backend, from its pick to its end.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::backend::Backend;
use super::slots::Slots;

/// Holds one slot of a backend. Dropping it frees the slot. A retry at another backend takes a slot there.
#[derive(Debug)]
pub struct Active(Arc<Backend>);

impl Active {
    /// Takes a slot. `None`: all slots are taken.
    ///
    /// # Cost
    /// One atomic add if the backend has no limit.
    #[inline]
    #[must_use]
    pub fn take(backend: &Arc<Backend>) -> Option<Self> {
        let Slots { active, limit, .. } = backend.slots();
        if *limit == 0 {
            active.fetch_add(1, Relaxed);
        } else {
            let one_more = |active| (active < *limit).then_some(active + 1);
            active.fetch_update(SeqCst, SeqCst, one_more).ok()?;
        }
        Some(Self(Arc::clone(backend)))
    }

    /// The backend that the slot belongs to.
    #[must_use]
    pub fn backend(&self) -> &Arc<Backend> {
        &self.0
    }
}

impl Deref for Active {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.0
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let Slots { active, limit, queue } = self.0.slots();
        if *limit == 0 {
            active.fetch_sub(1, Relaxed);
        } else {
            queue.free(|| {
                active.fetch_sub(1, SeqCst);
            });
        }
    }
}
