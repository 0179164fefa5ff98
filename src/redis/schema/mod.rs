//! What Statera keeps in Redis: the keys of a pool, and the format of what they hold.

pub(in crate::redis) mod companion;
pub(in crate::redis) mod decode;
pub(in crate::redis) mod followed;

/// The most members of a table, and the most admin states beside it. A table of this size is read in some 50
/// ms and picked from in 20 ns; a larger one is a mistake or an attack.
pub(in crate::redis) const MAX_MEMBERS: usize = 100_000;
