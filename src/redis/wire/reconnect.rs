//! The pauses between two attempts to connect to the same server.

use std::time::Duration;

/// The longest first pause after a connection is lost. A whole fleet loses its connections at once, so the
/// reads that follow are spread over this time.
pub(in crate::redis) const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause while a server does not answer, so that its return is noticed within a second.
pub(in crate::redis) const LONGEST_PAUSE: Duration = Duration::from_millis(900);
/// The longest pause before a new primary is asked: a whole fleet hears of the new primary at once.
pub(in crate::redis) const LONGEST_MOVE: Duration = Duration::from_millis(200);
