//! Answers scrapes of the metrics at a bounded cost, however many come at once.
//!
//! At most one text of each format is encoded at a time. Scrapes that come meanwhile wait for that text and
//! share it. Scrapes within the next second share it too if it is large. A small text is encoded for each
//! scrape, which takes a few milliseconds at most and shows the newest numbers.
//!
//! A text is encoded on a thread of its own, or on the control thread if the system gives no thread.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use axum::body::Bytes;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, sleep, timeout};

use crate::control::blocking;
use crate::metrics::format::Format;

/// How long a scrape waits for its text: Prometheus's default timeout.
const WAIT: Duration = Duration::from_secs(10);
const SHARED_FOR: Duration = Duration::from_secs(1);
/// The size from which a text is shared: about 250 backends with traffic, which take 2 to 3 ms to encode.
const SHARED_FROM_BYTES: usize = 256 * 1024;

/// Permits for threads that encode: one for each format.
static ENCODERS: Semaphore = Semaphore::const_new(2);

/// Why a scrape has no text.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScrapeError {
    /// The text was not ready within [`WAIT`].
    #[error("the metrics were not encoded within {} s", WAIT.as_secs())]
    TooSlow,
    /// The encoder panicked.
    #[error("the metrics could not be encoded")]
    Failed,
}

/// Encodes the metrics in a format. The number is a guess of the text's length in bytes.
type Encode = dyn Fn(Format, usize) -> String + Send + Sync;

/// The scrapes of one proxy, and the texts that they share.
pub(super) struct Scrapes {
    encode: Box<Encode>,
    /// The newest text of each format, in the order of [`Format::ALL`].
    newest: [Arc<Mutex<Option<Text>>>; Format::ALL.len()],
    /// The length of the last text in bytes, as a guess for the next one.
    size: AtomicUsize,
    shared_for: Duration,
}

struct Text {
    bytes: Bytes,
    ended: Instant,
}

impl fmt::Debug for Scrapes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrapes(…)")
    }
}

impl Scrapes {
    pub(super) fn new(encode: impl Fn(Format, usize) -> String + Send + Sync + 'static) -> Arc<Self> {
        Self::sharing_for(SHARED_FOR, encode)
    }

    fn sharing_for(
        shared_for: Duration,
        encode: impl Fn(Format, usize) -> String + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            encode: Box::new(encode),
            newest: Default::default(),
            size: AtomicUsize::new(0),
            shared_for,
        })
    }

    /// Returns the metrics in `format`.
    ///
    /// # Errors
    /// There is no text within 10 s, or the encoder panicked.
    ///
    /// # Cancel safety
    /// A text that is being encoded is finished for the other scrapes.
    pub(super) async fn text(self: &Arc<Self>, format: Format) -> Result<Bytes, ScrapeError> {
        timeout(WAIT, self.text_in_time(format)).await.unwrap_or(Err(ScrapeError::TooSlow))
    }

    async fn text_in_time(self: &Arc<Self>, format: Format) -> Result<Bytes, ScrapeError> {
        let asked = Instant::now();
        let newest = &self.newest[format as usize];
        let mut slot = Arc::clone(newest).lock_owned().await;
        if let Some(text) = slot.as_ref().filter(|text| self.may_share(text, asked)) {
            return Ok(text.bytes.clone());
        }
        *slot = None;
        let scrapes = Arc::clone(self);
        // The thread holds the lock until it has the text, even if this scrape is cancelled.
        let encoding = blocking::compute(&ENCODERS, move || {
            let text = (scrapes.encode)(format, scrapes.size.load(Relaxed));
            scrapes.size.store(text.len(), Relaxed);
            *slot = Some(Text { bytes: text.into(), ended: Instant::now() });
        });
        encoding.await.map_err(|_| ScrapeError::Failed)?;
        let made = newest.lock().await;
        let text = made.as_ref().filter(|text| text.ended >= asked).ok_or(ScrapeError::Failed)?;
        if text.bytes.len() >= SHARED_FROM_BYTES {
            tokio::spawn(forget(Arc::clone(newest), text.ended, self.shared_for));
        }
        Ok(text.bytes.clone())
    }

    fn may_share(&self, text: &Text, asked: Instant) -> bool {
        let is_large = text.bytes.len() >= SHARED_FROM_BYTES;
        text.ended >= asked || is_large && text.ended.elapsed() < self.shared_for
    }
}

