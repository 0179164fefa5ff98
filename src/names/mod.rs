//! DNS names: one lookup by the system's resolver ([`lookup`]), and the addresses of all backends that are
//! names, kept up to date ([`resolve`]).

pub mod lookup;
pub mod resolve;
