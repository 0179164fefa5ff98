//! How long events wait after reads that found nothing new.
//!
//! An event may be caused by a read: Redis publishes `keymiss` where it is told to, and a full tracking
//! table invalidates keys that were just read. A tool may also write the same values again and again. So
//! each read that an event caused and that found nothing new doubles the rest before the next event of
//! that kind is answered, up to a limit. A loop "event, read, event" then costs no more than polling. A read
//! that finds something new ends the rest, and the rest gets shorter while no events come. The first change
//! after a quiet time is read at once.
//!
//! Each kind of event has a rest of its own: a full tracking table must not delay what a notification
//! announces.

use std::time::Duration;

use tokio::time::Instant;

use super::changes::{Cause, Causes};
use crate::control::backoff::jittered;
use crate::redis::status::WatchMode;

/// The rest after the first read that found nothing new. It is short, since two events of one change may
/// arrive apart.
const FIRST: Duration = Duration::from_millis(1);
/// The longest rest, except for invalidations in the mode `Notifications`. With it, a loop costs what
/// polling costs with the default `poll_interval`.
const LONGEST: Duration = Duration::from_secs(1);

/// The longest rest of each kind of event, which depends on the watch mode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Longest {
    heartbeat: Duration,
    resync: Duration,
    mode: WatchMode,
}

impl Longest {
    /// Takes the intervals of the config. Heartbeats do not confirm a pool that rests with a sign of a
    /// change, so such a rest is at most `heartbeat_interval`.
    pub(super) fn new(heartbeat_interval: Duration, resync_interval: Duration) -> Self {
        let heartbeat = heartbeat_interval.min(LONGEST);
        Self { heartbeat, resync: resync_interval.max(heartbeat), mode: WatchMode::None }
    }

    /// Returns the longest rest for `cause`. While notifications work, tracking is needed only for changes
    /// made after notifications were switched off, and the next full read finds these changes too.
    fn of(self, cause: Cause) -> Duration {
        let longest = match cause {
            Cause::Invalidated if self.mode == WatchMode::Notifications => self.resync,
            _ => self.heartbeat,
        };
        longest.max(FIRST)
    }

    /// Sets the watch mode. Returns true if it has changed.
    pub(super) fn set_mode(&mut self, mode: WatchMode) -> bool {
        std::mem::replace(&mut self.mode, mode) != mode
    }

    /// Returns the interval of full reads, or `heartbeat` if that is longer.
    pub(super) fn resync(self) -> Duration {
        self.resync
    }

    /// Returns true if one of `causes` is a sign that the table has changed in Redis. An invalidation is
    /// none while notifications work, and `Due` is none.
    pub(super) fn tells_of_a_change(self, causes: Causes) -> bool {
        let told =
            [Cause::Missed, Cause::Notified, Cause::Flushed].into_iter().any(|cause| causes.has(cause));
        told || causes.has(Cause::Invalidated) && self.mode != WatchMode::Notifications
    }
}

/// The rests of one pool, one for each kind of event.
#[derive(Clone, Debug, Default)]
pub(super) struct EventRests {
    notified: EventRest,
    invalidated: EventRest,
    flushed: EventRest,
}

impl EventRests {
    /// Returns when the event rests permit to read a pool that is marked for `causes`. `None` means now.
    pub(super) fn end_for(&self, causes: Causes) -> Option<Instant> {
        if causes.has(Cause::Missed) || causes.has(Cause::Due) {
            return None;
        }
        let ends = Cause::EVENTS.into_iter().filter(|cause| causes.has(*cause)).map(|cause| match cause {
            Cause::Notified => self.notified.ends,
            Cause::Invalidated => self.invalidated.ends,
            _ => self.flushed.ends,
        });
        // `None` is less than any time, so one cause without a rest is enough.
        ends.min().flatten()
    }

    /// Lengthens the rests of `causes`, after a read that found nothing new.
    pub(super) fn found_nothing(&mut self, causes: Causes, longest: Longest) {
        let now = Instant::now();
        for (cause, rest) in self.each() {
            if causes.has(cause) {
                rest.grow(now, longest.of(cause));
            }
        }
    }

    /// Ends the rests of `causes`, after a read that found something new. If a notification announced the
    /// change, the rest of invalidations stays: they may still be a loop.
    pub(super) fn found_news(&mut self, causes: Causes) {
        for (cause, rest) in self.each() {
            let has_told = causes.has(cause) && (cause != Cause::Invalidated || !causes.has(Cause::Notified));
            if has_told {
                *rest = EventRest::default();
            }
        }
    }

