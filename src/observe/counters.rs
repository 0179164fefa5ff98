//! Counters and histograms. An increment costs a worker one plain add.
//!
//! Each counter has one writer, the worker that owns it, so an increment is a load and a store without a
//! lock prefix. `metrics` sums over the workers. A number that can go down is kept as two counters that only
//! go up.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The number of a worker: 0 to `workers` − 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerId(pub usize);

/// A counter that only goes up. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the thread that owns the counter may call this: with two writers, increments get lost.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of [`Histogram`]'s buckets, in seconds: from a connect on loopback to a session of an hour.
/// Up to a second there are three buckets a decade, so that a quantile read from them is exact to a factor
/// of about two.
pub const BUCKET_BOUNDS_SECONDS: [f64; 18] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0, 120.0,
    600.0, 3600.0,
];

/// Counts durations by bucket. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKET_BOUNDS_SECONDS.len() + 1],
    sum_micros: Counter,
}

impl Histogram {
    /// Counts one duration. Only the thread that owns the histogram may call this.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKET_BOUNDS_SECONDS.iter().position(|&bound| seconds <= bound);
        self.buckets[bucket.unwrap_or(BUCKET_BOUNDS_SECONDS.len())].add(1);
        self.sum_micros.add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// Adds the counts to `total`.
    pub fn add_to(&self, total: &mut HistogramTotal) {
        for (sum, bucket) in total.buckets.iter_mut().zip(&self.buckets) {
            *sum += bucket.get();
        }
        total.sum_seconds += self.sum_micros.get() as f64 / 1e6;
    }
}

/// A histogram summed over the workers. The last bucket has no upper bound.
#[derive(Clone, Debug, Default)]
pub struct HistogramTotal {
    /// The count of each bucket alone, without those below it.
    pub buckets: [u64; BUCKET_BOUNDS_SECONDS.len() + 1],
    /// The sum of all durations.
    pub sum_seconds: f64,
}

/// One `T` for each worker. Each `T` is made when its worker first uses it, so that 10,000 idle backends
/// cost no memory for counters.
#[derive(Debug)]
pub struct PerWorker<T> {
    slots: Box<[OnceLock<Box<T>>]>,
}

impl<T: Default> PerWorker<T> {
    /// For `workers` workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self { slots: (0..workers).map(|_| OnceLock::new()).collect() }
    }

    /// Returns the `T` of `worker`. Call this once, before a loop.
    #[must_use]
    pub fn of(&self, worker: WorkerId) -> &T {
        self.slots[worker.0].get_or_init(Box::default)
    }

    /// The `T`s of all workers that have used theirs.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(OnceLock::get).map(Box::as_ref)
    }

    /// The sum of one counter over the workers.
    pub fn sum(&self, counter: impl Fn(&T) -> &Counter) -> u64 {
        self.iter().map(|slot| counter(slot).get()).sum()
    }
}

/// What one worker counts for one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Sessions that connected to it.
    pub connections: Counter,
    /// Of those sessions, the ones that ended.
    pub closed: Counter,
    /// Sessions in which the backend sent a byte, or which ended without a fault of the backend.
    pub answered: Counter,
    /// Attempts to connect that failed.
    pub connect_failures: Counter,
    /// Sessions that tried another backend after this one failed.
    pub retries: Counter,
    /// Bytes from the backend.
    pub bytes_received: Counter,
    /// Bytes to the backend.
    pub bytes_sent: Counter,
    /// How long successful attempts to connect took.
    pub connect_duration: Histogram,
    /// How long sessions took from accept to close.
    pub session_duration: Histogram,
}

/// What one worker counts for one listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Connections accepted.
    pub connections: Counter,
    /// Of those connections, the ones that ended.
    pub closed: Counter,
    /// Accepts that failed for want of descriptors or memory.
    pub accept_exhausted: Counter,
    /// Accepts that failed for another reason.
    pub accept_failed: Counter,
    /// Sessions that ended because there was no backend to try.
    pub no_backend: Counter,
    /// Sessions that ended because all backends and the queue were full.
    pub queue_full: Counter,
    /// Sessions that ended because `queue.timeout` passed while they waited.
    pub queue_timeout: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_in_the_first_bucket_whose_bound_is_not_below_it() {
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
    fn each_worker_has_its_own_counters_and_a_sum_reads_them_all() {
        let counters = PerWorker::<BackendCounters>::new(3);
        counters.of(WorkerId(0)).connections.add(2);
        counters.of(WorkerId(2)).connections.add(3);
        assert_eq!((counters.iter().count(), counters.sum(|c| &c.connections)), (2, 5));
    }
}
