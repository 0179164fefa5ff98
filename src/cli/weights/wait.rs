//! Waits until every proxy that is alive has applied a table.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Failure;
use crate::redis::weights::{Done, Ledger, Report, WeightsError};

/// Between two looks: a proxy reports within 50 ms of a change.
const LOOK: Duration = Duration::from_millis(50);
/// Named in a message.
const MOST_NAMED: usize = 20;

/// Who has it, and who has not.
pub(super) struct Fleet {
    pub(super) have: Vec<String>,
    pub(super) have_not: Vec<String>,
    limit: Duration,
}

impl Fleet {
    /// Somebody has it, and nobody has not: where no proxy reports, nothing is known.
    pub(super) fn has_converged(&self) -> bool {
        self.have_not.is_empty() && !self.have.is_empty()
    }

    /// For a person, who must know that the change itself was made.
    pub(super) fn not_converged(&self, version: u64) -> String {
        let limit = humantime::format_duration(self.limit);
        if self.have.is_empty() && self.have_not.is_empty() {
            return format!(
                "version {version} is written, but no proxy reports within {limit} what it has applied: is one running, and may \
                 it write to redis? its log tells"
            );
        }
        let all = self.have.len() + self.have_not.len();
        let named = self.have_not.iter().take(MOST_NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if self.have_not.len() > MOST_NAMED { ", …" } else { "" };
        format!(
            "version {version} is written, but {} of {all} proxies have not applied it within {limit}: {named}{more}",
            self.have_not.len()
        )
    }
}

/// Returns as soon as all have applied what was `done`, at the latest after `limit`.
pub(super) async fn for_fleet(ledger: &mut Ledger, done: &Done, limit: Duration) -> Result<Fleet, Failure> {
    let (begun, hash) = (Instant::now(), done.hash());
    loop {
        let reports = ledger.applied().await.map_err(|error| {
            let text = format!("version {} is written, but who has it is not known: {error}", done.version);
            match error {
                WeightsError::Unreachable(_) => Failure::Unreachable(text),
                WeightsError::Refused(_) => Failure::Failed(text),
            }
        })?;
        let (have, have_not): (Vec<_>, Vec<_>) = reports.into_iter().partition(|report| report.hash == hash);
        let names = |reports: Vec<Report>| reports.into_iter().map(|report| report.proxy).collect();
        let fleet = Fleet { have: names(have), have_not: names(have_not), limit };
        if fleet.has_converged() || begun.elapsed() >= limit {
            return Ok(fleet);
        }
        sleep(LOOK).await;
    }
}
