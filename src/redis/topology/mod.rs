//! Which server has a pool's key: one Redis, the primary that sentinels name, or a node of a Redis Cluster.

pub(in crate::redis) mod cluster;
mod notice_pace;
pub(in crate::redis) mod parts;
pub(in crate::redis) mod primary;
mod quorum;
pub(in crate::redis) mod redirect;
pub(in crate::redis) mod sentinel;
mod slot;
