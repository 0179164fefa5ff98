//! Ejections under a paused clock, with failures counted as sessions count them.

use super::*;
use std::num::NonZeroU32;

use crate::balance::backend::Backend;
use crate::balance::backend::Cause;
use crate::balance::backend::TrialPermit;
use crate::balance::backend::{Failure, Health};
use crate::balance::pool::Pick;
use crate::balance::{AdminState, Balance, Policy, Table, Weight};

mod names;

const SECOND: Duration = Duration::from_secs(1);

fn ejections(backends: u32, percent: u32) -> Ejections {
    let outlier = Outlier {
        consecutive_failures: NonZeroU32::new(3).expect("three"),
        ejection: 10 * SECOND,
        max_ejected_percent: percent,
    };
    let policy = Policy { outlier: Some(outlier), ..Balance::WeightedRandom.into() };
    let table = table(&(1..=backends).collect::<Vec<_>>());
    Ejections::new(Arc::new(Pool::new("web".into(), policy, table, None, 1)), outlier)
}

/// Backends of these numbers, of one weight.
fn table(numbers: &[u32]) -> Table {
    let member = |n: &u32| {
        let id = format!("10.0.0.{n}:80").parse().expect("an address");
        (id, Weight::new(1.0).expect("a weight"))
    };
    Table::new(numbers.iter().map(member).collect())
}

impl Ejections {
    fn backend(&self, n: usize) -> Arc<Backend> {
        Arc::clone(&self.pool.registry.living()[n])
    }

    /// Fails to connect `times` sessions to `backend`, and reviews the pool.
    fn fail(&mut self, backend: &Arc<Backend>, times: usize) -> Ejection {
        for _ in 0..times {
            self.pool.failed(backend, Failure::Connect);
        }
        self.review();
        backend.condition.ejection()
    }

    async fn after(&mut self, time: Duration, backend: &Backend) -> Ejection {
        tokio::time::advance(time).await;
        self.review();
        backend.condition.ejection()
    }

    /// Picks for a hundred sessions whose points are evenly spread.
    async fn sessions(&self) -> Vec<Session> {
        let client = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let mut sessions = Vec::new();
        for n in 0..100u64 {
            let point = n * (u64::MAX / 100);
            let pick = self.pool.pick(client, &[], point, Instant::now()).await.expect("a backend");
            sessions.push(Session { pool: Arc::clone(&self.pool), pick });
        }
        sessions
    }

    /// Opens a hundred sessions and returns the one that `backend` gets.
    async fn trial_session(&self, backend: &Arc<Backend>) -> Session {
        let mut sessions = self.sessions().await;
        sessions.retain(|session| Arc::ptr_eq(session.pick.backend.backend(), backend));
        assert_eq!(sessions.len(), 1, "one trial session");
        sessions.remove(0)
    }

    /// The backends that a hundred sessions get.
    async fn picked(&self) -> Vec<String> {
        let sessions = self.sessions().await;
        let mut picked: Vec<_> =
            sessions.iter().map(|session| session.pick.backend.id().to_string()).collect();
        picked.sort_unstable();
        picked.dedup();
        picked
    }
}

/// A session that reports its trial as `session/report.rs` does.
struct Session {
    pool: Arc<Pool>,
    pick: Pick,
}

impl Session {
    fn reports(&self, to: TrialProgress) {
        if let Some(number) = self.pick.trial {
            self.pool.report_trial(&self.pick.backend, number, to);
        }
    }

    fn failed(&self, failure: Failure) {
        match self.pick.trial.and_then(TrialPermit::address) {
            None => self.pool.failed(&self.pick.backend, failure),
            Some(address) => self.pool.failed_at(self.pick.backend.backend(), address, failure, Cause::RESET),
        }
        self.reports(TrialProgress::Failed);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reports(TrialProgress::Wanted);
    }
}

#[tokio::test(start_paused = true)]
async fn three_failures_eject_a_backend_and_a_trial_session_brings_it_back() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    assert_eq!(ejections.fail(&backend, 2), Ejection::None);
    assert_eq!(ejections.fail(&backend, 1), Ejection::Ejected);
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    assert_eq!(ejections.after(7 * SECOND, &backend).await, Ejection::Ejected);
    assert_eq!(ejections.after(3 * SECOND, &backend).await, Ejection::Trial);

    let trial = ejections.trial_session(&backend).await;
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"], "one trial session");
    trial.reports(TrialProgress::Connected);
    assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::Trial);
    trial.reports(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::None);
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "10.0.0.2:80"]);
    assert_eq!(backend.condition.ejections.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn failed_trial_sessions_make_ejections_longer_until_a_time_without_failures() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    for times in 2..40 {
        let mut ejected = Duration::ZERO;
        while ejections.after(SECOND, &backend).await == Ejection::Ejected {
            ejected += SECOND;
        }
        let asked = (10 * SECOND * (times - 1)).min(300 * SECOND);
        assert!(ejected + SECOND >= asked.mul_f64(0.8) && ejected <= asked, "{times}: {ejected:?}");
        let trial = ejections.trial_session(&backend).await;
        trial.failed(Failure::Connect);
        assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Ejected);
    }
    while ejections.after(10 * SECOND, &backend).await == Ejection::Ejected {}
    let trial = ejections.trial_session(&backend).await;
    trial.reports(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::None);
    assert_eq!(ejections.after(400 * SECOND, &backend).await, Ejection::None);
    ejections.fail(&backend, 3);
    assert_eq!(ejections.after(11 * SECOND, &backend).await, Ejection::Trial);
}

