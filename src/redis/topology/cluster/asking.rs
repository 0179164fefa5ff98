//! Asks one node of a cluster for the owners of the pools' slots, again and again.
//!
//! A whole view names every range of slots: 16,384 ranges make 2 MB, which the node has to write and the
//! proxy to read. So after a large view the node is asked twice a heartbeat about the pools' own slots
//! alone (`view::glance`). The whole view is asked for again only where a slot has another owner, or after
//! a rest in proportion to the view's size.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::view::{self, Answer, Glance, View};
use crate::config::{Redis, RedisAddress};
use crate::control::backoff::jittered;
use crate::redis::topology::notice_pace::NoticePace;
use crate::redis::topology::slot::slot_of;
use crate::redis::wire::connection;
use crate::redis::wire::error::RedisError;

/// The rest after a whole view, for each range in it. To decode a range takes some 5 µs, so seven nodes take
/// less than 1/400 of a core.
const REST_PER_RANGE: Duration = Duration::from_millis(15);
const LONGEST_REST: Duration = Duration::from_secs(300);
/// The rest after a glance, for each slot: without events a node is asked about some thousand slots a
/// second.
const REST_PER_SLOT: Duration = Duration::from_millis(1);
/// The rest after a whole view, as a multiple of the time it took: even if slots change owners again and
/// again, whole views take about a fifth of the time.
const REST_PER_WHOLE: u32 = 4;
/// The rest after an answer that was too large, which has ended the connection.
const REST_AFTER_TOO_LARGE: Duration = Duration::from_secs(30);

/// When a node is asked for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstQuestion {
    AtOnce,
    AfterRest,
}

/// A node that is asked until this value is dropped.
#[derive(Debug)]
pub(super) struct AskedNode {
    pub(super) address: RedisAddress,
    /// `None` before the node's first answer.
    pub(super) answer: Option<Answer>,
    pub(super) ask_now: Arc<Notify>,
    _listener: JoinSet<()>,
}

impl AskedNode {
    pub(super) fn view(&self) -> Option<&View> {
        self.answer.as_ref()?.as_ref().ok()
    }
}

/// What the questions to all nodes have in common.
#[derive(Clone, Debug)]
pub(super) struct Asking {
    settings: Arc<Redis>,
    /// The slots of the pools' keys.
    slots: Arc<[u16]>,
    /// One key for each slot.
    keys: Arc<[String]>,
    heard: mpsc::Sender<(RedisAddress, Answer)>,
}

/// When the whole view of one node is asked for.
#[derive(Debug, Default)]
struct WholeView {
    /// The glance taken just before the last whole view.
    glance: Option<Glance>,
    /// When the next whole view is due, whatever a glance shows.
    next: Option<Instant>,
    /// No whole view is asked for before this time.
    not_before: Option<Instant>,
    /// The last whole view was so small that a whole view is asked for each time.
    is_small: bool,
}

impl WholeView {
    /// True where the whole view is to be asked for now.
    fn is_wanted(&self, glance: Option<&Glance>, now: Instant) -> bool {
        let is_due = self.next.is_none_or(|next| next <= now);
        // Without the right to a glance, every round may bring a change.
        let is_changed = glance.is_none_or(|glance| self.glance.as_ref() != Some(glance));
        self.not_before.is_none_or(|not_before| not_before <= now) && (self.is_small || is_due || is_changed)
    }

    /// Records a whole view with so many `ranges`, which `took` so long. `glance` was taken before it;
    /// `interval` is the time between two questions.
    fn came(&mut self, ranges: usize, took: Duration, glance: Option<Glance>, interval: Duration) {
        let ranges = u32::try_from(ranges).unwrap_or(u32::MAX);
        let rest = REST_PER_RANGE.saturating_mul(ranges).min(LONGEST_REST);
        let now = Instant::now();
        self.is_small = rest <= interval;
        self.next = Some(now + jittered(rest));
        self.not_before = (!self.is_small).then(|| now + (took * REST_PER_WHOLE).min(rest));
        self.glance = glance;
    }
}

impl Asking {
    pub(super) fn about(
        settings: &Arc<Redis>,
        keys: &[&str],
        heard: mpsc::Sender<(RedisAddress, Answer)>,
    ) -> Self {
        let (mut slots, mut key_of_each) = (Vec::new(), Vec::new());
        for key in keys {
            let slot = slot_of(key);
            if !slots.contains(&slot) {
                slots.push(slot);
                key_of_each.push((*key).to_owned());
            }
        }
        Self { settings: Arc::clone(settings), slots: slots.into(), keys: key_of_each.into(), heard }
    }

