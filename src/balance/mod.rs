//! Picks a backend for a new session.
//!
//! Pure but for the clock that tells a fresh snapshot from a stale one: no socket, no Redis. The folders stand one above the
//! other, and each names those below it alone: [`values`] (what is written), [`queue`] (sessions that wait), [`backend`]
//! (what outlives snapshots), [`snapshot`] (what is picked from), [`pool`] (where snapshots are published, and the order in
//! which sources are asked) and [`simulation`] (what would come of a table). Tables come in through Redis or config.yaml.

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