#[tokio::test(start_paused = true)]
async fn a_trial_session_without_result_is_repeated_and_one_connected_for_a_second_succeeds() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    ejections.after(10 * SECOND, &backend).await;
    for connects in [false, true] {
        let trial = ejections.trial_session(&backend).await;
        if connects {
            trial.reports(TrialProgress::Connected);
        }
        assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::Trial);
        assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    }
    let trial = ejections.trial_session(&backend).await;
    trial.reports(TrialProgress::Connected);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
    assert_eq!(
        ejections.after(SECOND / 2, &backend).await,
        Ejection::Trial,
        "the second began with another trial session"
    );
    assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::None);
}

#[tokio::test(start_paused = true)]
async fn sessions_that_began_before_the_trial_session_do_not_end_the_ejection() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    let mut earlier = ejections.sessions().await;
    let earlier = earlier.remove(0);
    assert!(Arc::ptr_eq(earlier.pick.backend.backend(), &backend));
    ejections.fail(&backend, 3);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Trial);
    let trial = ejections.trial_session(&backend).await;
    trial.reports(TrialProgress::Connected);
    earlier.reports(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
    earlier.failed(Failure::Reset);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
    trial.failed(Failure::Reset);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Ejected);
    // Nor does an earlier trial session.
    assert_eq!(ejections.after(20 * SECOND, &backend).await, Ejection::Trial);
    trial.reports(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
}

#[tokio::test(start_paused = true)]
async fn if_all_are_ejected_and_health_is_ignored_one_of_many_sessions_is_the_trial() {
    let mut ejections = ejections(2, 100);
    let [first, second] = [0, 1].map(|n| ejections.backend(n));
    ejections.fail(&first, 3);
    ejections.fail(&second, 3);
    assert_eq!(ejections.after(10 * SECOND, &first).await, Ejection::Trial);
    let sessions = ejections.sessions().await;
    for session in &sessions {
        session.reports(TrialProgress::Succeeded);
    }
    assert_eq!(ejections.after(SECOND / 50, &first).await, Ejection::None);
    assert_eq!(second.condition.ejection(), Ejection::None);
}

#[tokio::test(start_paused = true)]
async fn a_backend_whose_checks_fail_gets_no_trial_session() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    backend.condition.set_health(Health::Unhealthy);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Ejected);
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    backend.condition.set_health(Health::Unchecked);
    assert_eq!(ejections.after(SECOND, &backend).await, Ejection::Trial);
    // The checks fail before a trial session comes.
    backend.condition.set_health(Health::Unhealthy);
    ejections.pool.cell.refresh();
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
}

#[tokio::test(start_paused = true)]
async fn a_backend_in_drain_gets_no_trial_session_until_it_is_ready() {
    let mut ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    ejections.fail(&backend, 3);
    let drained = vec![(backend.id().clone(), AdminState::Drain)];
    pool.cell.publish(table(&[1, 2]).with_states(drained));
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Ejected);
    assert_eq!(ejections.next_review, None, "only the next table causes a review");
    let running = tokio::spawn(ejections.run());
    tokio::time::sleep(SECOND).await;
    pool.cell.publish(table(&[1, 2]));
    tokio::time::sleep(SECOND).await;
    assert_eq!(backend.condition.ejection(), Ejection::Trial);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_backend_waits_for_its_trial_session_until_one_comes() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Trial);
    ejections.trial_session(&backend).await.failed(Failure::Connect);
    ejections.after(SECOND / 50, &backend).await;
    for _ in 0..2 {
        assert_eq!(ejections.after(1_000 * SECOND, &backend).await, Ejection::Trial);
        assert_eq!(
            ejections.records[&(backend.id().clone(), None)].times,
            2,
            "the record stays while it is a member"
        );
    }
    // It also waits while it is not in the table.
    let others = table(&[2]);
    ejections.pool.cell.publish(others);
    ejections.after(1_000 * SECOND, &backend).await;
    assert!(ejections.records.is_empty());
    ejections.pool.cell.publish(table(&[1, 2]));
    assert_eq!(ejections.after(SECOND, &backend).await, Ejection::Trial);
    let trial = ejections.trial_session(&backend).await;
    trial.failed(Failure::Connect);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Ejected);
}

