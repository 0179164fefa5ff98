//! Remembers which pools have finished their first read or had a connection, across all connections.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::balance::pool::lua_pick::PoolId;
use crate::redis::schema::followed::Followed;

/// The first read and the first connection of each pool. The startup waits for the first reads; the metrics
/// count each later connection as a reconnect.
pub(super) struct FirstReads {
    inner: Mutex<Inner>,
}

struct Inner {
    pools: HashMap<PoolId, Pool>,
    when_all_over: Option<Box<dyn FnOnce() + Send>>,
}

#[derive(Default)]
struct Pool {
    /// The pool's first read succeeded or failed, or its connection failed.
    is_over: bool,
    was_connected: bool,
}

impl FirstReads {
    /// `when_all_over` is called once, when the first read of each of `pools` is over.
    pub(super) fn new(pools: &[Followed], when_all_over: impl FnOnce() + Send + 'static) -> Self {
        let pools = pools.iter().map(|pool| (pool.id, Pool::default())).collect();
        Self { inner: Mutex::new(Inner { pools, when_all_over: Some(Box::new(when_all_over)) }) }
    }

    /// Records that the first read of each of `pools` is over: it succeeded, or it or the connection failed.
    pub(super) fn over(&self, pools: &[Followed]) {
        let mut inner = self.inner();
        for pool in pools {
            inner.pool(pool).is_over = true;
        }
        if inner.pools.values().all(|pool| pool.is_over)
            && let Some(when_all_over) = inner.when_all_over.take()
        {
            when_all_over();
        }
    }

    /// Records a new connection for `pools`. Returns true if one of these pools had a connection before.
    pub(super) fn connected(&self, pools: &[Followed]) -> bool {
        let mut inner = self.inner();
        let mut again = false;
        for pool in pools {
            again |= std::mem::replace(&mut inner.pool(pool).was_connected, true);
        }
        again
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn pool(&mut self, pool: &Followed) -> &mut Pool {
        self.pools.entry(pool.id).or_default()
    }
}
