//! Keeps the pools' tables equal to Redis, and lets Redis pick when a snapshot cannot be trusted.
//!
//! Two connections, each with a supervisor of its own that reconnects for ever: [`watch`] hears of changes, reads whole
//! tables (`sync`) and publishes them; [`lua_pick`] runs the script. A third, [`applied`], tells what was published.
//! Nothing here is ever waited for by the data plane, which this module knows only by `balance`'s plain types. Statera
//! never writes to a weights key, unless a person's command says so: [`weights`].

pub mod applied;
mod companion;
mod connection;
mod content;
mod decode;
mod flags;
pub mod lua_pick;
mod mode;
mod primary;
mod sentinel;
pub mod status;
mod sync;
mod trouble;
pub mod watch;
pub mod weights;

pub use primary::Primary;

use std::sync::Arc;

use crate::balance::cell::Cell;

/// A key that a pool's weights stand under, and where its tables are published.
#[derive(Clone, Debug)]
pub struct Followed {
    /// The pool's name.
    pub pool: Arc<str>,
    /// Its snapshot cell.
    pub cell: Arc<Cell>,
    /// A sorted set.
    pub key: String,
}
