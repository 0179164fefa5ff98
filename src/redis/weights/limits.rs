//! How much a command reads and writes at once, and what the history keeps.

use crate::redis::wire::LARGEST_REPLY_BYTES;

/// Entries that the history keeps: less than 1 MB at ten changes an entry. XADD trims whole nodes of the
/// stream, so up to a hundred more may stay.
pub const LONGEST_HISTORY: usize = 1_000;
/// The most changed members that an entry keeps, and that one command takes. An entry of more members, or of
/// a longer text, keeps only their number, and no version before it can be rolled back to.
pub const MOST_CHANGES: usize = 10_000;
pub(super) const MOST_CHANGES_BYTES: usize = 3 << 19;
/// The largest table in an answer: [`MAX_MEMBERS`](crate::redis::schema::MAX_MEMBERS) names of 100 bytes.
pub(super) const MOST_TABLE_BYTES: usize = 12 << 20;
/// An answer may hold a table, its newest entry and the changes by other programs.
const _: () = assert!(((MOST_TABLE_BYTES + 2 * MOST_CHANGES_BYTES) as u64) < LARGEST_REPLY_BYTES);
/// The most bytes of a member's name that the history keeps whole. A host name has at most 253 bytes, its
/// port 6 more, and a socket's path 107, so a longer name is no backend.
pub(super) const LONGEST_NAME: usize = 512;
/// The most entries that one command reads.
pub(super) const PAGE: usize = 5;
const _: () = assert!(((PAGE * MOST_CHANGES_BYTES) as u64) < LARGEST_REPLY_BYTES);
