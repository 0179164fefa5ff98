//! Keeps the pools' tables equal to Redis, and lets Redis pick when a snapshot cannot be trusted.
//!
//! Two connections, each with a supervisor of its own that reconnects for ever: [`watch`] hears of changes, reads whole
//! tables (`sync`) and publishes them; [`lua_pick`] runs the script. A third, [`applied`], tells what was published. In a
//! cluster each node that owns a pool's key has these three (`parts`).
//! Nothing here is ever waited for by the data plane, which this module knows only by `balance`'s plain types. Statera
//! never writes to a weights key, unless a person's command says so: [`weights`].

pub mod applied;
mod changes;
mod cluster;
mod companion;
mod connection;
mod content;
mod decode;
mod event_rest;
mod flags;
pub mod lua_pick;
mod mode;
mod notice_pace;
mod opinion;
mod parts;
mod primary;
mod redirect;
mod reply_limit;
mod rest;
mod schedule;
mod sentinel;
mod slot;
mod states;
pub mod status;
mod sync;
mod table_log;
mod table_read;
mod trouble;
mod unusable;
pub mod watch;
pub mod weights;

pub use parts::Parts;

use std::sync::Arc;
use std::time::Duration;

use self::status::TableStatus;
use crate::balance::pool::Cell;
use crate::balance::pool::lua_pick::PoolId;

/// The first pause after a connection is lost: a fleet loses them all at once, and its whole reads come back spread over so
/// long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Between two tries at a server that is away: whoever waits hears within a second that it is back.
const LONGEST_PAUSE: Duration = Duration::from_millis(900);
/// Before the new primary is asked, at most: a whole fleet is told of it in one moment.
const LONGEST_MOVE: Duration = Duration::from_millis(200);

/// A key that a pool's weights stand under, and where its tables are published.
#[derive(Clone, Debug)]
pub struct Followed {
    /// Says which pool a request for a Lua pick is for.
    pub id: PoolId,
    /// The pool's name.
    pub pool: Arc<str>,
    /// Its snapshot cell.
    pub cell: Arc<Cell>,
    /// A sorted set.
    pub key: String,
    /// What is counted of the table, for the metrics.
    pub status: Arc<TableStatus>,
}
