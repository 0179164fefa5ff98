//! Gives each request to the task that answers for its pool's shard, and drops requests to a Redis that
//! does not answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::balance::pool::lua_pick::{LuaRequest, PoolId};

/// Finds the shard of a request by its pool. The sessions' end of the channel only knows whether any
/// shard answers.
pub(super) struct Dispatcher {
    shards: Mutex<HashMap<PoolId, ShardSender>>,
    /// How many shards answer.
    answering: AtomicUsize,
    /// At least one shard answers.
    is_any_answering: Arc<AtomicBool>,
}

#[derive(Clone)]
struct ShardSender {
    requests: mpsc::Sender<LuaRequest>,
    is_answering: Arc<AtomicBool>,
}

impl Dispatcher {
    pub(super) fn new(is_any_answering: Arc<AtomicBool>) -> Self {
        Self { shards: Mutex::default(), answering: AtomicUsize::new(0), is_any_answering }
    }

    /// Creates the queue for the requests of one shard's pools. At most `most` requests wait in it.
    pub(super) fn queue(self: &Arc<Self>, pools: impl Iterator<Item = PoolId>, most: usize) -> ShardQueue {
        let (sender, requests) = mpsc::channel(most);
        let shard = ShardSender { requests: sender, is_answering: Arc::default() };
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        shards.extend(pools.map(|pool| (pool, shard.clone())));
        drop(shards);
        ShardQueue { requests, is_answering: shard.is_answering, dispatcher: Arc::clone(self) }
    }

    /// Puts the request into the queue of its shard. Drops it if the shard does not answer or its queue is
    /// full; the session then knows at once that there is no pick.
    pub(super) fn dispatch(&self, request: LuaRequest) {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = shards.get(&request.pool)
            && shard.is_answering.load(Relaxed)
        {
            let _ = shard.requests.try_send(request);
        }
    }
}

/// The requests of one shard's pools. Dropping it tells sessions that the shard does not answer.
pub(super) struct ShardQueue {
    pub(super) requests: mpsc::Receiver<LuaRequest>,
    is_answering: Arc<AtomicBool>,
    dispatcher: Arc<Dispatcher>,
}

impl ShardQueue {
    /// Lets the queue take requests from now on.
    pub(super) fn start(&self) {
        if !self.is_answering.swap(true, Relaxed) {
            self.dispatcher.answering.fetch_add(1, Relaxed);
            self.dispatcher.is_any_answering.store(true, Relaxed);
        }
    }

    /// Refuses requests from now on, and drops those in the queue, so that their sessions wait no longer.
    pub(super) fn stop(&mut self) {
        if self.is_answering.swap(false, Relaxed) && self.dispatcher.answering.fetch_sub(1, Relaxed) == 1 {
            self.dispatcher.is_any_answering.store(false, Relaxed);
        }
        while self.requests.try_recv().is_ok() {}
    }
}

impl Drop for ShardQueue {
    fn drop(&mut self) {
        self.stop();
    }
}
