//! What Statera keeps in Redis: the keys of a pool, and the format of what they hold.

pub(in crate::redis) mod companion;
pub(in crate::redis) mod decode;
pub(in crate::redis) mod followed;
