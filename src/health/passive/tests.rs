//! Ejections under a paused clock, told by counters as sessions tell them.

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

    /// So many sessions there fail to connect.
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

    /// A hundred sessions, evenly spread.
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

    /// The one session of a hundred that is sent there.
    async fn probing_session(&self, backend: &Arc<Backend>) -> Session {
        let mut sessions = self.sessions().await;
        sessions.retain(|session| Arc::ptr_eq(session.pick.backend.backend(), backend));
        assert_eq!(sessions.len(), 1, "one session probes");
        sessions.remove(0)
    }

    /// The backends that a hundred sessions are sent to.
    async fn picked(&self) -> Vec<String> {
        let sessions = self.sessions().await;
        let mut picked: Vec<_> =
            sessions.iter().map(|session| session.pick.backend.id().to_string()).collect();
        picked.sort_unstable();
        picked.dedup();
        picked
    }
}

/// Tells what becomes of it as `session/report.rs` does.
struct Session {
    pool: Arc<Pool>,
    pick: Pick,
}

impl Session {
    fn probed(&self, to: TrialProgress) {
        if let Some(probe) = self.pick.trial {
            self.pool.report_trial(&self.pick.backend, probe, to);
        }
    }

    fn failed(&self, failure: Failure) {
        match self.pick.trial.and_then(TrialPermit::address) {
            None => self.pool.failed(&self.pick.backend, failure),
            Some(address) => self.pool.failed_at(self.pick.backend.backend(), address, failure, Cause::RESET),
        }
        self.probed(TrialProgress::Failed);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.probed(TrialProgress::Wanted);
    }
}

#[tokio::test(start_paused = true)]
async fn three_failures_eject_and_one_session_brings_it_back() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    assert_eq!(ejections.fail(&backend, 2), Ejection::None);
    assert_eq!(ejections.fail(&backend, 1), Ejection::Ejected);
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    assert_eq!(ejections.after(7 * SECOND, &backend).await, Ejection::Ejected);
    assert_eq!(ejections.after(3 * SECOND, &backend).await, Ejection::Trial);

    let probe = ejections.probing_session(&backend).await;
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"], "one session probes");
    probe.probed(TrialProgress::Connected);
    assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::Trial);
    probe.probed(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::None);
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "10.0.0.2:80"]);
    assert_eq!(backend.condition.ejections.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_fails_makes_the_next_ejection_longer_until_a_good_time_forgives() {
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
        let probe = ejections.probing_session(&backend).await;
        probe.failed(Failure::Connect);
        assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Ejected);
    }
    while ejections.after(10 * SECOND, &backend).await == Ejection::Ejected {}
    let probe = ejections.probing_session(&backend).await;
    probe.probed(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::None);
    assert_eq!(ejections.after(400 * SECOND, &backend).await, Ejection::None);
    ejections.fail(&backend, 3);
    assert_eq!(ejections.after(11 * SECOND, &backend).await, Ejection::Trial);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_shows_nothing_is_repeated_and_one_that_lives_for_a_second_has_succeeded() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    ejections.after(10 * SECOND, &backend).await;
    for connects in [false, true] {
        let probe = ejections.probing_session(&backend).await;
        if connects {
            probe.probed(TrialProgress::Connected);
        }
        assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::Trial);
        assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    }
    let probe = ejections.probing_session(&backend).await;
    probe.probed(TrialProgress::Connected);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
    assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::Trial, "that was another one's second");
    assert_eq!(ejections.after(SECOND / 2, &backend).await, Ejection::None);
}

#[tokio::test(start_paused = true)]
async fn sessions_that_began_before_the_probing_do_not_end_it() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    let mut earlier = ejections.sessions().await;
    let earlier = earlier.remove(0);
    assert!(Arc::ptr_eq(earlier.pick.backend.backend(), &backend));
    ejections.fail(&backend, 3);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Trial);
    let probe = ejections.probing_session(&backend).await;
    probe.probed(TrialProgress::Connected);
    earlier.probed(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
    earlier.failed(Failure::Reset);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
    probe.failed(Failure::Reset);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Ejected);
    // Nor does the probe of before.
    assert_eq!(ejections.after(20 * SECOND, &backend).await, Ejection::Trial);
    probe.probed(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Trial);
}

