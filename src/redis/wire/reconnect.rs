//! The pauses between two attempts to connect to the same server.

use std::time::Duration;

/// The first pause after a connection is lost: a fleet loses them all at once, and its whole reads come back
/// spread over so long.
pub(in crate::redis) const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Between two tries at a server that is away: whoever waits hears within a second that it is back.
pub(in crate::redis) const LONGEST_PAUSE: Duration = Duration::from_millis(900);
/// Before the new primary is asked, at most: a whole fleet is told of it in one moment.
pub(in crate::redis) const LONGEST_MOVE: Duration = Duration::from_millis(200);
