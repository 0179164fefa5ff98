//! Picks a backend for a new session.
//!
//! Pure but for the clock that tells a fresh snapshot from a stale one: no socket, no Redis. The names come first
//! ([`Weight`], [`Address`], [`BackendId`]), then what is written ([`Table`]), what is picked from ([`snapshot`], made of
//! `shares`), where it is published ([`cell`]) and the order in which sources are asked ([`pool`]). Tables come in
//! through `redis/sync.rs` or config.yaml. What would come of a table is tried in [`simulation`].

mod address;
mod admin_state;
pub mod backend;
mod backend_id;
pub mod cause;
pub mod cell;
pub mod condition;
mod departed;
pub mod endpoint;
mod least_conn;
pub mod leaving;
pub mod lua_pick;
mod maglev;
mod member;
mod places;
mod policy;
pub mod pool;
pub mod queue;
mod sequence;
mod shares;
pub mod simulation;
pub mod snapshot;
mod table;
pub mod usability;
mod weight;

pub use address::{Address, InvalidAddress};
pub use admin_state::AdminState;
pub use backend_id::BackendId;
pub use policy::{Outlier, Policy};
pub use table::Table;
pub use weight::{InvalidWeight, Weight};

pub(crate) use maglev::client_hash;

/// How a pool chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Each pick is independent.
    WeightedRandom,
    /// Picks are spread evenly: after any number of them each backend is within a few sessions of its exact share.
    WeightedRoundRobin,
    /// The backend with the fewest active sessions for its weight: of all, or in large pools of some that are drawn by weight.
    LeastConn,
    /// A client's address always leads to the same backend, on every proxy of the fleet.
    SourceHash,
}

impl Balance {
    /// As in config.yaml.
    pub const NAMES: [(&'static str, Self); 4] = [
        (Self::WeightedRandom.name(), Self::WeightedRandom),
        (Self::WeightedRoundRobin.name(), Self::WeightedRoundRobin),
        (Self::LeastConn.name(), Self::LeastConn),
        (Self::SourceHash.name(), Self::SourceHash),
    ];

    /// As in config.yaml.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WeightedRandom => "weighted_random",
            Self::WeightedRoundRobin => "weighted_round_robin",
            Self::LeastConn => "least_conn",
            Self::SourceHash => "source_hash",
        }
    }
}
