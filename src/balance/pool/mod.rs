//! A pool as sessions and the control plane see it.
//!
//! `pool.rs` has the pool and the order in which the sources of a pick are asked, `take.rs` finds a backend
//! with a free slot, `cell.rs` publishes snapshots, `draining.rs` says which backends are to lose their
//! sessions, and `lua_pick.rs` asks Redis to pick.

mod cell;
mod draining;
pub mod lua_pick;
mod pick;
#[expect(clippy::module_inception, reason = "the folder has the name of its main type")]
mod pool;
mod take;

pub use cell::{Cell, SnapshotStatus};
pub use draining::{DrainingBackends, DrainingList};
pub use pick::{NoPick, Pick, PoolCounters, Source};
pub use pool::{Pool, Sync};
