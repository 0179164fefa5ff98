//! One connection to one Redis server: how it is opened, what bounds its replies, and what can go wrong with
//! it.
//!
//! Which server to connect to is decided in `topology`.

pub(in crate::redis) mod connection;
pub(in crate::redis) mod error;
pub(in crate::redis) mod reconnect;
mod reply_limit;

pub(in crate::redis) use reply_limit::LARGEST_REPLY_BYTES;