#[tokio::test(start_paused = true)]
async fn where_all_are_ejected_and_health_is_ignored_one_session_of_many_probes() {
    let mut ejections = ejections(2, 100);
    let [first, second] = [0, 1].map(|n| ejections.backend(n));
    ejections.fail(&first, 3);
    ejections.fail(&second, 3);
    assert_eq!(ejections.after(10 * SECOND, &first).await, Ejection::Trial);
    let sessions = ejections.sessions().await;
    for session in &sessions {
        session.probed(TrialProgress::Succeeded);
    }
    assert_eq!(ejections.after(SECOND / 50, &first).await, Ejection::None);
    assert_eq!(second.condition.ejection(), Ejection::None);
}

#[tokio::test(start_paused = true)]
async fn nobody_probes_where_the_checks_say_already_that_it_is_not_back() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    backend.condition.set_health(Health::Unhealthy);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Ejected);
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    backend.condition.set_health(Health::Unchecked);
    assert_eq!(ejections.after(SECOND, &backend).await, Ejection::Trial);
    // The checks find it out meanwhile.
    backend.condition.set_health(Health::Unhealthy);
    ejections.pool.cell.refresh();
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
}

#[tokio::test(start_paused = true)]
async fn who_is_to_have_no_sessions_is_not_probed_until_he_is() {
    let mut ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    ejections.fail(&backend, 3);
    let drained = vec![(backend.id().clone(), AdminState::Drain)];
    pool.cell.publish(table(&[1, 2]).with_states(drained));
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Ejected);
    assert_eq!(ejections.next_review, None, "the next table is the next reason to look");
    let running = tokio::spawn(ejections.run());
    tokio::time::sleep(SECOND).await;
    pool.cell.publish(table(&[1, 2]));
    tokio::time::sleep(SECOND).await;
    assert_eq!(backend.condition.ejection(), Ejection::Trial);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn who_is_probed_stays_so_for_as_long_as_no_session_comes() {
    let mut ejections = ejections(2, 50);
    let backend = ejections.backend(0);
    ejections.fail(&backend, 3);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Trial);
    ejections.probing_session(&backend).await.failed(Failure::Connect);
    ejections.after(SECOND / 50, &backend).await;
    for _ in 0..2 {
        assert_eq!(ejections.after(1_000 * SECOND, &backend).await, Ejection::Trial);
        assert_eq!(
            ejections.records[&(backend.id().clone(), None)].times,
            2,
            "what is known stays while it is a member"
        );
    }
    // Also outside of the table, until it is back.
    let others = table(&[2]);
    ejections.pool.cell.publish(others);
    ejections.after(1_000 * SECOND, &backend).await;
    assert!(ejections.records.is_empty());
    ejections.pool.cell.publish(table(&[1, 2]));
    assert_eq!(ejections.after(SECOND, &backend).await, Ejection::Trial);
    let probe = ejections.probing_session(&backend).await;
    probe.failed(Failure::Connect);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::Ejected);
}

#[tokio::test(start_paused = true)]
async fn whom_checks_keep_out_counts_among_the_ejected_and_who_is_drained_not_at_all() {
    let mut ejections = ejections(6, 50);
    let backends: Vec<_> = (0..6).map(|n| ejections.backend(n)).collect();
    backends[0].condition.set_health(Health::Unhealthy);
    let drained = [1, 2].map(|n: usize| (backends[n].id().clone(), AdminState::Drain));
    ejections.pool.cell.publish(table(&[1, 2, 3, 4, 5, 6]).with_states(drained.to_vec()));
    // Four are to have sessions, so two of them may be out, and one is.
    assert_eq!(ejections.fail(&backends[3], 3), Ejection::Ejected);
    assert_eq!(ejections.fail(&backends[4], 3), Ejection::None);
    backends[0].condition.set_health(Health::Healthy);
    assert_eq!(ejections.fail(&backends[4], 3), Ejection::Ejected);
    // A drained one takes nobody's place.
    assert_eq!(ejections.fail(&backends[1], 3), Ejection::Ejected);
}

