//! Keeps each pool's last table from Redis in a file of `state_dir`, for a start while Redis is away.
//!
//! `format` says what a file looks like and believes nothing that it reads; `file` writes it so that a kill at any moment
//! leaves the old one or the new one, whole; [`keeper`] does both at its own pace, on threads that may wait for a disk, and
//! tells of trouble once. Nothing here can keep a proxy from starting or from serving. The data plane knows nothing of it:
//! a table that was found is one more snapshot, of an origin of its own.

mod file;
mod format;
mod health;
pub mod keeper;

use std::io;
use std::sync::Arc;

use crate::balance::cell::Cell;
use crate::observe::counters::Counter;

/// A pool whose tables are kept.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The pool's name.
    pub pool: Arc<str>,
    /// The key in Redis that its tables come from: the tables of another key are another thing's.
    pub key: String,
    /// Where its tables are published.
    pub cell: Arc<Cell>,
    /// What is counted of its file.
    pub status: Arc<SaveStatus>,
}

/// What is counted of one pool's file.
#[derive(Debug, Default)]
pub struct SaveStatus {
    /// Tries to write it that failed.
    pub failed_writes: Counter,
}

/// Why what lies there is not used. Each ends in a line of the log, and in a start without it.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    #[error("it is {0}, not a plain file")]
    NotPlain(&'static str),
    #[error("it belongs to another user (uid {0})")]
    OtherOwner(u32),
    #[error("others may write to it: chmod go-w")]
    OpenToOthers,
    #[error("it is larger than {} MiB", file::MAX_BYTES >> 20)]
    TooLarge,
    #[error("it is not a table that Statera saved")]
    Foreign,
    #[error("its format has version {0}, and this Statera knows {known}", known = format::VERSION)]
    UnknownVersion(String),
    #[error("it ends in the middle")]
    CutShort,
    #[error("its checksum does not fit its content: it is damaged")]
    Damaged,
    #[error("it is of the pool {0}")]
    OtherPool(String),
    #[error("it is of the weights_key {0}")]
    OtherKey(String),
    #[error("line {line}: {reason}")]
    Impossible { line: usize, reason: String },
}
