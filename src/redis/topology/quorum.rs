//! Decides which server is the primary, where several sentinels or cluster nodes were asked and some may
//! be wrong.
//!
//! Each failover, and each move of a slot, raises an epoch. So a sentinel or node that reports an older
//! epoch has not heard of the change, for example because it was cut off.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::config::RedisAddress;

/// What one sentinel or node reports about the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PrimaryReport {
    /// The epoch of the configuration: each failover raises it.
    pub(super) epoch: u64,
    pub(super) address: RedisAddress,
    /// The sentinel considers the server down. Always false in a report of a cluster node.
    pub(super) is_down: bool,
}

/// The primary that the reports lead to: see [`choose`].
#[derive(Debug, Default)]
pub(super) struct QuorumView {
    current: Option<PrimaryReport>,
}

impl QuorumView {
    /// Updates the primary from the last report of each sentinel or node that is asked; `None` stands for
    /// one without a report. Returns the primary if its address has changed.
    pub(super) fn update(&mut self, reports: &[Option<PrimaryReport>]) -> Option<&RedisAddress> {
        let chosen = choose(reports, self.current.as_ref())?.clone();
        let before = self.current.replace(chosen);
        self.primary().filter(|primary| before.is_none_or(|before| before.address != **primary))
    }

    pub(super) fn primary(&self) -> Option<&RedisAddress> {
        self.current.as_ref().map(|current| &current.address)
    }

    /// Forgets the primary.
    pub(super) fn clear(&mut self) {
        self.current = None;
    }
}

/// Returns the report to follow: one with the newest epoch whose server is not down. `None`: keep
/// `current`.
///
/// If the newest epoch is older than `current`'s, it counts only where a majority answers: then the
/// sentinels or nodes were set up anew. Without that rule, a sentinel or node that was cut off during a
/// failover would lead back to the old primary.
pub(super) fn choose<'a>(
    reports: &'a [Option<PrimaryReport>],
    current: Option<&PrimaryReport>,
) -> Option<&'a PrimaryReport> {
    let answering = reports.iter().flatten().count();
    let newest = reports.iter().flatten().map(|report| report.epoch).max()?;
    if current.is_some_and(|current| newest < current.epoch) && !is_majority(answering, reports.len()) {
        return None;
    }
    let up = || reports.iter().flatten().filter(|report| report.epoch == newest && !report.is_down);
    // Where reports of one epoch differ, the current primary stays, so that it does not alternate.
    up().find(|report| current.is_some_and(|current| current.address == report.address))
        .or_else(|| up().next())
}

pub(super) fn is_majority(some: usize, all: usize) -> bool {
    some * 2 > all
}

/// Passes answers to `hear` until `hear` returns true, for at most `limit`. One answer is not enough,
/// because it may come from a sentinel or node that was cut off.
pub(super) async fn first_answers<T>(
    answers: &mut mpsc::Receiver<T>,
    limit: Duration,
    mut hear: impl FnMut(T) -> bool,
) {
    let enough = async {
        while let Some(answer) = answers.recv().await {
            if hear(answer) {
                return;
            }
        }
    };
    // Without enough answers the caller goes on with those that came.
    let _ = timeout(limit, enough).await;
}

/// A condition whose changes are logged.
#[derive(Debug, Default)]
pub(super) struct Condition(bool);

impl Condition {
    /// Returns true if `is` differs from the last value. The first value is compared with false.
    pub(super) fn changes_to(&mut self, is: bool) -> bool {
        std::mem::replace(&mut self.0, is) != is
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(epoch: u64, port: u16) -> Option<PrimaryReport> {
        let address = RedisAddress::Tcp { host: "10.0.0.1".into(), port };
        Some(PrimaryReport { epoch, address, is_down: false })
    }

    fn down(epoch: u64, port: u16) -> Option<PrimaryReport> {
        report(epoch, port).map(|report| PrimaryReport { is_down: true, ..report })
    }

    #[track_caller]
    fn chosen(reports: &[Option<PrimaryReport>], current: Option<PrimaryReport>) -> Option<u16> {
        choose(reports, current.as_ref()).map(|report| match report.address {
            RedisAddress::Tcp { port, .. } => port,
            _ => panic!("{report:?}"),
        })
    }

    #[test]
    fn the_newest_epoch_wins_and_a_server_that_is_down_is_not_chosen() {
        assert_eq!(chosen(&[report(1, 1), report(2, 2), report(1, 1)], report(1, 1)), Some(2));
        assert_eq!(chosen(&[down(1, 1), down(1, 1), None], report(1, 1)), None);
        assert_eq!(chosen(&[down(1, 1), report(1, 1), None], None), Some(1));
        assert_eq!(chosen(&[None, None, None], report(1, 1)), None);
        // The newest is down: the old primary, which one sentinel still reports, is not chosen instead.
        assert_eq!(chosen(&[down(2, 2), report(1, 1), down(2, 2)], report(2, 2)), None);
    }

    #[test]
    fn one_sentinel_that_was_cut_off_does_not_lead_back() {
        assert_eq!(chosen(&[report(1, 1), None, None], report(2, 2)), None);
        assert_eq!(chosen(&[report(1, 1), report(2, 2), None], report(2, 2)), Some(2));
        // Sentinels that are set up anew count from the beginning.
        assert_eq!(chosen(&[report(0, 3), report(0, 3), None], report(2, 2)), Some(3));
    }

    #[test]
    fn two_reports_of_one_epoch_leave_the_current_primary() {
        assert_eq!(chosen(&[report(1, 1), report(1, 2)], report(1, 2)), Some(2));
        assert_eq!(chosen(&[report(1, 1), report(1, 2)], report(1, 1)), Some(1));
    }

    #[test]
    fn a_view_reports_a_new_primary_once() {
        let mut view = QuorumView::default();
        assert_eq!(view.update(&[None, None]), None);
        assert!(view.update(&[report(1, 1), None]).is_some());
        assert!(view.update(&[report(1, 1), None]).is_none());
        assert!(view.update(&[report(1, 1), report(2, 2)]).is_some());
        assert!(view.update(&[report(1, 1), report(2, 2)]).is_none());
    }
}
