//! The sources of the metrics: the counters of the process, and of the listeners and pools that run now.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::balance::pool::Pool;
use crate::observe::counters::PerWorker;
use crate::observe::log_sink::LogSink;
use crate::observe::tasks::Restarts;
use crate::redis::status::{RedisStatus, TableStatus};
use crate::session::{Listener, SessionCounters};
use crate::state::SaveStatus;

/// The sources of all metrics. Clones share the listeners and pools given to [`Observed::show`].
#[derive(Clone, Debug)]
pub struct Observed {
    shown: Arc<ArcSwap<Shown>>,
    /// Counts how sessions ended.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    /// Restarts of tasks and threads.
    pub restarts: Arc<Restarts>,
    /// The status of the connections to Redis; `None` if no Redis is configured.
    pub redis: Option<Arc<RedisStatus>>,
    /// Counts lost log lines; `None` if there is no log.
    pub log: Option<LogSink>,
}

/// The listeners and pools that have metrics.
#[derive(Debug)]
struct Shown {
    listeners: Arc<[Arc<Listener>]>,
    pools: Arc<[ObservedPool]>,
}

/// A pool, with the counters that other parts of the process keep for it.
#[derive(Clone, Debug)]
pub struct ObservedPool {
    /// The pool itself.
    pub pool: Arc<Pool>,
    /// The status of its table in Redis.
    pub table: Arc<TableStatus>,
    /// The counters of its saved table; `None` if tables are not saved.
    pub saves: Option<Arc<SaveStatus>>,
}

impl Observed {
    /// Makes the sources without listeners and pools, which [`Observed::show`] sets.
    #[must_use]
    pub fn new(
        sessions: Arc<PerWorker<SessionCounters>>,
        redis: Option<Arc<RedisStatus>>,
        log: Option<LogSink>,
    ) -> Self {
        let nothing = Shown { listeners: Arc::default(), pools: Arc::default() };
        Self {
            shown: Arc::new(ArcSwap::from_pointee(nothing)),
            sessions,
            restarts: Arc::default(),
            redis,
            log,
        }
    }

    /// Sets the listeners and pools that have metrics from now on, in this order.
    pub fn show(
        &self,
        listeners: impl IntoIterator<Item = Arc<Listener>>,
        pools: impl IntoIterator<Item = ObservedPool>,
    ) {
        let (listeners, pools) = (listeners.into_iter().collect(), pools.into_iter().collect());
        self.shown.store(Arc::new(Shown { listeners, pools }));
    }

    /// The listeners that have metrics.
    #[must_use]
    pub fn listeners(&self) -> Arc<[Arc<Listener>]> {
        Arc::clone(&self.shown.load().listeners)
    }

    /// The pools that have metrics.
    #[must_use]
    pub fn pools(&self) -> Arc<[ObservedPool]> {
        Arc::clone(&self.shown.load().pools)
    }
}
