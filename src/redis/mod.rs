//! Keeps the pools' tables equal to Redis, and lets Redis pick where a snapshot is too old to be trusted.
//!
//! For each server that has pools' keys there are up to three connections, each with a task that
//! reconnects for ever: [`watch`] notices changes, reads whole tables and publishes them; [`lua_pick`]
//! runs the script that picks; [`applied`] reports which table was published.
//!
//! The data plane never waits for this folder, and this folder knows the data plane only by `balance`'s
//! plain types. Statera writes to a weights key only where an operator's command says so: [`weights`].
//!
//! The folders form layers: `follow`, `pick`, `fleet` and `weights` use `topology` (which server), and
//! `topology` uses `wire` (one connection) and `schema` (keys and formats). `weights` also uses `fleet`.

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
