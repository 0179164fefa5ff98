//! A pool as sessions and the control plane see it: where its snapshots are published, and the order in which the sources of
//! a pick are asked.

mod cell;
mod draining;
pub mod lua_pick;
#[expect(clippy::module_inception, reason = "the folder has the name of its main type")]
mod pool;
mod take;

pub use cell::{Cell, SnapshotStatus};
pub use draining::DrainingBackends;
pub use pool::{NoPick, Pick, Pool, PoolCounters, Source, Sync};
