//! Counters that cost a data-plane thread one plain add.
//!
//! Every counter has one writer, the worker that owns it, so an increment is a load and a store without a lock prefix.
//! A scrape sums over the workers (`metrics`). What may go down is kept as two counters that only go up.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A data-plane thread: 0 to `workers` − 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerId(pub usize);

/// Counts up. One thread writes, any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`; only ever from the thread that owns the counter.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of [`Histogram`]'s buckets, in seconds. From a connect on loopback to a session of an hour, three buckets
/// a decade, so that a quantile read off them is within a factor of about two.
pub const BUCKET_BOUNDS_SECONDS: [f64; 18] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0, 120.0,
    600.0, 3600.0,
];

/// Durations by bucket. One thread writes, any thread reads.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKET_BOUNDS_SECONDS.len() + 1],
    sum_micros: Counter,
}

impl Histogram {
    /// Counts one duration; only ever from the thread that owns the histogram.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKET_BOUNDS_SECONDS.iter().position(|&bound| seconds <= bound);
        self.buckets[bucket.unwrap_or(BUCKET_BOUNDS_SECONDS.len())].add(1);
        self.sum_micros.add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// Adds what was observed to `total`.
    pub fn add_to(&self, total: &mut HistogramTotal) {
        for (sum, bucket) in total.buckets.iter_mut().zip(&self.buckets) {
            *sum += bucket.get();
        }
        total.sum_seconds += self.sum_micros.get() as f64 / 1e6;
    }
}

/// A histogram summed over the workers; the last bucket has no upper bound.
#[derive(Clone, Debug, Default)]
pub struct HistogramTotal {
    /// Counts by bucket, not accumulated.
    pub buckets: [u64; BUCKET_BOUNDS_SECONDS.len() + 1],
    /// The sum of all durations.
    pub sum_seconds: f64,
}

/// One `T` for each worker, made when that worker first asks, so that 10,000 idle backends cost no counters.
#[derive(Debug)]
pub struct PerWorker<T> {
    slots: Box<[OnceLock<Box<T>>]>,
}

impl<T: Default> PerWorker<T> {
    /// Room for `workers` slots.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self { slots: (0..workers).map(|_| OnceLock::new()).collect() }
    }

    /// `worker`'s own. Look it up once, before a loop.
    #[must_use]
    pub fn of(&self, worker: WorkerId) -> &T {
        self.slots[worker.0].get_or_init(Box::default)
    }

    /// Those made so far.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(OnceLock::get).map(Box::as_ref)
    }

    /// The sum of one counter over the workers.
    pub fn sum(&self, counter: impl Fn(&T) -> &Counter) -> u64 {
        self.iter().map(|slot| counter(slot).get()).sum()
    }
}

/// What one worker counts of one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Sessions that reached it.
    pub connections: Counter,
    /// Of those, the ones that ended.
    pub closed: Counter,
    /// Of which it sent a byte, or which ended without its fault.
    pub answered: Counter,
    /// Attempts that failed.
    pub connect_failures: Counter,
    /// Sessions that went on to another backend after this one failed.
    pub retries: Counter,
    /// From the backend.
    pub bytes_received: Counter,
    /// To the backend.
    pub bytes_sent: Counter,
    /// Successful attempts.
    pub connect_duration: Histogram,
    /// From accept to close.
    pub session_duration: Histogram,
}

impl BackendCounters {
    /// What tells them from those of other backends and workers, as long as they live.
    #[must_use]
    pub fn mark(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// What one worker counts of one listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Accepted.
    pub connections: Counter,
    /// Of those, the ones that ended.
    pub closed: Counter,
    /// `accept` failed for want of descriptors or memory.
    pub accept_exhausted: Counter,
    /// `accept` failed otherwise.
    pub accept_failed: Counter,
    /// Sessions that found no backend to try.
    pub no_backend: Counter,
    /// Sessions that found all backends and the queue full.
    pub queue_full: Counter,
    /// Sessions that waited in the queue for as long as they might.
    pub queue_timeout: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_puts_each_duration_under_the_first_bound_that_holds_it() {
        let histogram = Histogram::default();
        for micros in [0, 100, 101, 3_600_000_000, 3_600_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let mut total = HistogramTotal::default();
        histogram.add_to(&mut total);
        assert_eq!((total.buckets[0], total.buckets[1], total.buckets[17], total.buckets[18]), (2, 1, 1, 1));
        assert!((total.sum_seconds - 7_200.000_202).abs() < 1e-6);
    }

    #[test]
    fn workers_count_apart_and_are_read_together() {
        let counters = PerWorker::<BackendCounters>::new(3);
        counters.of(WorkerId(0)).connections.add(2);
        counters.of(WorkerId(2)).connections.add(3);
        assert_eq!((counters.iter().count(), counters.sum(|c| &c.connections)), (2, 5));
    }
}