/// Frees a text once it is not shared any more.
async fn forget(newest: Arc<Mutex<Option<Text>>>, ended: Instant, after: Duration) {
    sleep(after).await;
    newest.lock().await.take_if(|text| text.ended == ended);
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::task::JoinSet;

    use super::*;

    /// Encodes one text for each message on `go_on`, and counts the texts.
    struct Encoder {
        scrapes: Arc<Scrapes>,
        made: Arc<AtomicUsize>,
        at_once: Arc<AtomicUsize>,
        go_on: mpsc::Sender<()>,
    }

    fn encoder(bytes: usize, shared_for: Duration) -> Encoder {
        let (made, at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let may_go_on = std::sync::Mutex::new(may_go_on);
        let (count, most) = (Arc::clone(&made), Arc::clone(&at_once));
        let under_way = AtomicUsize::new(0);
        let scrapes = Scrapes::sharing_for(shared_for, move |_, _| {
            most.fetch_max(under_way.fetch_add(1, Relaxed) + 1, Relaxed);
            may_go_on.lock().expect("no test panics with it").recv().expect("the test goes on");
            under_way.fetch_sub(1, Relaxed);
            count.fetch_add(1, Relaxed);
            "x".repeat(bytes)
        });
        Encoder { scrapes, made, at_once, go_on }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn scrapes_that_come_at_once_share_one_text_of_each_format() {
        let Encoder { scrapes, made, at_once, go_on } = encoder(SHARED_FROM_BYTES, HOUR);
        let mut waiting = JoinSet::new();
        for n in 0..30 {
            let (scrapes, format) = (Arc::clone(&scrapes), Format::ALL[n % 2]);
            waiting.spawn(async move { (format, scrapes.text(format).await.expect("a text")) });
        }
        tokio::task::yield_now().await;
        [(); 30].iter().for_each(|()| go_on.send(()).expect("the encoder lives"));
        let texts = waiting.join_all().await;
        for format in Format::ALL {
            let mut addresses: Vec<_> =
                texts.iter().filter(|text| text.0 == format).map(|text| text.1.as_ptr()).collect();
            assert_eq!(addresses.len(), 15);
            addresses.dedup();
            assert_eq!(addresses.len(), 1, "one text in memory");
        }
        assert_eq!(made.load(Relaxed), 2);
        assert!(at_once.load(Relaxed) <= 2);
    }

    #[tokio::test]
    async fn a_large_text_is_shared_for_a_while_and_a_small_one_is_encoded_each_time() {
        for (bytes, shared_for, expected) in
            [(SHARED_FROM_BYTES, HOUR, 1), (SHARED_FROM_BYTES, Duration::ZERO, 3), (1_000, HOUR, 3)]
        {
            let Encoder { scrapes, made, go_on, .. } = encoder(bytes, shared_for);
            for _ in 0..3 {
                go_on.send(()).expect("the encoder lives");
                assert_eq!(scrapes.text(Format::Classic).await.expect("a text").len(), bytes);
            }
            assert_eq!(made.load(Relaxed), expected, "{bytes} {shared_for:?}");
        }
    }

    #[tokio::test]
    async fn scrapes_that_are_cancelled_start_only_one_encoding() {
        let Encoder { scrapes, made, at_once, go_on } = encoder(SHARED_FROM_BYTES, HOUR);
        for _ in 0..20 {
            let asking = timeout(Duration::from_millis(1), scrapes.text(Format::Classic));
            assert!(asking.await.is_err());
        }
        go_on.send(()).expect("the encoder lives");
        scrapes.text(Format::Classic).await.expect("a text");
        assert_eq!((made.load(Relaxed), at_once.load(Relaxed)), (1, 1));
    }

    #[tokio::test]
    async fn a_text_that_is_not_shared_any_more_is_freed() {
        let Encoder { scrapes, go_on, .. } = encoder(SHARED_FROM_BYTES, Duration::ZERO);
        go_on.send(()).expect("the encoder lives");
        let text = scrapes.text(Format::Classic).await.expect("a text");
        // The test holds one reference. The other one is dropped by `forget`.
        let is_alone = async {
            while !text.is_unique() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(WAIT, is_alone).await.expect("the other reference is dropped");
    }

    #[tokio::test]
    async fn a_panic_while_encoding_fails_only_its_own_scrape() {
        let tries = AtomicUsize::new(0);
        let scrapes = Scrapes::new(move |_, _| {
            assert!(tries.fetch_add(1, Relaxed) > 0, "the first one fails");
            "text".to_owned()
        });
        assert!(matches!(scrapes.text(Format::Classic).await, Err(ScrapeError::Failed)));
        assert_eq!(scrapes.text(Format::Classic).await.expect("a text"), "text");
    }
}
