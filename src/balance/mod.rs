//! Picks a backend for a new session.
//!
//! This folder opens no socket and does not talk to Redis. Each part uses only parts that are named before
//! it in this list:
//!
//! - [`values`]: what people write (names, weights, tables, settings)
//! - [`queue`]: sessions that wait for a slot
//! - [`backend`]: a backend, its sessions and its health, which outlive snapshots
//! - [`snapshot`]: a table made ready for picking
//! - [`pool`]: where snapshots are published, and in which order sources are asked for a backend
//! - [`simulation`]: what a table would do
//!
//! Tables come from `redis/follow/sync.rs`, from `state/` or from config.yaml.

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
