//! What people write about a pool, as plain values: names, weights, states, tables and settings.
//!
//! These values do not change once they are made. This folder uses no sessions, sockets or health.

mod address;
mod admin_state;
mod backend_id;
mod policy;
mod table;
mod weight;

pub use address::{Address, InvalidAddress};
pub use admin_state::AdminState;
pub use backend_id::BackendId;
pub use policy::{Balance, Capacity, Outlier, Policy};
pub use table::Table;
pub use weight::{InvalidWeight, Weight};
