//! Follows the tables of all pools: notices changes, reads whole tables, and publishes them as snapshots.
//!
//! Start with `watch.rs` (connects and reconnects), then `subscription.rs` (the life of one connection) and
//! `sync.rs` (reads and publishes).

mod changes;
mod event_rest;
mod first_reads;
mod flags;
mod mode;
mod pool_sync;
mod rest;
mod schedule;
mod states;
mod subscription;
mod sync;
mod table_log;
mod table_read;
pub mod watch;
