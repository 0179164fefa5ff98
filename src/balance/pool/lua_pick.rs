//! The near end of the Lua-pick channel: asks the control plane to let Redis pick.
//!
//! Never a herd: at most `max_in_flight` sessions wait at once, each at most `timeout`; all others, and everyone while
//! Redis is known not to answer, are told "no" at once. The far end is `redis/lua_pick.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use crate::balance::backend::Backend;
use crate::balance::values::{BackendId, Weight};
use crate::reactor::timeout_at;

/// Says which pool a request is for. Never given to another pool, so that a request which is still on its
/// way when its pool is removed cannot reach a pool that was added since, even under the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolId(u64);

impl PoolId {
    /// An id that no other pool of this process has.
    #[must_use]
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// What Redis picked.
pub type LuaAnswer = Option<(Arc<Backend>, Weight)>;

/// One question, on its way to Redis.
#[derive(Debug)]
pub struct LuaRequest {
    /// The pool that the session belongs to.
    pub pool: PoolId,
    /// Uniform from 0 (inclusive) to 1 (exclusive).
    pub point: f64,
    /// Not to be picked.
    pub tried: Vec<BackendId>,
    /// Dropped without an answer: no pick.
    pub answer: oneshot::Sender<LuaAnswer>,
    /// The session's place among those that may wait; given back when the request is dropped.
    _place: OwnedSemaphorePermit,
}

/// Asks on behalf of one pool. All pools and workers share the channel and its bounds.
#[derive(Clone, Debug)]
pub struct LuaPicker {
    pool: PoolId,
    requests: mpsc::Sender<LuaRequest>,
    places: Arc<Semaphore>,
    answering: Arc<AtomicBool>,
    timeout: Duration,
}

/// What the control plane holds of the channel.
#[derive(Debug)]
pub struct LuaRequests {
    /// Never longer than `max_in_flight`.
    pub queue: mpsc::Receiver<LuaRequest>,
    /// Tells the sessions whether asking makes sense.
    pub answering: Arc<AtomicBool>,
}

/// Makes the channel. Every request is refused until the control plane sets `answering`. The picker is for a
/// pool with an id of its own; [`LuaPicker::for_pool`] makes those of other pools.
#[must_use]
pub fn channel(max_in_flight: usize, timeout: Duration) -> (LuaPicker, LuaRequests) {
    let (requests, queue) = mpsc::channel(max_in_flight);
    let answering = Arc::new(AtomicBool::new(false));
    let places = Arc::new(Semaphore::new(max_in_flight));
    (
        LuaPicker { pool: PoolId::unique(), requests, places, answering: Arc::clone(&answering), timeout },
        LuaRequests { queue, answering },
    )
}

impl LuaPicker {
    /// The same channel, for the pool with this id.
    #[must_use]
    pub fn for_pool(&self, pool: PoolId) -> Self {
        Self { pool, ..self.clone() }
    }

    /// Lets Redis pick at `point` (of 2⁶⁴). `None`: it did not, in time, or it is not to be asked now.
    pub async fn pick(&self, point: u64, tried: Vec<BackendId>) -> LuaAnswer {
        if !self.answering.load(Relaxed) {
            return None;
        }
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let (answer, answered) = oneshot::channel();
        // The upper 53 bits: what an f64 holds exactly, so the quotient stays below 1.
        let point = (point >> 11) as f64 / 2f64.powi(53);
        let request = LuaRequest { pool: self.pool, point, tried, answer, _place: place };
        self.requests.try_send(request).ok()?;
        timeout_at(Instant::now() + self.timeout, answered).await.ok()?.ok()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn more_callers_than_places_are_sent_on_at_once() {
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
        // The places come back only when the requests themselves are gone: a frozen Redis is not asked again.
        assert!(picker.pick(0, Vec::new()).await.is_none());
        assert_eq!(started.elapsed(), Duration::from_millis(50));
        while requests.queue.try_recv().is_ok() {}
        assert_eq!(picker.places.available_permits(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_while_redis_is_known_not_to_answer() {
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
