//! A session finds a backend that works, within its timeouts, attempts and deadline, and only a backend's
//! own failures count against it.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::support::{
    Backend, Proxy, backends, dead_address, echo, eventually, greeting, in_own_network, silent_address, soon,
};

/// Waits until there are `count` session lines, and returns them.
async fn lines(proxy: &Proxy, count: usize) -> Vec<serde_json::Value> {
    eventually("all sessions are logged", || async { proxy.access_lines().len() >= count }).await;
    let lines = proxy.access_lines();
    assert_eq!(lines.len(), count);
    lines
}

#[tokio::test]
async fn sessions_pass_over_backends_that_refuse() {
    let (dead, alive) = ([dead_address(), dead_address(), dead_address()], Backend::named("alive").await);
    let addresses = [dead[0].1, alive.address, dead[1].1, dead[2].1];
    let pool = format!("{}, connect: {{attempts: 4}}", backends(&addresses));
    let proxy = Proxy::web("", &pool);
    for _ in 0..60 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "alive");
    }
    let lines = lines(&proxy, 60).await;
    assert!(lines.iter().all(|line| line["close_reason"] == "finished"));
    assert!(lines.iter().all(|line| line["backend"] == alive.address.to_string()));
    let retries: u64 = lines.iter().map(|line| line["retries"].as_u64().expect("a number")).sum();
    // Three of four backends are dead: the chance that no session is retried is 4⁻⁶⁰.
    assert!(retries > 0);
    for name in ["connect_failures_total", "retries_total"] {
        let counted: f64 = dead.iter().map(|(_, address)| proxy.backend_metric(name, *address)).sum();
        assert_eq!(counted, retries as f64, "{name}");
        assert_eq!(proxy.backend_metric(name, alive.address), 0.0, "{name}");
    }
    assert_eq!(proxy.backend_metric("connections_total", alive.address), 60.0);
}

#[tokio::test]
async fn sessions_pass_over_a_backend_that_does_not_answer() {
    let ((_guard, silent), alive) = (silent_address().await, Backend::named("alive").await);
    let pool = "connect: {timeout: 100ms, attempts: 2, deadline: 20s}";
    let proxy = Proxy::web("", &format!("{}, {pool}", backends(&[silent, alive.address])));
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "alive");
    }
    let lines = lines(&proxy, 20).await;
    let waited = lines.iter().filter(|line| line["retries"] == 1);
    assert!(waited.clone().all(|line| line["connect_ms"].as_f64().expect("a number") >= 100.0));
    assert_eq!(waited.count() as f64, proxy.backend_metric("connect_failures_total", silent));
}

#[tokio::test]
async fn clients_are_reset_at_once_when_every_backend_refuses() {
    let dead = [dead_address(), dead_address()];
    let proxy = Proxy::web("", &backends(&dead.each_ref().map(|(_, address)| *address)));
    let error = greeting(proxy.address()).await.expect_err("there is no backend");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let line = &lines(&proxy, 1).await[0];
    assert_eq!((&line["close_reason"], &line["term"]), (&"connect_failed".into(), &"SC".into()));
    // Three attempts are allowed; a backend that failed is not tried again.
    assert_eq!(line["retries"], 1);
    for (_, address) in &dead {
        assert_eq!(proxy.backend_metric("connect_failures_total", *address), 1.0);
    }
    assert_eq!(proxy.metric("statera_sessions_closed_total{reason=\"connect_failed\"}"), Some(1.0));
}

#[tokio::test]
async fn no_session_waits_longer_than_the_deadline() {
    let (first, second, third) = (silent_address().await, silent_address().await, silent_address().await);
    let pool = "connect: {timeout: 500ms, attempts: 3, deadline: 700ms}";
    let proxy = Proxy::web("", &format!("{}, {pool}", backends(&[first.1, second.1, third.1])));
    let error = greeting(proxy.address()).await.expect_err("there is no backend");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let line = &lines(&proxy, 1).await[0];
    assert_eq!((&line["close_reason"], &line["term"]), (&"connect_timeout".into(), &"sC".into()));
    // The first attempt has 500 ms, the second the rest of the 700 ms (which may be none on a slow machine),
    // and there is no third.
    let taken = line["connect_ms"].as_f64().expect("a number");
    assert!(taken >= 700.0, "{taken}");
    assert!(line["retries"].as_u64().expect("a number") <= 1, "{line}");
}

