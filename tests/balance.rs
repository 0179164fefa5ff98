//! `least_conn` and `source_hash` with real sessions from many addresses, on all workers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};

use crate::support::{Backend, Proxy, Redis, backend_series, backends, dead_address, eventually};

/// Connects from a chosen address of 127.0.0.0/8, all of which belong to this machine.
async fn connect_from(client: Ipv4Addr, proxy: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from((client, 0))).expect("an address of the loopback");
    socket.connect(proxy).await.expect("it listens")
}

/// Opens a session. Returns the name of its backend, and the session.
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

fn client_address(number: u32) -> Ipv4Addr {
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
    let mut first_backends = BTreeMap::new();
    for number in 0..60 {
        for proxy in [&proxies[0], &proxies[1], &proxies[0]] {
            let (name, _) = greeted(client_address(number), proxy.address()).await;
            assert_eq!(
                first_backends.entry(number).or_insert_with(|| name.clone()),
                &name,
                "client {number}"
            );
        }
    }
    let used: BTreeSet<&String> = first_backends.values().collect();
    assert_eq!(used.len(), 4, "60 clients are on {used:?}");

    // Clients of a backend that stays keep it, except for the few that Maglev moves.
    redis.run(&format!("ZREM servers {}", all[3].address)).await;
    for proxy in &proxies {
        eventually("the backend is removed", || async { proxy.weights().len() == 3 }).await;
    }
    let mut moved = 0;
    for (number, first_backend) in &first_backends {
        let (first, _) = greeted(client_address(*number), proxies[0].address()).await;
        let (second, _) = greeted(client_address(*number), proxies[1].address()).await;
        assert_eq!(first, second, "client {number}");
        assert_ne!(first, "d");
        moved += u32::from(first_backend != "d" && *first_backend != first);
    }
    assert!(moved <= 12, "{moved} clients left a backend that stayed");
}

#[tokio::test]
async fn clients_whose_backend_is_dead_all_reach_another() {
    let all = named_backends(&["a", "b"]).await;
    let (_dead, address) = dead_address();
    // Without ejection: an ejected backend would leave the lookup table, and clients would be spread by
    // another table.
    let addresses = [&[address][..], &addresses(&all)].concat();
    let pool = format!("balance: source_hash, outlier: off, {}", backends(&addresses));
    let proxy = Proxy::web("", &pool);
    let mut names = BTreeSet::new();
    for number in 0..30 {
        let (name, _) = greeted(client_address(number), proxy.address()).await;
        let (again, _) = greeted(client_address(number), proxy.address()).await;
        assert_eq!(name, again, "client {number}");
        names.insert(name);
    }
    assert_eq!(names.len(), 2);
}

#[tokio::test]
async fn least_conn_spreads_open_sessions_evenly_and_gives_a_busy_backend_few_new_ones() {
    let all = named_backends(&["a", "b", "c", "d"]).await;
    let proxy = Proxy::web("", &format!("balance: least_conn, {}", backends(&addresses(&all))));
    let mut open: Vec<(String, TcpStream)> = Vec::new();
    for number in 0..200 {
        open.push(greeted(client_address(number), proxy.address()).await);
    }
    // All sessions end except those of one backend. It is then the busiest by far, and gets few of the new
    // ones.
    open.retain(|(name, _)| name == "a");
    let busy = open.len();
    assert!((40..=60).contains(&busy), "{busy} of 200 on one of four");
    eventually("the other sessions have ended", || async {
        let active = |backend: &Backend| proxy.metric(&backend_series("connections_active", backend.address));
        all[1..].iter().all(|backend| active(backend) == Some(0.0))
    })
    .await;
    for number in 0..90 {
        open.push(greeted(client_address(number), proxy.address()).await);
    }
    let more = open.iter().filter(|(name, _)| name == "a").count() - busy;
    assert!(more <= 20, "{more} of 90 went to the backend that had {busy}");
}

#[tokio::test]
async fn a_backend_that_lost_its_sessions_gets_all_new_ones_until_it_has_as_many_as_the_others() {
    const NAMES: [&str; 20] =
        ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"];
    let all = named_backends(&NAMES).await;
    let proxy = Proxy::web("", &format!("balance: least_conn, {}", backends(&addresses(&all))));
    let mut open: Vec<(String, TcpStream)> = Vec::new();
    for number in 0..200 {
        open.push(greeted(client_address(number), proxy.address()).await);
    }
    open.retain(|(name, _)| name != "c");
    assert_eq!(open.len(), 190, "each backend had ten");
    let active = backend_series("connections_active", all[2].address);
    eventually("its sessions have ended", || async { proxy.metric(&active) == Some(0.0) }).await;
    for number in 0..10 {
        let (name, stream) = greeted(client_address(number), proxy.address()).await;
        assert_eq!(name, "c", "session {number}");
        open.push((name, stream));
    }
}
