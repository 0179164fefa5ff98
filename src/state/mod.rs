//! Saves each pool's last table from Redis in a file of `state_dir`, for a start while Redis does not
//! answer.
//!
//! `format` is the text of a file, `file` reads and writes it safely, and [`keeper`] decides when to save.
//! All work on files runs on threads that may wait for a disk, and nothing here can prevent a proxy from
//! starting or serving. The data plane sees a restored table as a snapshot with an origin of its own.

mod failures;
mod file;
mod format;
pub mod keeper;

use std::io;
use std::sync::Arc;

use crate::balance::pool::Cell;
use crate::observe::counters::Counter;

/// A pool whose tables are saved.
#[derive(Clone, Debug)]
pub struct SavedPool {
    /// The pool's name.
    pub pool: Arc<str>,
    /// The key in Redis that the pool's tables come from. A file that was saved from another key is
    /// ignored.
    pub key: String,
    /// The cell that publishes the pool's tables.
    pub cell: Arc<Cell>,
    /// The counters of the pool's file.
    pub status: Arc<SaveStatus>,
}

/// The counters of one pool's file.
#[derive(Debug, Default)]
pub struct SaveStatus {
    /// Writes that failed.
    pub failed_writes: Counter,
}

/// Why a file is not used. The reason is logged, and the pool starts without a saved table.
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
