//! How the control plane stands with Redis, for the metrics. Written by the control thread, read on a scrape.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};

use crate::telemetry::counters::{Counter, Histogram};

/// How changes are noticed just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchMode {
    /// Not connected.
    None = 0,
    /// Keyspace notifications.
    Notifications = 1,
    /// The server remembers what was read, and tells when it changes.
    Tracking = 2,
    /// A read every `poll_interval`.
    Poll = 3,
}

impl WatchMode {
    /// In the order of their declaration.
    pub const ALL: [Self; 4] = [Self::None, Self::Notifications, Self::Tracking, Self::Poll];

    /// As in the metric's label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Notifications => "notifications",
            Self::Tracking => "tracking",
            Self::Poll => "poll",
        }
    }
}

/// What is counted of Redis as a whole.
#[derive(Debug, Default)]
pub struct RedisStatus {
    connected: AtomicBool,
    mode: AtomicU8,
    /// Messages that said "this key may have changed".
    pub notifications: Counter,
    /// Whole tables read.
    pub resyncs: Counter,
    /// Connections made after the first.
    pub reconnects: Counter,
    /// From the arrival of a notification to the swap.
    pub propagation: Histogram,
}

impl RedisStatus {
    /// The watching connection is up, in `mode`; [`WatchMode::None`] says that it is down.
    pub fn set_mode(&self, mode: WatchMode) {
        self.connected.store(mode != WatchMode::None, Relaxed);
        self.mode.store(mode as u8, Relaxed);
    }

    /// How changes are noticed.
    #[must_use]
    pub fn mode(&self) -> WatchMode {
        WatchMode::ALL[usize::from(self.mode.load(Relaxed))]
    }

    /// The watching connection is up.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.load(Relaxed)
    }
}

/// What is known of one pool's table.
#[derive(Debug, Default)]
pub struct TableStatus {
    /// Members of the table that were left out, as of the last read.
    pub rejected_members: AtomicU64,
    /// Reads that failed or were refused.
    pub failed_reads: Counter,
}
