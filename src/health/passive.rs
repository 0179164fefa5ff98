//! Ejects backends whose sessions fail in a row, and takes them back after a trial session that succeeds.
//!
//! Sessions count their failures on the backend (`balance/backend/condition.rs`) and send an outlier event
//! when there are enough in a row; this module decides. An ejected backend gets no sessions for a time that
//! grows with each ejection. Then it gets one session, the *trial session*. If the trial session ends well
//! or stays connected for a second, the ejection ends; if it fails, the next ejection begins. The trial
//! session sends an event at each step. The results of sessions that began before it are ignored.
//!
//! Addresses are ejected one by one. A backend by name gets no sessions when all its addresses are ejected.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::field::display;
use tracing::info;

use super::lines::{self, LineLimiter};
use crate::balance::backend::{Ejection, Target, TrialNumber, TrialProgress};
use crate::balance::pool::Pool;
use crate::balance::snapshot::Member;
use crate::balance::{BackendId, Outlier};
use crate::control::backoff::jittered;

/// The pause between two reviews, however many events come. A review of 10,000 backends takes 0.1 ms.
const REVIEW_PAUSE: Duration = Duration::from_millis(5);
/// The pause while more backends fail than may be ejected, when most reviews change nothing.
const REVIEW_PAUSE_AT_LIMIT: Duration = Duration::from_millis(100);
/// A trial session that has been connected for this time has succeeded: not every backend sends first.
const TRIAL_SUCCEEDS_AFTER: Duration = Duration::from_secs(1);
/// The longest ejection, as a multiple of the first one.
const LONGEST_EJECTION: u32 = 30;

/// The ejections of one pool.
#[derive(Debug)]
pub struct Ejections {
    pool: Arc<Pool>,
    outlier: Outlier,
    published: watch::Receiver<SystemTime>,
    /// Changes when a lookup has changed the addresses of a name.
    readdressed: watch::Receiver<()>,
    records: HashMap<Key, EjectionRecord>,
    next_review: Option<Instant>,
    /// True once it was logged that the limit prevents an ejection, until there is room again.
    logged_limit: bool,
    /// An event that comes before this time is handled at this time.
    ignores_events_until: Instant,
    lines: LineLimiter,
}

/// A backend, and where it has a name, one of its addresses.
type Key = (BackendId, Option<SocketAddr>);

fn key(target: &Target) -> Key {
    (target.backend().id().clone(), target.named_address())
}

/// The ejections of one backend, or of one address of its name.
#[derive(Debug)]
struct EjectionRecord {
    /// Ejections in a row, without a time free of failures in between.
    times: u32,
    /// The length of the last ejection.
    length: Duration,
    /// The end of the ejection; after it, the end of the time without failures that resets `times`.
    until: Instant,
    /// When the record is removed. Each review that finds the backend in the table, and ejected or in its
    /// trial, sets a later time.
    forgotten_at: Instant,
    /// The newest trial session that has connected, and when a review saw that.
    connected: Option<(TrialNumber, Instant)>,
}

/// What a review decides for one address.
enum Verdict {
    Stay,
    Eject,
    Trial,
    TakeBack,
}

impl Ejections {
    /// Ejections of `pool`, without records. [`Self::run`] finds the backends that are ejected already.
    #[must_use]
    pub fn new(pool: Arc<Pool>, outlier: Outlier) -> Self {
        Self {
            published: pool.cell.published(),
            readdressed: pool.cell.readdressed(),
            pool,
            outlier,
            records: HashMap::new(),
            next_review: None,
            logged_limit: false,
            ignores_events_until: Instant::now(),
            lines: LineLimiter::new(),
        }
    }

    /// Ejects backends and takes them back. Never ends.
    pub async fn run(mut self) {
        // After a restart: backends that were ejected before get no sessions, so no event comes from them.
        self.review();
        loop {
            let next_review = self.next_review.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            let event = async {
                sleep_until(self.ignores_events_until).await;
                self.pool.outlier_event().await;
            };
            tokio::select! {
                () = event => {}
                // A member that returns to the table may have been ejected when it left.
                Ok(()) = self.published.changed() => {}
                // An address that a lookup finds again may have been ejected when the name lost it.
                Ok(()) = self.readdressed.changed() => {}
                () = sleep_until(next_review) => {}
            }
            self.review();
            sleep(REVIEW_PAUSE).await;
        }
    }

    fn review(&mut self) {
        let (snapshot, now) = (Arc::clone(&self.pool.cell.load()), Instant::now());
        let wanted = || snapshot.picked_from().iter().filter(|member| member.wants_sessions());
        let addresses = |member: &Member| Target::all_of(&member.backend).count().max(1);
        let most = wanted().map(addresses).sum::<usize>() * self.outlier.max_ejected_percent as usize / 100;
        // Addresses that are unusable for any reason count, since the limit protects what is left.
        let out_of = |member: &Member| {
            let out =
                Target::all_of(&member.backend).filter(|target| !target.condition().is_usable()).count();
            if member.backend.is_reachable() { out } else { 1 }
        };
        let mut out = wanted().map(out_of).sum::<usize>();
        let mut changed = false;
        self.next_review = None;
        if out < most {
            self.logged_limit = false;
        }
        for member in snapshot.members_and_stand_ins() {
            for target in Target::all_of(&member.backend) {
                // An ejection adds to `out` only if the address was usable.
                let counts = member.wants_sessions() && target.condition().is_usable();
                match self.decide(member, &target, now) {
                    Verdict::Stay => continue,
                    Verdict::Eject if counts && out >= most => {
                        self.refuse_ejection(&target);
                        continue;
                    }
                    Verdict::Eject => {
                        out += usize::from(counts);
                        self.eject(&target);
                    }
                    Verdict::Trial => target.condition().set_ejection(Ejection::Trial),
                    Verdict::TakeBack => self.take_back(&target),
                }
                changed = true;
            }
        }
        // Removes the records that are reset, and those of members that left long ago while ejected.
        self.records.retain(|_, record| record.forgotten_at > now);
        if changed {
            self.pool.cell.refresh();
        }
    }

