//! Picks a backend for a new session.
//!
//! No socket and no Redis; the clock is read only to tell a fresh snapshot from a stale one. Each folder
//! uses those named before it, and never one named after it:
//!
//! - [`values`]: what people write (names, weights, tables, settings)
//! - [`queue`]: sessions that wait for a slot
//! - [`backend`]: a backend, its sessions and its health, which outlive snapshots
//! - [`snapshot`]: a table made ready for picking
//! - [`pool`]: where snapshots are published, and in which order sources are asked for a backend
//! - [`simulation`]: what a table would do
//!
//! Tables come from `redis/sync.rs`, from `state/` or from config.yaml.

pub mod backend;
pub mod pool;
pub mod queue;
pub mod simulation;
pub mod snapshot;
pub mod values;

pub use values::{
    Address, AdminState, BackendId, Balance, Capacity, InvalidAddress, InvalidWeight, Outlier, Policy, Table,
    Weight,
};
