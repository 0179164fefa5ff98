//! Limits how often one kind of line is logged.

use std::time::Duration;

use tokio::time::Instant;

/// The length of a limiter's window. A client of Redis that writes a good and a bad table in turns causes
/// thousands of changes a second, and without a limit each change would be a line.
pub const LOG_WINDOW: Duration = Duration::from_secs(10);

/// Permits a number of lines in each [`LOG_WINDOW`] and counts the lines that it holds back.
///
/// The last state is logged even so, if the caller compares each new state with the last one that it logged.
#[derive(Clone, Debug)]
pub struct LogLimiter {
    most: u32,
    /// Lines permitted in this window.
    permitted: u32,
    window_ends: Option<Instant>,
    held_back: u64,
}

impl LogLimiter {
    /// Permits `most` lines in a window.
    #[must_use]
    pub fn new(most: u32) -> Self {
        Self { most, permitted: 0, window_ends: None, held_back: 0 }
    }

    /// Asks to log one line. `None`: it is held back. `Some`: log it, with the number of lines held back
    /// since the last one.
    pub fn permit(&mut self, now: Instant) -> Option<HeldBack> {
        if self.window_ends.is_none_or(|ends| ends <= now) {
            (self.window_ends, self.permitted) = (Some(now + LOG_WINDOW), 0);
        }
        if self.permitted >= self.most {
            self.held_back += 1;
            return None;
        }
        self.permitted += 1;
        Some(Some(std::mem::take(&mut self.held_back)).filter(|count| *count > 0))
    }
}

/// The number of lines held back, as a field of a log line; `None` leaves the field out.
pub type HeldBack = Option<u64>;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn a_window_permits_its_lines_and_the_next_one_counts_those_held_back() {
        let mut limiter = LogLimiter::new(2);
        let mut permit = || limiter.permit(Instant::now());
        assert_eq!((permit(), permit(), permit(), permit()), (Some(None), Some(None), None, None));
        advance(LOG_WINDOW - Duration::from_millis(1)).await;
        assert_eq!(permit(), None);
        advance(Duration::from_millis(1)).await;
        assert_eq!((permit(), permit(), permit()), (Some(Some(3)), Some(None), None));
    }
}
