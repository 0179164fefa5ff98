//! A pool whose table is kept in Redis.

use std::sync::Arc;

use crate::balance::pool::Cell;
use crate::balance::pool::lua_pick::PoolId;
use crate::redis::status::TableStatus;

/// A pool whose table is kept in Redis, and the cell that its table is published in.
#[derive(Clone, Debug)]
pub struct Followed {
    /// The pool's id, which a request for a Lua pick carries.
    pub id: PoolId,
    /// The pool's name.
    pub pool: Arc<str>,
    /// The pool's snapshot cell.
    pub cell: Arc<Cell>,
    /// The weights key, a sorted set.
    pub key: String,
    /// What is counted about the table, for the metrics.
    pub status: Arc<TableStatus>,
}
