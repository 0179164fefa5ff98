//! Waits until every proxy that is alive has applied a table.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Failure;
use crate::redis::weights::{Done, Ledger, Report, Reports, WeightsError};

/// The shortest time between two reads of the reports. A proxy reports within 50 ms of a change.
const LOOK: Duration = Duration::from_millis(50);
/// After a slow read, the command waits this many times as long. So it uses at most a fifth of Redis's
/// time, however much Redis has to read.
const REST_PER_READ: u32 = 4;
const LONGEST_REST: Duration = Duration::from_secs(5);
/// How many proxies a message names.
const MOST_NAMED: usize = 20;

/// The proxies that use a version, and those that do not.
pub(super) struct Fleet {
    pub(super) have: Vec<String>,
    pub(super) have_not: Vec<String>,
    /// How long it takes until every running proxy is known. Zero: every running proxy is known.
    pub(super) are_all_in: Duration,
    limit: Duration,
}

impl Fleet {
    /// Returns true if every proxy uses the version, and false if no proxy reports: nothing is known then.
    pub(super) fn has_converged(&self) -> bool {
        self.have_not.is_empty() && !self.have.is_empty() && self.are_all_in.is_zero()
    }

    /// Returns the message for a fleet in which not every proxy is known to use the version. The message
    /// says that the change itself was made.
    pub(super) fn not_converged(&self, version: u64) -> String {
        let limit = humantime::format_duration(self.limit);
        if self.have.is_empty() && self.have_not.is_empty() {
            return format!(
                "version {version} is written, but no proxy reported within {limit} which table it uses: \
                 check that one is running, and see its log for whether it may write to Redis"
            );
        }
        if self.have_not.is_empty() {
            return format!(
                "version {version} is written and {} applied it, but Redis was away or has lost reports, \
                 or a proxy has just come back: it takes another {} until all proxies are known, \
                 so wait longer than {limit}",
                super::show::proxies_have(self.have.len()),
                humantime::format_duration(Duration::from_millis(self.are_all_in.as_millis() as u64))
            );
        }
        let all = self.have.len() + self.have_not.len();
        let named = self.have_not.iter().take(MOST_NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if self.have_not.len() > MOST_NAMED { ", …" } else { "" };
        format!(
            "version {version} is written, but {} of {all} proxies have not applied it within {limit}: \
             {named}{more}",
            self.have_not.len()
        )
    }
}

/// Waits at most `limit` until every proxy uses the table that the change `done` has written.
pub(super) async fn for_fleet(ledger: &mut Ledger, done: &Done, limit: Duration) -> Result<Fleet, Failure> {
    let (begun, hash) = (Instant::now(), done.hash());
    loop {
        let asked = Instant::now();
        let Reports { live, are_all_in } = ledger.applied().await.map_err(|error| {
            let text =
                format!("version {} is written, but which proxies use it is unknown: {error}", done.version);
            match error {
                WeightsError::Unreachable(_) => Failure::Unreachable(text),
                WeightsError::Refused(_) => Failure::Failed(text),
            }
        })?;
        let (have, have_not): (Vec<_>, Vec<_>) = live.into_iter().partition(|report| report.hash == hash);
        let names = |reports: Vec<Report>| reports.into_iter().map(|report| report.proxy).collect();
        let fleet = Fleet { have: names(have), have_not: names(have_not), are_all_in, limit };
        if fleet.has_converged() || begun.elapsed() >= limit {
            return Ok(fleet);
        }
        sleep(rest_after(asked.elapsed(), LOOK).min(limit.saturating_sub(begun.elapsed()))).await;
    }
}

/// Returns how long to wait after a read that took the time `took`. After a fast read this is `shortest`.
pub(super) fn rest_after(took: Duration, shortest: Duration) -> Duration {
    took.saturating_mul(REST_PER_READ).clamp(shortest, LONGEST_REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_read_is_followed_by_a_longer_rest() {
        let rest = |millis| rest_after(Duration::from_millis(millis), LOOK);
        assert_eq!(rest(1), LOOK);
        assert_eq!(rest(100), Duration::from_millis(400));
        assert_eq!(rest(60_000), LONGEST_REST);
    }
}
