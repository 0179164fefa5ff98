//! The schedule and permits of checks, and the checks of members that leave.

use super::*;
use std::num::NonZeroU32;

use super::super::check::fault;
use crate::balance::{Balance, Table, Weight};

fn table(members: &[&str]) -> Table {
    let member = |id: &&str| (id.parse().expect("an address"), Weight::new(1.0).expect("a weight"));
    Table::new(members.iter().map(member).collect())
}

fn checks(members: &[&str], interval: Duration, timeout: Duration) -> Checks {
    let pool = Pool::new("web".into(), Balance::WeightedRandom, table(members), None, 1);
    let (rise, fall) = (NonZeroU32::MIN, NonZeroU32::MIN);
    let expect = Some(b"never sent"[..].into());
    let settings = HealthCheck { interval, timeout, rise, fall, port: None, send: None, expect };
    Checks::new(Arc::new(pool), settings)
}

impl Checks {
    /// Ends a check of the backend's first address with `result`.
    fn ends_check(&mut self, backend: &Arc<Backend>, result: Result<(), CheckError>) {
        let target = Target::all_of(backend).next().expect("it has an address");
        let check = self.running.spawn(std::future::pending());
        self.on_result(check.id(), &target, Instant::now(), result);
        check.abort();
    }
}

/// A listener that accepts connections and sends nothing, and this number of addresses that lead to it.
fn silent(backends: u8) -> (std::net::TcpListener, Vec<String>) {
    let listener = std::net::TcpListener::bind("0.0.0.0:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    (listener, (1..=backends).map(|n| format!("127.0.0.{n}:{port}")).collect())
}

#[tokio::test(start_paused = true)]
async fn checks_that_wait_for_a_permit_run_in_order() {
    let (_listener, names) = silent(7);
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let mut checks = checks(&names, Duration::from_millis(20), Duration::from_millis(20));
    checks.permits = Box::leak(Box::new([Semaphore::new(2), Semaphore::new(2)]));
    checks.apply_table();
    let failed = |checks: &Checks| -> Vec<u64> {
        let members = checks.pool.cell.load();
        members.members().iter().map(|m| m.backend.condition.checks[1].get()).collect()
    };
    // About 30 for each backend: jitter shifts single checks. The clock is paused, so a busy machine shifts
    // none.
    while failed(&checks).iter().sum::<u64>() < 210 {
        checks.step().await;
    }
    assert!(failed(&checks).iter().all(|count| (24..=36).contains(count)), "{:?}", failed(&checks));
}

#[tokio::test]
async fn a_check_that_panics_is_repeated_and_the_others_go_on() {
    let listener = std::net::TcpListener::bind("0.0.0.0:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let names = [1, 2].map(|n| format!("127.0.0.{n}:{port}"));
    let interval = Duration::from_millis(20);
    let mut checks = checks(&[&names[0], &names[1]], interval, Duration::from_secs(5));
    Arc::get_mut(&mut checks.settings).expect("no check has begun").expect = None;
    checks.apply_table();
    let began = Instant::now();
    fault::panic_in_next_checks(3);
    let passed = |checks: &Checks| -> Vec<u64> {
        let members = checks.pool.cell.load();
        members.members().iter().map(|m| m.backend.condition.checks[0].get()).collect()
    };
    let all_passed = async {
        while passed(&checks).contains(&0) {
            checks.step().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all_passed).await.expect("both are checked again");
    assert!(fault::is_over(), "three checks have panicked");
    // Two of the three were of one backend, and the second came an interval after the first.
    assert!(began.elapsed() >= interval.mul_f64(0.8), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_member_that_leaves_and_returns_keeps_its_health_its_failed_checks_and_its_schedule() {
    let hour = Duration::from_secs(3600);
    let mut checks = checks(&["10.0.0.1:80", "10.0.0.2:80"], hour, hour);
    Arc::get_mut(&mut checks.settings).expect("no check has begun").fall = NonZeroU32::new(3).expect("three");
    checks.pool.cell.publish(table(&["10.0.0.1:80", "10.0.0.2:80"]));
    checks.apply_table();
    let id: BackendId = "10.0.0.1:80".parse().expect("an address");
    let backend = Arc::clone(&checks.backends[&id].backend);
    let refused = || Err(CheckError::ToItself);
    checks.ends_check(&backend, Ok(()));
    for failed in 1..=3 {
        assert_eq!(backend.condition.health(), Health::Healthy, "{failed}");
        checks.pool.cell.publish(table(&["10.0.0.2:80"]));
        checks.apply_table();
        tokio::time::advance(DEPARTED_KEPT_FOR / 50).await;
        checks.pool.cell.publish(table(&["10.0.0.1:80", "10.0.0.2:80"]));
        checks.apply_table();
        checks.ends_check(&backend, refused());
        assert!(checks.backends[&id].due >= Some(Instant::now() + hour / 4), "a return causes no check");
    }
    assert_eq!(backend.condition.health(), Health::Unhealthy);
    // After a longer time it is checked at once.
    checks.pool.cell.publish(table(&["10.0.0.2:80"]));
    checks.apply_table();
    tokio::time::timeout(2 * DEPARTED_KEPT_FOR, async {
        loop {
            checks.step().await
        }
    })
    .await
    .unwrap_err();
    assert!(checks.departed.is_empty());
    checks.pool.cell.publish(table(&["10.0.0.1:80", "10.0.0.2:80"]));
    checks.apply_table();
    assert!(checks.backends[&id].due <= Some(Instant::now() + FIRST_SPREAD));
    assert_eq!(backend.condition.health(), Health::Unhealthy);
}

#[tokio::test]
async fn the_check_of_a_member_that_left_gives_its_permit_back() {
    let (_listener, names) = silent(1);
    let hour = Duration::from_secs(3600);
    let mut checks = checks(&[&names[0]], Duration::from_secs(1), hour);
    checks.permits = Box::leak(Box::new([Semaphore::new(1), Semaphore::new(1)]));
    checks.apply_table();
    while checks.permits[0].available_permits() > 0 {
        tokio::time::timeout(Duration::from_millis(10), checks.step()).await.unwrap_or_default();
    }
    // Nothing listens there.
    checks.pool.cell.publish(table(&["127.0.0.1:1"]));
    while checks.pool.cell.load().members()[0].backend.condition.health() != Health::Unhealthy {
        checks.step().await;
    }
}

#[tokio::test(start_paused = true)]
async fn stand_ins_are_checked_and_the_table_too() {
    let mut checks = checks(&["10.0.0.1:80"], Duration::from_secs(3600), Duration::from_secs(1));
    checks.pool.cell.publish(table(&["10.0.0.1:80"]));
    checks.pool.cell.publish(table(&["new.internal:80"]));
    checks.apply_table();
    let mut checked: Vec<_> = checks.backends.keys().map(BackendId::as_str).collect();
    checked.sort_unstable();
    assert_eq!(checked, ["10.0.0.1:80", "new.internal:80"]);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_comes_and_goes_leaves_no_obsolete_entries() {
    let second = Duration::from_secs(1);
    let mut checks = checks(&["10.0.0.1:80", "10.0.0.2:80"], 3600 * second, second);
    for _ in 0..1_000 {
        for members in [&["10.0.0.1:80"][..], &["10.0.0.1:80", "10.0.0.2:80"]] {
            checks.pool.cell.publish(table(members));
            checks.apply_table();
        }
    }
    assert!(checks.due.len() <= 2 * 2 + DUE_SPARE, "{} entries of two members", checks.due.len());
    assert!(checks.backends.iter().all(|(id, entry)| {
        checks.due.iter().any(|Reverse((due, of))| of == id && entry.due == Some(*due))
    }));
}
