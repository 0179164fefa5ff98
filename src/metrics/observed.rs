//! What the metrics are read from: the counters of the process, and the listeners and pools that run just
//! now.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::balance::pool::Pool;
use crate::observe::counters::PerWorker;
use crate::observe::log_sink::LogSink;
use crate::redis::status::{RedisStatus, TableStatus};
use crate::session::{Listener, SessionCounters};
use crate::state::SaveStatus;

/// Everything that is counted. Clones share what [`Observed::show`] is told.
#[derive(Clone, Debug)]
pub struct Observed {
    shown: Arc<ArcSwap<Shown>>,
    /// How sessions ended.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    /// `None`: no Redis is configured.
    pub redis: Option<Arc<RedisStatus>>,
    /// Where log lines go.
    pub log: Option<LogSink>,
}

/// The listeners and pools whose counters are shown.
#[derive(Debug)]
struct Shown {
    listeners: Arc<[Arc<Listener>]>,
    pools: Arc<[ObservedPool]>,
}

/// A pool, with what is counted of it beside its own counters.
#[derive(Clone, Debug)]
pub struct ObservedPool {
    /// The pool.
    pub pool: Arc<Pool>,
    /// Its table in Redis.
    pub table: Arc<TableStatus>,
    /// Its file; `None`: no tables are saved.
    pub saves: Option<Arc<SaveStatus>>,
}

impl Observed {
    /// Without listeners and pools.
    #[must_use]
    pub fn new(
        sessions: Arc<PerWorker<SessionCounters>>,
        redis: Option<Arc<RedisStatus>>,
        log: Option<LogSink>,
    ) -> Self {
        let nothing = Shown { listeners: Arc::default(), pools: Arc::default() };
        Self { shown: Arc::new(ArcSwap::from_pointee(nothing)), sessions, redis, log }
    }

    /// Shows these listeners and pools from now on, in this order.
    pub fn show(
        &self,
        listeners: impl IntoIterator<Item = Arc<Listener>>,
        pools: impl IntoIterator<Item = ObservedPool>,
    ) {
        let (listeners, pools) = (listeners.into_iter().collect(), pools.into_iter().collect());
        self.shown.store(Arc::new(Shown { listeners, pools }));
    }

    /// The listeners that are shown.
    #[must_use]
    pub fn listeners(&self) -> Arc<[Arc<Listener>]> {
        Arc::clone(&self.shown.load().listeners)
    }

    /// The pools that are shown.
    #[must_use]
    pub fn pools(&self) -> Arc<[ObservedPool]> {
        Arc::clone(&self.shown.load().pools)
    }
}
