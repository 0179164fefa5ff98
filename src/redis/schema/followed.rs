//! One pool's weights key, and the cell that its tables are published in.

use std::sync::Arc;

use crate::balance::cell::Cell;
use crate::balance::lua_pick::PoolId;
use crate::redis::status::TableStatus;

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