    fn decide(&mut self, member: &Member, target: &Target, now: Instant) -> Verdict {
        let condition = target.condition();
        match condition.ejection() {
            Ejection::None => {
                let row = condition.failures(target.reached());
                if row >= self.outlier.consecutive_failures.get() { Verdict::Eject } else { Verdict::Stay }
            }
            Ejection::Ejected => {
                let until = self.record(target, now).until;
                if until > now {
                    self.review_at(until);
                    return Verdict::Stay;
                }
                // A target whose checks fail gets no trial session: the ejection ends when checks make it
                // healthy again. A member in drain or maint is reviewed again with the next table.
                let is_over = member.wants_sessions() && !condition.fails_checks();
                if is_over { Verdict::Trial } else { Verdict::Stay }
            }
            Ejection::Trial => {
                let record = self.record(target, now);
                let (number, progress) = condition.trial();
                match progress {
                    TrialProgress::Failed => Verdict::Eject,
                    _ if condition.fails_checks() => Verdict::Stay,
                    TrialProgress::Wanted | TrialProgress::Begun => Verdict::Stay,
                    TrialProgress::Succeeded => Verdict::TakeBack,
                    TrialProgress::Connected => {
                        let seen = record.connected.filter(|(of, _)| *of == number);
                        let (_, since) = *record.connected.insert(seen.unwrap_or((number, now)));
                        if now - since >= TRIAL_SUCCEEDS_AFTER {
                            return Verdict::TakeBack;
                        }
                        self.review_at(since + TRIAL_SUCCEEDS_AFTER);
                        Verdict::Stay
                    }
                }
            }
        }
    }

    /// Returns the record of an ejected member, and makes it where there is none. A record is kept while the
    /// member is in the table, and for the longest ejection after that.
    fn record(&mut self, target: &Target, now: Instant) -> &mut EjectionRecord {
        let longest = self.outlier.ejection * LONGEST_EJECTION;
        // A member that returned after a long time has no record any more.
        let first = || EjectionRecord {
            times: 1,
            length: self.outlier.ejection,
            until: now,
            forgotten_at: now,
            connected: None,
        };
        let record = self.records.entry(key(target)).or_insert_with(first);
        record.forgotten_at = record.until.max(now) + longest;
        record
    }

    fn review_at(&mut self, at: Instant) {
        self.next_review = Some(self.next_review.map_or(at, |next| next.min(at)));
    }

    fn eject(&mut self, target: &Target) {
        let (now, condition, key) = (Instant::now(), target.condition(), key(target));
        let failures = condition.failures(target.reached());
        let again = condition.ejection() == Ejection::Trial;
        let forgiven = |record: &EjectionRecord| !again && record.until <= now;
        let times = match self.records.get(&key) {
            Some(record) if !forgiven(record) => record.times + 1,
            _ => 1,
        };
        let length = jittered(self.outlier.ejection * times.min(LONGEST_EJECTION));
        let until = now + length;
        let forgotten_at = until + self.outlier.ejection * LONGEST_EJECTION;
        self.records.insert(key, EjectionRecord { times, length, until, forgotten_at, connected: None });
        self.review_at(until);
        condition.set_ejection(Ejection::Ejected);
        target.backend().condition.ejections.add(1);
        if self.lines.allow(&self.pool.name) {
            lines::ejected(&self.pool.name, target, again, failures, times, length);
        }
    }

    fn take_back(&mut self, target: &Target) {
        let now = Instant::now();
        if let Some(record) = self.records.get_mut(&key(target)) {
            record.until = now + record.length;
            record.forgotten_at = record.until;
        }
        let backend = target.backend();
        let was_out = !backend.is_usable();
        target.condition().set_ejection(Ejection::None);
        // A name that was usable by its other addresses keeps its full weight.
        if was_out {
            backend.condition.begin_ramp(now);
        }
        if self.lines.allow(&self.pool.name) {
            let (pool, backend) = (&*self.pool.name, target.backend().id());
            let address = target.address_of_several().map(display);
            info!(pool, %backend, address, "backend is back: a trial session succeeded");
        }
    }

    fn refuse_ejection(&mut self, target: &Target) {
        self.ignores_events_until = Instant::now() + REVIEW_PAUSE_AT_LIMIT;
        let failures = target.condition().failures(target.reached());
        // Starts the count of failures again, or each review would come to the same result.
        target.condition().set_ejection(Ejection::None);
        if !std::mem::replace(&mut self.logged_limit, true) {
            let most = self.outlier.max_ejected_percent;
            lines::not_ejected(&self.pool.name, target, failures, most);
        }
    }
}

#[cfg(test)]
mod tests;
