//! Ejections of the addresses of a backend's name.

use super::*;

#[tokio::test(start_paused = true)]
async fn addresses_of_a_name_are_ejected_one_by_one_and_the_name_is_out_with_the_last_one() {
    let mut ejections = ejections(1, 100);
    let weight = Weight::new(1.0).expect("a weight");
    let member = |name: &str| (name.parse().expect("an address"), weight);
    ejections.pool.cell.publish(Table::new(vec![member("db.internal:80"), member("10.0.0.1:80")]));
    let pool = Arc::clone(&ejections.pool);
    let name = pool.registry.get_or_create(&"db.internal:80".parse().expect("a name"));
    name.set_resolved([1, 2].map(|n| std::net::SocketAddr::from(([10, 0, 1, n], 80))).to_vec());
    pool.cell.readdress();
    let mut fail_next = || {
        // The first usable address.
        let address = (0..2).map(|_| name.route(None)).filter_map(|route| route.address());
        let address = address.min_by_key(|address| format!("{address:?}")).expect("one of a name");
        for _ in 0..3 {
            pool.failed_at(&name, address, Failure::Connect, Cause::RESET);
        }
        ejections.review();
        let usable = Target::all_of(&name).filter(|target| target.condition().is_usable()).count();
        (usable, name.is_usable(), name.condition.ejections.get())
    };
    assert_eq!(fail_next(), (1, true, 1));
    assert_eq!(fail_next(), (0, false, 2));
    assert_eq!(ejections.picked().await, ["10.0.0.1:80"]);
    // Each address gets a trial session, and the first that succeeds brings the name back.
    ejections.after(10 * SECOND, &name).await;
    let mut sessions = ejections.sessions().await;
    sessions.retain(|session| Arc::ptr_eq(session.pick.backend.backend(), &name));
    assert_eq!(sessions.len(), 2, "one trial session for each address");
    sessions[0].failed(Failure::Connect);
    sessions[1].reports(TrialProgress::Succeeded);
    ejections.after(SECOND / 50, &name).await;
    let states: Vec<_> = Target::all_of(&name).map(|target| target.condition().ejection()).collect();
    assert_eq!(states, [Ejection::Ejected, Ejection::None]);
    assert_eq!(ejections.picked().await, ["10.0.0.1:80", "db.internal:80"]);
}

#[tokio::test(start_paused = true)]
async fn no_more_addresses_of_a_name_are_ejected_than_the_limit_allows() {
    let mut ejections = ejections(1, 50);
    let weight = Weight::new(1.0).expect("a weight");
    let name: crate::balance::BackendId = "db.internal:80".parse().expect("a name");
    ejections.pool.cell.publish(Table::new(vec![(name.clone(), weight)]));
    let name = ejections.pool.registry.get_or_create(&name);
    name.set_resolved([1, 2, 3].map(|n| std::net::SocketAddr::from(([10, 0, 1, n], 80))).to_vec());
    ejections.pool.cell.readdress();
    for _ in 0..9 {
        let route = name.route(None);
        ejections.pool.failed_at(
            &name,
            route.address().expect("one of a name"),
            Failure::Connect,
            Cause::RESET,
        );
    }
    ejections.review();
    assert_eq!(Target::all_of(&name).filter(|target| !target.condition().is_usable()).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_ejected_address_that_a_name_loses_and_gets_back_gets_a_trial_session() {
    let ejections = ejections(1, 100);
    let weight = Weight::new(1.0).expect("a weight");
    let name: crate::balance::BackendId = "db.internal:80".parse().expect("a name");
    let pool = Arc::clone(&ejections.pool);
    pool.cell.publish(Table::new(vec![(name.clone(), weight)]));
    let name = pool.registry.get_or_create(&name);
    let resolve = |last: &[u8]| {
        name.set_resolved(last.iter().map(|n| std::net::SocketAddr::from(([10, 0, 1, *n], 80))).collect());
        pool.cell.readdress();
    };
    resolve(&[1, 2]);
    let running = tokio::spawn(ejections.run());
    let address = name.route(None).address().expect("one of a name");
    for _ in 0..3 {
        pool.failed_at(&name, address, Failure::Connect, Cause::RESET);
    }
    tokio::time::sleep(SECOND).await;
    let states = || Target::all_of(&name).map(|target| target.condition().ejection()).collect::<Vec<_>>();
    let is_ejected = |state: &Ejection| *state == Ejection::Ejected;
    let ejected = states().iter().position(is_ejected).expect("it is ejected");
    let (gone, other) = if ejected == 0 { (1, 2) } else { (2, 1) };
    resolve(&[other]);
    // The ejection ends while the name does not have the address.
    tokio::time::sleep(60 * SECOND).await;
    resolve(&[gone, other]);
    tokio::time::sleep(SECOND).await;
    assert_eq!(states()[ejected], Ejection::Trial);
    running.abort();
}
