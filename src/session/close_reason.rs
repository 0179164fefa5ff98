//! Why a session ended, with the names for it in metrics and in the access log.

use crate::relay::{Ended, Side};

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The session was relayed until this end.
    Relayed(Ended),
    /// No backend had any weight, or none was left to try.
    NoBackend,
    /// The last backend tried refused the connection or could not be reached.
    ConnectFailed,
    /// The last backend tried did not answer in time, or the deadline for all attempts passed.
    ConnectTimeout,
    /// No local port, descriptor or memory was left.
    Exhausted,
    /// All backends and the queue were full.
    QueueFull,
    /// All backends were full until the queue's timeout was over.
    QueueTimeout,
    /// The client left while it waited in the queue.
    QueueLeft,
    /// The session was closed by force, because the process ended.
    Shutdown,
    /// The client reset its connection before a backend was connected.
    ConnectLeft,
    /// A defect of Statera: the session panicked, or the thread that it ran on.
    Defect,
}

impl CloseReason {
    /// All reasons, each with a counter of its own.
    pub const ALL: [Self; 17] = [
        Self::Relayed(Ended::Finished),
        Self::Relayed(Ended::Reset(Side::Client)),
        Self::Relayed(Ended::Reset(Side::Backend)),
        Self::Relayed(Ended::IdleTimeout),
        Self::Relayed(Ended::Drained),
        Self::Relayed(Ended::HalfCloseTimeout(Side::Client)),
        Self::Relayed(Ended::HalfCloseTimeout(Side::Backend)),
        Self::NoBackend,
        Self::ConnectFailed,
        Self::ConnectTimeout,
        Self::Exhausted,
        Self::QueueFull,
        Self::QueueTimeout,
        Self::QueueLeft,
        Self::Shutdown,
        Self::ConnectLeft,
        Self::Defect,
    ];

    /// The metric's label and the access log's `close_reason`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.describe().1
    }

    /// HAProxy's two letters: `--` for a normal end. Otherwise the first says why or by which side the
    /// session was ended (C client, S server, P proxy, R resources, K killed, I internal error; lower case
    /// for a timeout), the second at which stage (Q queue, C connect, D relay).
    #[must_use]
    pub fn term(self) -> &'static str {
        self.describe().2
    }

    /// The reason's index in [`CloseReason::ALL`].
    pub(super) fn index(self) -> usize {
        self.describe().0
    }

    /// The index in [`CloseReason::ALL`], the name and the two letters.
    fn describe(self) -> (usize, &'static str, &'static str) {
        match self {
            Self::Relayed(Ended::Finished) => (0, "finished", "--"),
            Self::Relayed(Ended::Reset(Side::Client)) => (1, "client_reset", "CD"),
            Self::Relayed(Ended::Reset(Side::Backend)) => (2, "backend_reset", "SD"),
            Self::Relayed(Ended::IdleTimeout) => (3, "idle_timeout", "cD"),
            Self::Relayed(Ended::Drained) => (4, "drained", "KD"),
            Self::Relayed(Ended::HalfCloseTimeout(Side::Client)) => (5, "client_half_close_timeout", "cD"),
            Self::Relayed(Ended::HalfCloseTimeout(Side::Backend)) => (6, "backend_half_close_timeout", "sD"),
            Self::NoBackend => (7, "no_backend", "SC"),
            Self::ConnectFailed => (8, "connect_failed", "SC"),
            Self::ConnectTimeout => (9, "connect_timeout", "sC"),
            Self::Exhausted => (10, "exhausted", "RC"),
            Self::QueueFull => (11, "queue_full", "PQ"),
            Self::QueueTimeout => (12, "queue_timeout", "sQ"),
            Self::QueueLeft => (13, "queue_left", "CQ"),
            Self::Shutdown => (14, "shutdown", "KD"),
            Self::ConnectLeft => (15, "connect_left", "CC"),
            Self::Defect => (16, "defect", "ID"),
        }
    }
}