    /// Asks the node at `address` from now on, until the result is dropped.
    pub(super) fn ask(&self, address: RedisAddress, first: FirstQuestion) -> AskedNode {
        let ask_now = Arc::new(Notify::new());
        let mut listener = JoinSet::new();
        listener.spawn(self.clone().ask_for_ever(address.clone(), first, Arc::clone(&ask_now)));
        AskedNode { address, answer: None, ask_now, _listener: listener }
    }

    async fn ask_for_ever(self, node: RedisAddress, first: FirstQuestion, ask_now: Arc<Notify>) {
        let mut pace = NoticePace::new(self.interval());
        if first == FirstQuestion::AfterRest {
            pace.wait(false, self.next(Instant::now()), &ask_now).await;
        }
        loop {
            let Err(error) = self.keep_asking(&node, &ask_now).await;
            debug!(%node, %error, "a node of the cluster does not answer");
            let is_too_large = error.is_too_large();
            if self.heard.send((node.clone(), Err(error))).await.is_err() {
                return;
            }
            if is_too_large {
                sleep(jittered(REST_AFTER_TOO_LARGE)).await;
            }
            pace.wait(false, self.next(Instant::now()), &ask_now).await;
        }
    }

    async fn keep_asking(
        &self,
        node: &RedisAddress,
        ask_now: &Arc<Notify>,
    ) -> Result<Infallible, RedisError> {
        let on_push = {
            let ask_now = Arc::clone(ask_now);
            // Only the end of the connection is pushed: the next question shows that.
            move |_| ask_now.notify_one()
        };
        let mut connection = connection::open(&self.settings, node, on_push).await?;
        let (mut last, mut whole, mut pace) = (None, WholeView::default(), NoticePace::new(self.interval()));
        loop {
            let asked = Instant::now();
            // Taken before the whole view: a change between the two is found by the next glance.
            let glance =
                if whole.is_small { None } else { view::glance(&mut connection, &self.keys).await? };
            let mut is_news = false;
            if whole.is_wanted(glance.as_ref(), asked) {
                let begun = Instant::now();
                let (view, ranges) = view::ask(&mut connection, node, &self.slots).await?;
                whole.came(ranges, begun.elapsed(), glance, self.interval());
                is_news = last.as_ref() != Some(&view);
                if is_news {
                    last = Some(view.clone());
                    if self.heard.send((node.clone(), Ok(view))).await.is_err() {
                        return std::future::pending().await;
                    }
                }
            }
            pace.wait(is_news, self.next(asked), ask_now).await;
        }
    }

    fn interval(&self) -> Duration {
        let slots = u32::try_from(self.keys.len()).unwrap_or(u32::MAX);
        (self.settings.heartbeat_interval / 2).max(REST_PER_SLOT.saturating_mul(slots))
    }

    /// Returns when to ask next: twice a heartbeat, so that a change without an event is known within one;
    /// less often where there are more slots than [`REST_PER_SLOT`] allows. Jittered, so that the proxies
    /// of a fleet do not ask at the same moment.
    fn next(&self, asked: Instant) -> Instant {
        asked + jittered(self.interval())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_large_answer_is_asked_for_again_after_a_change_or_a_rest_by_its_size_alone() {
        let interval = Duration::from_millis(500);
        let glance = |to: &str| Some(Glance::of([to]));
        let mut whole = WholeView::default();
        assert!(whole.is_wanted(glance("a").as_ref(), Instant::now()), "the first");
        whole.came(2_000, Duration::from_millis(10), glance("a"), interval);
        let mut wholes = 0;
        for _ in 0..600 {
            tokio::time::advance(interval).await;
            if whole.is_wanted(glance("a").as_ref(), Instant::now()) {
                wholes += 1;
                whole.came(2_000, Duration::from_millis(10), glance("a"), interval);
            }
        }
        assert!((10..=13).contains(&wholes), "{wholes} in five minutes");
        assert!(whole.is_wanted(glance("b").as_ref(), Instant::now()), "a slot has moved");
        whole.came(2_000, Duration::from_millis(10), glance("b"), interval);
        assert!(!whole.is_wanted(glance("a").as_ref(), Instant::now()), "nor again at once");
        tokio::time::advance(Duration::from_millis(40)).await;
        assert!(whole.is_wanted(glance("a").as_ref(), Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_answer_is_asked_for_each_time() {
        let mut whole = WholeView::default();
        whole.came(3, Duration::from_millis(400), None, Duration::from_millis(500));
        assert!(whole.is_small && whole.is_wanted(None, Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn without_the_right_to_a_glance_large_answers_take_a_fifth_of_the_time() {
        let mut whole = WholeView::default();
        whole.came(16_384, Duration::from_millis(100), None, Duration::from_millis(500));
        tokio::time::advance(Duration::from_millis(399)).await;
        assert!(!whole.is_wanted(None, Instant::now()));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(whole.is_wanted(None, Instant::now()));
    }
}
