//! How many lines one pool's health may write: a network that fails takes thousands of backends with it.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

const PERIOD: Duration = Duration::from_secs(10);
const LINES_A_PERIOD: u32 = 100;

/// One pool's allowance.
#[derive(Debug)]
pub(super) struct Lines {
    period: Instant,
    written: u32,
    held_back: u32,
}

impl Lines {
    pub(super) fn new() -> Self {
        Self { period: Instant::now(), written: 0, held_back: 0 }
    }

    /// True if the next line may be written; then it is counted. Says afterwards how many were not.
    pub(super) fn allow(&mut self, pool: &str) -> bool {
        let now = Instant::now();
        if now - self.period >= PERIOD {
            if self.held_back > 0 {
                let changes = self.held_back;
                warn!(
                    pool,
                    changes, "more backends changed than are told one by one: see statera_backend_up"
                );
            }
            *self = Self::new();
        }
        let allowed = self.written < LINES_A_PERIOD;
        if allowed {
            self.written += 1;
        } else {
            self.held_back += 1;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_hundred_lines_in_ten_seconds_are_enough() {
        let mut lines = Lines::new();
        assert_eq!((0..5_000).filter(|_| lines.allow("web")).count(), 100);
        tokio::time::advance(PERIOD).await;
        assert_eq!((lines.allow("web"), lines.held_back), (true, 0));
    }
}