#[tokio::test]
async fn no_more_backends_are_tried_than_attempts_allow_and_none_twice() {
    let dead: Vec<_> = (0..6).map(|_| dead_address()).collect();
    let addresses: Vec<_> = dead.iter().map(|(_, address)| *address).collect();
    let proxy = Proxy::web("", &format!("{}, outlier: off, connect: {{attempts: 4}}", backends(&addresses)));
    let mut before = vec![0.0; addresses.len()];
    for session in 1..=10 {
        greeting(proxy.address()).await.expect_err("there is no backend");
        let line = &lines(&proxy, session).await[session - 1];
        assert_eq!(line["retries"], 3);
        let failures: Vec<_> =
            addresses.iter().map(|a| proxy.backend_metric("connect_failures_total", *a)).collect();
        let mut tried: Vec<_> = failures.iter().zip(&before).map(|(now, before)| now - before).collect();
        tried.sort_by(f64::total_cmp);
        assert_eq!(tried, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        before = failures;
    }
}

#[tokio::test]
async fn a_missing_unix_socket_is_passed_over() {
    let (folder, alive) = (tempfile::TempDir::new().expect("a folder"), Backend::named("alive").await);
    let path = folder.path().join("missing.sock");
    let pool = format!("backends: {{\"unix:{}\": 1, \"{}\": 1}}", path.display(), alive.address);
    let proxy = Proxy::web("", &pool);
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "alive");
    }
    assert_eq!(lines(&proxy, 20).await.len(), 20);
}

/// Connects a client from a given port: in these scenarios the kernel has few ports to choose from.
///
/// Returns `None` if the client was reset before its handshake was over.
async fn client(port: u16, proxy: SocketAddr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().expect("a descriptor");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], port))).expect("a free port");
    let stream = match soon("the client connects", socket.connect(proxy)).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
        Err(error) => panic!("{error}"),
    };
    // A close by reset leaves no port in TIME-WAIT.
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("tcp");
    Some(stream)
}

/// The kernel can connect a socket to itself when it chooses the destination as the local port. Then a proxy
/// is client and server of one connection, which sends back every byte.
#[tokio::test]
async fn a_proxy_never_takes_itself_for_a_backend() {
    let name = "failover::a_proxy_never_takes_itself_for_a_backend";
    if !in_own_network(name, "echo '40000 40007' > /proc/sys/net/ipv4/ip_local_port_range") {
        return;
    }
    let proxy = Proxy::start(
        "workers: 2\nlisteners: {web: {bind: \"127.0.0.1:10000\", pool: web}}\n\
         pools: {web: {backends: {\"127.0.0.1:40003\": 1, \"127.0.0.1:40004\": 1}, connect: {attempts: 2}}}",
    );
    for port in 20_000..20_400 {
        let Some(mut client) = client(port, proxy.address()).await else { continue };
        // If the write already finds the connection reset, the read does not report the reset again.
        let sent = client.write_all(b"who is there?").await;
        let mut answer = Vec::new();
        let end = soon("the end", client.read_to_end(&mut answer)).await;
        assert_eq!((answer, sent.is_ok() && end.is_ok()), (Vec::new(), false));
    }
    let lines = lines(&proxy, 400).await;
    assert!(lines.iter().all(|line| line["close_reason"] == "connect_failed"));
}

#[tokio::test]
async fn a_lack_of_local_ports_does_not_count_against_the_backend() {
    let name = "failover::a_lack_of_local_ports_does_not_count_against_the_backend";
    if !in_own_network(name, "echo '40000 40003' > /proc/sys/net/ipv4/ip_local_port_range") {
        return;
    }
    let address = "127.0.0.1:30000".parse().expect("an address");
    let backend = Backend::echo_at(address).await;
    let proxy = Proxy::start(
        "workers: 2\nlisteners: {web: {bind: \"127.0.0.1:10000\", pool: web}}\n\
         pools: {web: {backends: {\"127.0.0.1:30000\": 1}}}",
    );
    let echoes = async |stream: &mut TcpStream| {
        let mut four = [0; 4];
        let result = async {
            stream.write_all(b"ping").await?;
            stream.read_exact(&mut four).await
        };
        soon("an answer or a reset", result).await.is_ok_and(|_| &four == b"ping")
    };
    let mut held = Vec::new();
    for port in 20_000..20_004 {
        let mut stream = client(port, proxy.address()).await.expect("it is not reset");
        assert!(echoes(&mut stream).await, "four ports are enough for four sessions");
        held.push(stream);
    }
    for port in 20_004..20_010 {
        let Some(mut stream) = client(port, proxy.address()).await else { continue };
        assert!(!echoes(&mut stream).await, "there is no fifth port");
    }
    let lines = lines(&proxy, 6).await;
    assert!(lines.iter().all(|line| line["close_reason"] == "exhausted" && line["term"] == "RC"));
    assert_eq!(proxy.backend_metric("connect_failures_total", address), 0.0);
    assert_eq!(proxy.backend_metric("retries_total", address), 0.0);

    // Sessions that have a port go on, and a port that becomes free is used again.
    for stream in &mut held {
        assert!(echoes(stream).await);
    }
    held.pop();
    let begun = Instant::now();
    for port in 20_010..20_060 {
        assert!(begun.elapsed() < Duration::from_secs(20), "the free port is not used again");
        let Some(mut stream) = client(port, proxy.address()).await else { continue };
        if echoes(&mut stream).await {
            assert_eq!(backend.accepted(), 5);
            return;
        }
    }
    panic!("the free port is not used again");
}