#[tokio::test(start_paused = true)]
async fn who_stands_in_for_names_is_ejected_and_comes_back() {
    let mut ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let name = ("new.internal:80".parse().expect("an address"), Weight::new(1.0).expect("a weight"));
    pool.cell.publish(Table::new(vec![name.clone()]));
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "10.0.0.2:80"], "the name is not resolved");
    assert_eq!(ejections.fail(&backend, 3), Ejection::Ejected);
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
    assert_eq!(ejections.after(10 * SECOND, &backend).await, Ejection::Trial);
    let probe = ejections.probing_session(&backend).await;
    probe.probed(TrialProgress::Succeeded);
    assert_eq!(ejections.after(SECOND / 50, &backend).await, Ejection::None);
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "10.0.0.2:80"]);
    // What is wanted of one counts, too.
    let drained = vec![(backend.id().clone(), AdminState::Drain)];
    pool.cell.publish(Table::new(vec![name]).with_states(drained));
    assert_eq!(ejections.picked().await, ["10.0.0.2:80"]);
}

#[tokio::test(start_paused = true)]
async fn looks_are_few_while_more_fail_than_may_be_ejected() {
    let ejections = ejections(1, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let running = tokio::spawn(ejections.run());
    let mut looks = 0;
    for _ in 0..1_000 {
        for _ in 0..3 {
            pool.failed(&backend, Failure::Connect);
        }
        tokio::time::sleep(SECOND / 1_000).await;
        // A look at the limit begins the row again.
        looks += u32::from(backend.condition.failures(backend.reached()) == 0);
    }
    assert!((5..=11).contains(&looks), "{looks} looks in a second");
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn who_is_out_already_rings_no_more_and_begins_anew_when_its_checks_pass() {
    let mut ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let rings = async || tokio::time::timeout(SECOND, pool.outlier_event()).await.is_ok();
    assert_eq!(ejections.fail(&backend, 3), Ejection::Ejected);
    assert!(rings().await);
    assert_eq!(ejections.fail(&backend, 10), Ejection::Ejected);
    assert!(!rings().await, "ejected");
    backend.condition.set_ejection(Ejection::None);
    backend.condition.set_health(Health::Unhealthy);
    for _ in 0..10 {
        pool.failed(&backend, Failure::Connect);
    }
    assert!(!rings().await, "its checks fail");
    backend.condition.set_health(Health::Healthy);
    assert_eq!(ejections.fail(&backend, 1), Ejection::None);
}

#[tokio::test(start_paused = true)]
async fn no_more_are_ejected_than_may_be() {
    let mut ejections = ejections(5, 50);
    for n in 0..5 {
        let backend = ejections.backend(n);
        let expected = if n < 2 { Ejection::Ejected } else { Ejection::None };
        assert_eq!(ejections.fail(&backend, 3), expected, "{n}");
    }
    let one = &mut super::tests::ejections(1, 50);
    let backend = one.backend(0);
    assert_eq!(one.fail(&backend, 100), Ejection::None, "the only one stays");
}

#[tokio::test(start_paused = true)]
async fn an_ejection_survives_a_thousand_tables() {
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
async fn who_comes_back_to_the_table_after_its_ejection_is_probed_at_once() {
    let ejections = ejections(2, 50);
    let (pool, backend) = (Arc::clone(&ejections.pool), ejections.backend(0));
    let running = tokio::spawn(ejections.run());
    for _ in 0..3 {
        pool.failed(&backend, Failure::Connect);
    }
    tokio::time::sleep(SECOND).await;
    assert_eq!(backend.condition.ejection(), Ejection::Ejected);
    // `backend` is held here as it is by a session that goes on.
    pool.cell.publish(table(&[2]));
    tokio::time::sleep(20 * SECOND).await;
    pool.cell.publish(table(&[1, 2]));
    tokio::time::sleep(SECOND).await;
    assert_eq!(backend.condition.ejection(), Ejection::Trial);
    running.abort();
}
