//! Which server has a pool's key: the one in the config, the primary that sentinels name, or a node of a
//! Redis Cluster.
//!
//! `shards.rs` divides the pools among the servers; `primary.rs` stands for one of these servers.
//! `sentinel.rs` and `cluster.rs` ask several sentinels or nodes, and the newest epoch wins (`quorum.rs`).
//! `find.rs` serves commands that connect, ask and end.

pub(in crate::redis) mod cluster;
pub(in crate::redis) mod find;
mod notice_pace;
pub(in crate::redis) mod primary;
mod quorum;
mod redirect;
pub(in crate::redis) mod routed;
pub(in crate::redis) mod sentinel;
pub(in crate::redis) mod shards;
mod slot;
