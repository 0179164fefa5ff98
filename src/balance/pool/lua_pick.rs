//! The sessions' end of the Lua-pick channel: asks the control plane to let Redis pick.
//!
//! At most `max_in_flight` sessions wait at once, each for at most `timeout`. Other sessions get no pick at
//! once, and so do all sessions while Redis is known not to answer. `redis/pick/lua_pick.rs` has the other
//! end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use crate::balance::backend::Backend;
use crate::balance::values::{BackendId, Weight};
use crate::reactor::timeout_at;

/// Identifies the pool of a request. An id is never used for another pool: a request that is still on its
/// way when its pool is removed cannot reach a pool that was added since, even under the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolId(u64);

impl PoolId {
    /// Makes an id that no other pool of this process has.
    #[must_use]
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// What Redis picked. `None`: no pick.
pub type LuaAnswer = Option<(Arc<Backend>, Weight)>;

/// One request, on its way to Redis.
#[derive(Debug)]
pub struct LuaRequest {
    /// The pool that the session belongs to.
    pub pool: PoolId,
    /// Uniform from 0 (inclusive) to 1 (exclusive).
    pub point: f64,
    /// Backends that Redis is not to pick.
    pub tried: Vec<BackendId>,
    /// Where the answer goes. Dropping it means no pick.
    pub answer: oneshot::Sender<LuaAnswer>,
    /// The permit to wait. Dropping the request gives it back.
    _permit: OwnedSemaphorePermit,
}

/// Sends the requests of one pool. All pools and workers share the channel and its bounds.
#[derive(Clone, Debug)]
pub struct LuaPicker {
    pool: PoolId,
    requests: mpsc::Sender<LuaRequest>,
    permits: Arc<Semaphore>,
    answering: Arc<AtomicBool>,
    timeout: Duration,
}

/// The control plane's end of the channel.
#[derive(Debug)]
pub struct LuaRequests {
    /// The requests, at most `max_in_flight`.
    pub queue: mpsc::Receiver<LuaRequest>,
    /// Set while Redis answers. While it is not set, sessions do not ask.
    pub answering: Arc<AtomicBool>,
}

/// Makes the channel. No session gets a pick until the control plane sets `answering`. The picker has a
/// pool id that no pool has; [`LuaPicker::for_pool`] makes the picker of a pool.
#[must_use]
pub fn channel(max_in_flight: usize, timeout: Duration) -> (LuaPicker, LuaRequests) {
    let (requests, queue) = mpsc::channel(max_in_flight);
    let answering = Arc::new(AtomicBool::new(false));
    let permits = Arc::new(Semaphore::new(max_in_flight));
    (
        LuaPicker { pool: PoolId::unique(), requests, permits, answering: Arc::clone(&answering), timeout },
        LuaRequests { queue, answering },
    )
}

impl LuaPicker {
    /// A picker for the pool with this id, on the same channel.
    #[must_use]
    pub fn for_pool(&self, pool: PoolId) -> Self {
        Self { pool, ..self.clone() }
    }

    /// Lets Redis pick at `point` (of 2⁶⁴). `None`: Redis did not pick, did not answer in time, or is not to
    /// be asked now.
    pub async fn pick(&self, point: u64, tried: Vec<BackendId>) -> LuaAnswer {
        if !self.answering.load(Relaxed) {
            return None;
        }
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        let (answer, answered) = oneshot::channel();
        // The upper 53 bits, which an f64 holds exactly, so that the quotient stays below 1.
        let point = (point >> 11) as f64 / 2f64.powi(53);
        let request = LuaRequest { pool: self.pool, point, tried, answer, _permit: permit };
        self.requests.try_send(request).ok()?;
        timeout_at(Instant::now() + self.timeout, answered).await.ok()?.ok()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn callers_without_a_permit_get_no_pick_at_once() {
        let (picker, mut requests) = channel(2, Duration::from_millis(50));
        requests.answering.store(true, Relaxed);
        let started = tokio::time::Instant::now();
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let picker = picker.clone();
                tokio::spawn(async move { picker.pick(0, Vec::new()).await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(picker.pick(0, Vec::new()).await.is_none());
        assert_eq!(started.elapsed(), Duration::ZERO);
        for task in waiting {
            assert!(task.await.expect("the task ends").is_none());
        }
        assert_eq!(started.elapsed(), Duration::from_millis(50));
        // Permits come back only when the requests themselves are dropped: a Redis that hangs is not asked
        // again.
        assert!(picker.pick(0, Vec::new()).await.is_none());
        assert_eq!(started.elapsed(), Duration::from_millis(50));
        while requests.queue.try_recv().is_ok() {}
        assert_eq!(picker.permits.available_permits(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn no_session_waits_while_redis_is_known_not_to_answer() {
        let (picker, mut requests) = channel(2, Duration::from_millis(50));
        let started = tokio::time::Instant::now();
        assert!(picker.pick(0, Vec::new()).await.is_none());
        assert_eq!(started.elapsed(), Duration::ZERO);
        assert!(requests.queue.try_recv().is_err());
    }

    #[tokio::test]
    async fn the_point_sent_to_redis_is_below_one() {
        let (picker, mut requests) = channel(1, Duration::from_millis(50));
        requests.answering.store(true, Relaxed);
        let pool = PoolId::unique();
        let asked = tokio::spawn(async move { picker.for_pool(pool).pick(u64::MAX, Vec::new()).await });
        let request = requests.queue.recv().await.expect("a request");
        assert!(request.point < 1.0 && request.point > 0.999_999 && request.pool == pool);
        drop(request);
        assert!(asked.await.expect("the task ends").is_none());
    }
}