    fn each(&mut self) -> [(Cause, &mut EventRest); 3] {
        [
            (Cause::Notified, &mut self.notified),
            (Cause::Invalidated, &mut self.invalidated),
            (Cause::Flushed, &mut self.flushed),
        ]
    }
}

#[derive(Clone, Debug, Default)]
struct EventRest {
    length: Duration,
    ends: Option<Instant>,
}

impl EventRest {
    /// Begins a rest of twice the last one. For each `longest` that has passed since the last rest ended,
    /// the last rest counts half.
    fn grow(&mut self, now: Instant, longest: Duration) {
        let quiet = self.ends.map_or(Duration::ZERO, |ends| now.saturating_duration_since(ends));
        let left = 0.5_f64.powf(quiet.as_secs_f64() / longest.as_secs_f64());
        self.length = (self.length.mul_f64(left) * 2).max(FIRST).min(longest);
        // Jittered, so that the proxies of a fleet do not read at the same moment.
        self.ends = Some(now + jittered(self.length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, sleep_until};

    const HEARTBEAT: Duration = Duration::from_secs(1);
    const RESYNC: Duration = Duration::from_secs(15);
    const HOUR: Duration = Duration::from_secs(3_600);

    fn longest(mode: WatchMode) -> Longest {
        let mut longest = Longest::new(HEARTBEAT, RESYNC);
        longest.set_mode(mode);
        longest
    }

    /// How many reads a loop "event, read that finds nothing new, event" causes within `time`.
    async fn reads_of_a_loop(rests: &mut EventRests, cause: Cause, mode: WatchMode, time: Duration) -> u32 {
        let (end, mut reads) = (Instant::now() + time, 0);
        while Instant::now() < end {
            if let Some(rest) = rests.end_for(cause.into()) {
                sleep_until(rest).await;
            }
            rests.found_nothing(cause.into(), longest(mode));
            reads += 1;
            advance(Duration::from_micros(100)).await;
        }
        reads
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_of_event_and_read_costs_no_more_than_polling_does() {
        for cause in Cause::EVENTS {
            let reads = reads_of_a_loop(&mut EventRests::default(), cause, WatchMode::Tracking, HOUR).await;
            // 10 while the rest grows, and at most one each 0.8 s from then on.
            assert!((3_600..=4_520).contains(&reads), "{cause:?}: {reads} reads an hour");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn where_notifications_come_a_loop_of_invalidations_costs_no_more_than_full_reads_do() {
        let mut rests = EventRests::default();
        let reads = reads_of_a_loop(&mut rests, Cause::Invalidated, WatchMode::Notifications, HOUR).await;
        assert!((240..=320).contains(&reads), "{reads} reads an hour");
        assert_eq!(rests.end_for(Cause::Notified.into()), None, "a notification is read at once");
        let both = Causes::from(Cause::Notified).with(Cause::Invalidated);
        assert_eq!(rests.end_for(both), None);
        // The invalidation that comes with an announced change is no sign that the loop has ended.
        rests.found_news(both);
        assert!(rests.end_for(Cause::Invalidated.into()) > Some(Instant::now() + RESYNC / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_ends_with_news_and_fades_in_quiet_time() {
        let mut rests = EventRests::default();
        let (tracking, invalidated) = (WatchMode::Tracking, Cause::Invalidated.into());
        reads_of_a_loop(&mut rests, Cause::Invalidated, tracking, HOUR).await;
        assert!(rests.end_for(invalidated) > Some(Instant::now() + HEARTBEAT / 2));
        rests.found_news(invalidated);
        assert_eq!(rests.end_for(invalidated), None);

        reads_of_a_loop(&mut rests, Cause::Invalidated, tracking, HOUR).await;
        advance(HEARTBEAT * 12).await;
        let quiet = Instant::now();
        assert!(
            rests.end_for(invalidated) < Some(quiet),
            "the first event after a quiet time is read at once"
        );
        rests.found_nothing(invalidated, longest(tracking));
        assert!(rests.end_for(invalidated) <= Some(quiet + FIRST), "and begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn a_forced_read_neither_rests_nor_lengthens_the_rest() {
        let mut rests = EventRests::default();
        for cause in [Cause::Due, Cause::Missed] {
            rests.found_nothing(cause.into(), longest(WatchMode::Tracking));
        }
        assert!(Cause::EVENTS.into_iter().all(|cause| rests.end_for(cause.into()).is_none()));
        reads_of_a_loop(&mut rests, Cause::Notified, WatchMode::Notifications, HEARTBEAT * 60).await;
        let notified = Causes::from(Cause::Notified);
        assert!(rests.end_for(notified).is_some());
        assert_eq!(rests.end_for(notified.with(Cause::Due)), None);
        assert_eq!(rests.end_for(notified.with(Cause::Missed)), None);
    }
}
