//! How often one thing may be said in the log.

use std::time::Duration;

use tokio::time::Instant;

/// A writer that flips between a good table and a bad one makes thousands of changes a second, each of them news.
pub const LOG_WINDOW: Duration = Duration::from_secs(10);

/// Allows so many lines in each [`LOG_WINDOW`], and counts the others. What is held back is not lost: whoever asks
/// compares with what was last *said*, so a later read says where it ended.
#[derive(Clone, Debug)]
pub struct Pace {
    most: u32,
    said: u32,
    window_ends: Option<Instant>,
    held_back: u64,
}

impl Pace {
    /// So many lines in a window.
    #[must_use]
    pub fn new(most: u32) -> Self {
        Self { most, said: 0, window_ends: None, held_back: 0 }
    }

    /// `None`: not now. Otherwise what was held back since the last time, for the line.
    pub fn may_say(&mut self, now: Instant) -> Option<HeldBack> {
        if self.window_ends.is_none_or(|ends| ends <= now) {
            (self.window_ends, self.said) = (Some(now + LOG_WINDOW), 0);
        }
        if self.said >= self.most {
            self.held_back += 1;
            return None;
        }
        self.said += 1;
        Some(Some(std::mem::take(&mut self.held_back)).filter(|count| *count > 0))
    }
}

/// How many lines were not written; a field of a log line that is left out where there are none.
pub type HeldBack = Option<u64>;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn a_window_has_its_lines_and_the_next_one_tells_what_was_held_back() {
        let mut pace = Pace::new(2);
        let mut says = || pace.may_say(Instant::now());
        assert_eq!((says(), says(), says(), says()), (Some(None), Some(None), None, None));
        advance(LOG_WINDOW - Duration::from_millis(1)).await;
        assert_eq!(says(), None);
        advance(Duration::from_millis(1)).await;
        assert_eq!((says(), says(), says()), (Some(Some(3)), Some(None), None));
    }
}
