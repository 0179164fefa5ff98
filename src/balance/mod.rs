//! Picks a backend for a new session.
//!
//! Pure but for the clock that tells a fresh snapshot from a stale one: no socket, no Redis. The names come first
//! ([`Weight`], [`Address`], [`BackendId`]), then what is written ([`Table`]), what is picked from ([`snapshot`], made of
//! `shares`), where it is published ([`cell`]) and the order in which sources are asked ([`pool`]). Tables come in
//! through `redis/sync.rs` or config.yaml.

mod address;
pub mod backend;
mod backend_id;
pub mod cell;
pub mod lua_pick;
pub mod pool;
mod sequence;
mod shares;
pub mod snapshot;
mod table;
mod weight;

pub use address::{Address, InvalidAddress};
pub use backend_id::BackendId;
pub use table::Table;
pub use weight::{InvalidWeight, Weight};

/// How a pool chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Each pick is independent.
    WeightedRandom,
    /// Picks are spread evenly: after any number of them each backend is within a few sessions of its exact share.
    WeightedRoundRobin,
}