#[tokio::test]
async fn no_session_fails_while_a_backend_restarts() {
    let steady = Backend::echo().await;
    let restarting = Backend::echo().await;
    let address = restarting.address;
    let proxy = Proxy::web("", &backends(&[steady.address, address]));
    let mut restarting = Some(restarting);
    for round in 0..10 {
        for _ in 0..20 {
            assert_eq!(echo(proxy.address(), b"ping").await.expect("an answer"), b"ping");
        }
        if round % 2 == 0 {
            restarting = None;
            eventually("nothing listens", || async { TcpStream::connect(address).await.is_err() }).await;
        } else {
            let socket = TcpSocket::new_v4().expect("a descriptor");
            socket.set_reuseaddr(true).expect("tcp");
            restarting = Some(Backend::echo_at(address).await);
        }
    }
    drop(restarting);
    let lines = lines(&proxy, 200).await;
    assert!(lines.iter().all(|line| line["close_reason"] == "finished"));
    assert!(lines.iter().any(|line| line["retries"] == 1));
}

/// Retries are picked at random. If they followed the round-robin sequence, the same backend would get all
/// sessions of the failing one.
#[tokio::test]
async fn an_even_spread_stays_even_where_one_backend_refuses() {
    const SESSIONS: u64 = 1_200;
    let (_dead, dead) = dead_address();
    let living = [Backend::named("a").await, Backend::named("b").await, Backend::named("c").await];
    let addresses: Vec<_> = living.iter().map(|backend| backend.address).chain([dead]).collect();
    let proxy = Proxy::web("", &format!("balance: weighted_round_robin, {}", backends(&addresses)));
    for _ in 0..SESSIONS {
        greeting(proxy.address()).await.expect("another backend serves it");
    }
    // Each living backend gets a quarter of the sessions, 300, and by retries a third of the dead one's 300:
    // 100 with a sigma of 8.2. Six sigma are allowed.
    for backend in &living {
        assert!(backend.accepted().abs_diff(400) <= 55, "{:?}", living.each_ref().map(Backend::accepted));
    }
}

/// `localhost` is `127.0.0.1` and `::1` on most machines, and many servers listen on one of them only.
#[tokio::test]
async fn a_name_with_several_addresses_serves_while_one_of_them_answers() {
    let backend = Backend::named("here").await;
    let hosts = std::fs::read_to_string("/etc/hosts").expect("there are hosts");
    let proxy = Proxy::web("", &format!("backends: {{\"localhost:{}\": 1}}", backend.address.port()));
    for n in 0..20 {
        let answer = greeting(proxy.address()).await;
        assert_eq!(answer.as_deref().ok(), Some("here"), "session {n}; /etc/hosts:\n{hosts}");
    }
}

#[tokio::test]
async fn sessions_wait_for_a_unix_backend_whose_accept_queue_is_full() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let path = folder.path().join("app.sock");
    let socket =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("a descriptor");
    socket.bind(&socket2::SockAddr::unix(&path).expect("a short path")).expect("a new path");
    socket.listen(1).expect("it listens");
    socket.set_nonblocking(true).expect("a socket");
    let listener = tokio::net::UnixListener::from_std(socket.into()).expect("a runtime");
    let proxy = Proxy::web(
        "",
        &format!("backends: {{\"unix:{}\": 1}}, connect: {{timeout: 20s, deadline: 20s}}", path.display()),
    );
    let address = proxy.address();
    let clients: Vec<_> = (0..30).map(|_| tokio::spawn(greeting(address))).collect();
    // The accept queue is full before the backend accepts the first client.
    eventually("all clients are connected", || async {
        proxy.metric("statera_listener_connections_active{listener=\"web\"}") == Some(30.0)
    })
    .await;
    let serving = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"served").await;
        }
    });
    for client in clients {
        assert_eq!(client.await.expect("no panic").expect("an answer"), "served");
    }
    serving.abort();
}

/// The local ports are counted for each destination: when all are in use towards one backend, another can be
/// reached.
#[tokio::test]
async fn a_lack_of_local_ports_towards_one_backend_sends_sessions_to_another() {
    let name = "failover::a_lack_of_local_ports_towards_one_backend_sends_sessions_to_another";
    if !in_own_network(name, "echo '40000 40003' > /proc/sys/net/ipv4/ip_local_port_range") {
        return;
    }
    let start = async |address: &str| Backend::echo_at(address.parse().expect("an address")).await;
    let (first, second) = (start("127.0.0.1:30000").await, start("127.0.0.1:30001").await);
    let proxy = Proxy::start(
        "workers: 2\nlisteners: {web: {bind: \"127.0.0.1:10000\", pool: web}}\n\
         pools: {web: {backends: {\"127.0.0.1:30000\": 9, \"127.0.0.1:30001\": 1}}}",
    );
    let mut held = Vec::new();
    for port in 20_000..20_008 {
        let mut stream = client(port, proxy.address()).await.expect("it is not reset");
        let mut four = [0; 4];
        stream.write_all(b"ping").await.expect("it is not reset");
        soon("an answer", stream.read_exact(&mut four)).await.expect("one of the two has a port left");
        held.push(stream);
    }
    assert_eq!((first.accepted(), second.accepted()), (4, 4));
    assert_eq!(proxy.backend_metric("connect_failures_total", first.address), 0.0);
}
