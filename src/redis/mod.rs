//! Keeps the pools' tables equal to Redis, and lets Redis pick when a snapshot cannot be trusted.
//!
//! Two connections, each with a supervisor of its own that reconnects for ever: [`watch`] hears of changes,
//! reads whole tables (`sync`) and publishes them; [`lua_pick`] runs the script. A third, [`applied`], tells
//! what was published. In a cluster each node that owns a pool's key has these three (`parts`). Nothing here
//! is ever waited for by the data plane, which this module knows only by `balance`'s plain types. Statera
//! never writes to a weights key, unless a person's command says so: [`weights`].

mod fleet;
mod follow;
mod pick;
mod schema;
pub mod status;
mod topology;
pub mod weights;
mod wire;

pub use fleet::applied;
pub use follow::watch;
pub use pick::lua_pick;
pub use schema::followed::Followed;
pub use topology::shards::Shards;
