//! A session at a backend.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::backend::Backend;
use super::slots::Slots;

/// A session at a backend, counted as active from the pick to its end. Another backend is another one's.
#[derive(Debug)]
pub struct Active(Arc<Backend>);

impl Active {
    /// Takes a place. `None`: the backend has as many sessions as it may have.
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

    /// Where.
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
