//! Hands each request to the one who answers for its pool, and none to a Redis that does not answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::balance::pool::lua_pick::{LuaRequest, PoolId};

/// Where a request goes, by pool. The near end of the channel knows only whether anybody answers at all.
pub(in crate::redis) struct Doors {
    by_pool: Mutex<HashMap<PoolId, Entrance>>,
    open: AtomicUsize,
    answering: Arc<AtomicBool>,
}

#[derive(Clone)]
struct Entrance {
    requests: mpsc::Sender<LuaRequest>,
    is_open: Arc<AtomicBool>,
}

impl Doors {
    pub(in crate::redis) fn new(answering: Arc<AtomicBool>) -> Self {
        Self { by_pool: Mutex::default(), open: AtomicUsize::new(0), answering }
    }

    /// A door for the pools of one part. No more wait behind it than may be asked at once.
    pub(in crate::redis) fn door(self: &Arc<Self>, pools: impl Iterator<Item = PoolId>, most: usize) -> Door {
        let (requests, queue) = mpsc::channel(most);
        let entrance = Entrance { requests, is_open: Arc::default() };
        let mut by_pool = self.by_pool.lock().unwrap_or_else(PoisonError::into_inner);
        by_pool.extend(pools.map(|pool| (pool, entrance.clone())));
        drop(by_pool);
        Door { queue, is_open: entrance.is_open, doors: Arc::clone(self) }
    }

    /// Dropped where the door is closed: its session is told so at once.
    pub(in crate::redis) fn hand_on(&self, request: LuaRequest) {
        let by_pool = self.by_pool.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entrance) = by_pool.get(&request.pool)
            && entrance.is_open.load(Relaxed)
        {
            let _ = entrance.requests.try_send(request);
        }
    }
}

/// Closed when it is dropped.
pub(in crate::redis) struct Door {
    pub(in crate::redis) queue: mpsc::Receiver<LuaRequest>,
    is_open: Arc<AtomicBool>,
    doors: Arc<Doors>,
}

impl Door {
    pub(in crate::redis) fn open(&self) {
        if !self.is_open.swap(true, Relaxed) {
            self.doors.open.fetch_add(1, Relaxed);
            self.doors.answering.store(true, Relaxed);
        }
    }

    /// Sessions that have asked already are told now, not when Redis is back.
    pub(in crate::redis) fn close(&mut self) {
        if self.is_open.swap(false, Relaxed) && self.doors.open.fetch_sub(1, Relaxed) == 1 {
            self.doors.answering.store(false, Relaxed);
        }
        while self.queue.try_recv().is_ok() {}
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.close();
    }
}
