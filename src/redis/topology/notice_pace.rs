//! How soon a server is asked again when it announces that something may have changed.
//!
//! A message usually means news, so the question follows at once. Where messages keep coming without news
//! (from a sentinel that watches a thousand masters, or about a slot that no node serves), the rest grows
//! until questions are as rare as without messages.

use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

/// The shortest rest between two questions.
const SHORTEST_REST: Duration = Duration::from_millis(20);

/// The rests between the questions to one server.
#[derive(Debug)]
pub(super) struct NoticePace {
    rest: Duration,
    longest: Duration,
}

impl NoticePace {
    /// The rest between questions grows up to `longest` while messages come without news.
    pub(super) fn new(longest: Duration) -> Self {
        Self { rest: SHORTEST_REST.min(longest), longest }
    }

    /// Rests after a question, then waits for a message, until `next` at the latest. `is_news`: the last
    /// answer differed from the one before.
    pub(super) async fn wait(&mut self, is_news: bool, next: Instant, messages: &Notify) {
        if is_news {
            self.rest = SHORTEST_REST.min(self.longest);
        }
        sleep(self.rest).await;
        let left = next.saturating_duration_since(Instant::now());
        let came = timeout(left, messages.notified()).await.is_ok();
        self.rest = if came { (self.rest * 2).min(self.longest) } else { SHORTEST_REST.min(self.longest) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn messages_without_news_are_heeded_ever_less_often_and_news_at_once_again() {
        let (messages, interval) = (Notify::new(), Duration::from_millis(500));
        let mut pace = NoticePace::new(interval);
        let mut rests = Vec::new();
        for is_news in [false, false, false, false, false, false, false, true, false] {
            messages.notify_one();
            let begun = Instant::now();
            pace.wait(is_news, begun + interval, &messages).await;
            rests.push(begun.elapsed().as_millis());
        }
        assert_eq!(rests, [20, 40, 80, 160, 320, 500, 500, 20, 40]);
        let begun = Instant::now();
        pace.wait(false, begun + interval, &messages).await;
        assert_eq!(begun.elapsed(), interval, "without a message");
        messages.notify_one();
        let begun = Instant::now();
        pace.wait(false, begun + interval, &messages).await;
        assert_eq!(begun.elapsed(), SHORTEST_REST);
    }
}
