//! `least_conn` and `source_hash` at work: real sessions from many addresses, on all workers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};

use crate::support::{Backend, Proxy, Redis, backend_series, backends, dead_address, eventually};

/// From an address of this machine's own: all of 127.0.0.0/8 are.
async fn connect_from(client: Ipv4Addr, proxy: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from((client, 0))).expect("an address of the loopback");
    socket.connect(proxy).await.expect("it listens")
}

/// The name of the backend that the session reached, and the session.
async fn greeted(client: Ipv4Addr, proxy: SocketAddr) -> (String, TcpStream) {
    let mut stream = connect_from(client, proxy).await;
    let mut name = vec![0; 1];
    stream.read_exact(&mut name).await.expect("a greeting");
    (String::from_utf8(name).expect("a name"), stream)
}

async fn named_backends(names: &[&'static str]) -> Vec<Backend> {
    let mut backends = Vec::new();
    for name in names {
        backends.push(Backend::named(name).await);
    }
    backends
}

fn addresses(backends: &[Backend]) -> Vec<SocketAddr> {
    backends.iter().map(|backend| backend.address).collect()
}

fn client(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + number)
}

#[tokio::test]
async fn a_client_reaches_the_same_backend_through_every_proxy_and_after_a_change_of_others() {
    let redis = Redis::start().await;
    let all = named_backends(&["a", "b", "c", "d"]).await;
    redis.set_weights(all.iter().map(|backend| (backend, 1.0))).await;
    let start = || {
        let redis = format!("redis: {{url: \"{}\"}}", redis.url());
        Proxy::web(&redis, "weights_key: servers, balance: source_hash")
    };
    let proxies = [start(), start()];
    for proxy in &proxies {
        eventually("the table arrives", || async { proxy.weights().len() == 4 }).await;
    }
    let mut homes = BTreeMap::new();
    for number in 0..60 {
        for proxy in [&proxies[0], &proxies[1], &proxies[0]] {
            let (name, _) = greeted(client(number), proxy.address()).await;
            assert_eq!(homes.entry(number).or_insert_with(|| name.clone()), &name, "client {number}");
        }
    }
    let used: BTreeSet<&String> = homes.values().collect();
    assert_eq!(used.len(), 4, "60 clients are on {used:?}");

    // Nobody leaves one that stays, but for the few that Maglev moves: 60 clients are too few to see more than some.
    redis.run(&format!("ZREM servers {}", all[3].address)).await;
    for proxy in &proxies {
        eventually("it is gone", || async { proxy.weights().len() == 3 }).await;
    }
    let mut strayed = 0;
    for (number, home) in &homes {
        let (first, _) = greeted(client(*number), proxies[0].address()).await;
        let (second, _) = greeted(client(*number), proxies[1].address()).await;
        assert_eq!(first, second, "client {number}");
        assert_ne!(first, "d");
        strayed += u32::from(home != "d" && *home != first);
    }
    assert!(strayed <= 12, "{strayed} of those who had another left it");
}

#[tokio::test]
async fn clients_of_a_backend_that_is_dead_all_reach_another() {
    let all = named_backends(&["a", "b"]).await;
    let (_dead, address) = dead_address();
    // Once it is ejected, its clients are spread by a table without it, which is another one.
    let addresses = [&[address][..], &addresses(&all)].concat();
    let pool = format!("balance: source_hash, outlier: off, {}", backends(&addresses));
    let proxy = Proxy::web("", &pool);
    let mut names = BTreeSet::new();
    for number in 0..30 {
        let (name, _) = greeted(client(number), proxy.address()).await;
        let (again, _) = greeted(client(number), proxy.address()).await;
        assert_eq!(name, again, "client {number}");
        names.insert(name);
    }
    assert_eq!(names.len(), 2);
}

#[tokio::test]
async fn sessions_that_stay_are_spread_by_how_many_each_backend_has() {
    let all = named_backends(&["a", "b", "c", "d"]).await;
    let proxy = Proxy::web("", &format!("balance: least_conn, {}", backends(&addresses(&all))));
    let mut open: Vec<(String, TcpStream)> = Vec::new();
    for number in 0..200 {
        open.push(greeted(client(number), proxy.address()).await);
    }
    // All but those of one backend end: it is the busiest by far, and gets next to none of those who come.
    open.retain(|(name, _)| name == "a");
    let busy = open.len();
    assert!((40..=60).contains(&busy), "{busy} of 200 on one of four");
    eventually("the others have ended", || async {
        let active = |backend: &Backend| proxy.metric(&backend_series("connections_active", backend.address));
        all[1..].iter().all(|backend| active(backend) == Some(0.0))
    })
    .await;
    for number in 0..90 {
        open.push(greeted(client(number), proxy.address()).await);
    }
    let more = open.iter().filter(|(name, _)| name == "a").count() - busy;
    assert!(more <= 20, "{more} of 90 went to the one that had {busy}");
}

#[tokio::test]
async fn a_backend_that_lost_its_sessions_gets_all_new_ones_until_it_has_as_many_as_the_others() {
    const NAMES: [&str; 20] =
        ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"];
    let all = named_backends(&NAMES).await;
    let proxy = Proxy::web("", &format!("balance: least_conn, {}", backends(&addresses(&all))));
    let mut open: Vec<(String, TcpStream)> = Vec::new();
    for number in 0..200 {
        open.push(greeted(client(number), proxy.address()).await);
    }
    open.retain(|(name, _)| name != "c");
    assert_eq!(open.len(), 190, "each of them had ten");
    let active = backend_series("connections_active", all[2].address);
    eventually("its sessions have ended", || async { proxy.metric(&active) == Some(0.0) }).await;
    for number in 0..10 {
        let (name, stream) = greeted(client(number), proxy.address()).await;
        assert_eq!(name, "c", "session {number}");
        open.push((name, stream));
    }
}