#[tokio::test(start_paused = true)]
async fn unhealthy_backends_count_towards_the_limit_of_ejections_and_drained_ones_do_not() {
    let mut ejections = ejections(6, 50);
    let backends: Vec<_> = (0..6).map(|n| ejections.backend(n)).collect();
    backends[0].condition.set_health(Health::Unhealthy);
    let drained = [1, 2].map(|n: usize| (backends[n].id().clone(), AdminState::Drain));
    ejections.pool.cell.publish(table(&[1, 2, 3, 4, 5, 6]).with_states(drained.to_vec()));
    // Four backends may get sessions, so two of them may be out, and one already is.
    assert_eq!(ejections.fail(&backends[3], 3), Ejection::Ejected);
    assert_eq!(ejections.fail(&backends[4], 3), Ejection::None);
    backends[0].condition.set_health(Health::Healthy);
    assert_eq!(ejections.fail(&backends[4], 3), Ejection::Ejected);
    // A drained backend may be ejected beyond the limit.
    assert_eq!(ejections.fail(&backends[1], 3), Ejection::Ejected);
}

#[tokio::test(start_paused = true)]
async fn a_stand_in_is_ejected_and_comes_back() {
    let mut ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let name = ("new.internal:80".parse().expect("an address"), Weight::new(1.0).expect("a weight"));
    pool.cell.publish(Table::new(vec![name.clone()]));
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "10.0.0.2:80"], "the name is not resolved");
    assert_eq!(ejections.fail(&backend, 3), Ejection::Ejected);
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Trial);
    let trial = ejections.trial_session(&backend).await;
    trial.reports(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::None);
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "10.0.0.2:80"]);
    // The admin state of a stand-in counts, too.
    let drained = vec![(backend.id().clone(), AdminState::Drain)];
    pool.cell.publish(Table::new(vec![name]).with_states(drained));
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
}

#[tokio::test(start_paused = true)]
async fn reviews_are_few_while_more_fail_than_may_be_ejected() {
    let ejections = ejections(1, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let running = tokio::spawn(ejections.run());
    let mut reviews = 0;
    for _ in 0..1_000 {
        for _ in 0..3 {
            pool.failed(&backend, Failure::Connect);
        }
        tokio::time::sleep(SECOND / 1_000).await;
        // A review at the limit starts the count of failures again.
        reviews += u32::from(backend.condition.failures(backend.reached()) == 0);
    }
    assert!((5..=11).contains(&reviews), "{reviews} reviews in a second");
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn an_unusable_backend_sends_no_events_and_its_count_begins_again_when_checks_pass() {
    let mut ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let has_event = async || tokio::time::timeout(SECOND, pool.outlier_event()).await.is_ok();
    assert_eq!(ejections.fail(&backend, 3), Ejection::Ejected);
    assert!(has_event().await);
    assert_eq!(ejections.fail(&backend, 10), Ejection::Ejected);
    assert!(!has_event().await, "ejected");
    backend.condition.set_ejection(Ejection::None);
    backend.condition.set_health(Health::Unhealthy);
    for _ in 0..10 {
        pool.failed(&backend, Failure::Connect);
    }
    assert!(!has_event().await, "its checks fail");
    backend.condition.set_health(Health::Healthy);
    assert_eq!(ejections.fail(&backend, 1), Ejection::None);
}

#[tokio::test(start_paused = true)]
async fn no_more_are_ejected_than_the_limit_allows() {
    let mut ejections = ejections(5, 50);
    for n in 0..5 {
        let backend = ejections.backend(n);
        let expected = if n < 2 { Ejection::Ejected } else { Ejection::None };
        assert_eq!(ejections.fail(&backend, 3), expected, "{n}");
    }
    let one = &mut super::tests::ejections(1, 50);
    let backend = one.backend(0);
    assert_eq!(one.fail(&backend, 100), Ejection::None, "the only backend is never ejected");
}

#[tokio::test(start_paused = true)]
async fn an_ejection_outlasts_a_thousand_tables() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    for weight in 2..1_002 {
        let member =
            |id: &str| (id.parse().expect("an address"), Weight::new(f64::from(weight)).expect("a weight"));
        ejections.pool.cell.publish(Table::new(vec![member("10.0.0.1:80"), member("10.0.0.2:80")]));
        ejections.review();
    }
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_returns_to_the_table_after_its_ejection_gets_a_trial_session_at_once() {
    let ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let running = tokio::spawn(ejections.run());
    for _ in 0..3 {
        pool.failed(&backend, Failure::Connect);
    }
    tokio::time::sleep(SECOND).await;
    assert_eq!(backend.condition.ejection(), Ejection::Ejected);
    // This test keeps `backend` alive, as a session that goes on would.
    pool.cell.publish(table(&[2]));
    tokio::time::sleep(20 * SECOND).await;
    pool.cell.publish(table(&[1, 2]));
    tokio::time::sleep(SECOND).await;
    assert_eq!(backend.condition.ejection(), Ejection::Trial);
    running.abort();
}
