//! A peer vanishes (its machine loses power or its network breaks) while bytes for it are unacknowledged.
//! Its session ends within the time of `keepalive`, not after the quarter of an hour for which the kernel
//! retransmits. Live peers are not cut.
//!
//! Each scenario runs in its own network namespace, in which the packets of some ports are dropped.

use std::process::Command;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::interval;

use crate::support::{
    Authority, Kind, Pair, Pattern, Peer, Proxy, Redis, TlsRedis, eventually, in_own_network, path_text,
    require, seed, soon,
};

/// A peer may be silent for less than four seconds. No other timeout ends a session.
const SETTINGS: &str =
    "keepalive: {idle: 1s, interval: 1s, probes: 3}, idle_timeout: 1h, half_close_timeout: 1h";
const PEER_TIMEOUT: Duration = Duration::from_secs(4);
const NETWORK: &str = "nft add table inet statera; \
    nft add set inet statera vanished '{ type inet_service; }'; \
    nft add chain inet statera in '{ type filter hook input priority 0; }'; \
    nft add rule inet statera in tcp sport @vanished drop; \
    nft add rule inet statera in tcp dport @vanished drop";

/// Drops all packets from and to `client` from now on.
fn client_vanishes(client: &Peer) {
    let Peer::Tcp(stream) = client else { panic!("a unix socket does not vanish") };
    vanishes(stream.local_addr().expect("bound").port());
}

/// The same for one connection to a backend, by the proxy's port.
fn backend_vanishes(backend: &Peer) {
    let Peer::Tcp(stream) = backend else { panic!("a unix socket does not vanish") };
    vanishes(stream.peer_addr().expect("connected").port());
}

fn vanishes(port: u16) {
    change_vanished("add", port);
}

/// Stops dropping the packets from and to `port`.
fn returns(port: u16) {
    change_vanished("delete", port);
}

fn change_vanished(change: &str, port: u16) {
    require("nft", "nftables");
    let rule = format!("{change} element inet statera vanished {{ {port} }}");
    let status = Command::new("nft").arg(rule).status().expect("nft starts");
    assert!(status.success(), "nft: {status}");
}

/// Makes each of these functions a test that runs in its own network namespace.
macro_rules! in_own_networks {
    ($($name:ident)*) => {
        mod in_own_network {
            $(#[tokio::test] async fn $name() {
                let name = concat!("vanished::in_own_network::", stringify!($name));
                if super::in_own_network(name, super::NETWORK) {
                    super::$name().await;
                }
            })*
        }
    };
}

in_own_networks! {
    a_backend_that_vanishes_with_a_request_under_way_is_noticed
    a_backend_that_vanishes_is_noticed_although_its_client_goes_on_sending
    a_backend_that_vanishes_before_its_half_closed_client_has_the_answer_is_noticed
    a_client_that_vanishes_with_an_answer_under_way_is_noticed
    a_client_that_vanishes_during_a_download_is_noticed
    a_client_that_vanishes_during_a_spliced_download_is_noticed
    a_client_that_vanishes_with_its_window_closed_is_noticed
    a_side_that_vanishes_after_the_other_was_reset_is_noticed
    a_client_that_vanishes_in_the_queue_is_noticed
    a_redis_that_vanishes_is_noticed_and_followed_again
    a_redis_behind_tls_that_vanishes_is_noticed_and_followed_again
    live_peers_that_read_nothing_for_longer_than_the_timeout_are_kept
    live_peers_with_lost_packets_are_kept
}

async fn a_backend_that_vanishes_with_a_request_under_way_is_noticed() {
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"question").await;
    backend.hears(b"question").await;
    backend_vanishes(&backend);
    client.say(b"next").await;
    client.hears_a_reset().await;
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
}

async fn a_backend_that_vanishes_is_noticed_although_its_client_goes_on_sending() {
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (mut client, backend) = pair.session().await;
    backend_vanishes(&backend);
    let mut pace = interval(Duration::from_millis(100));
    let sends = async {
        loop {
            pace.tick().await;
            if client.write_all(b".").await.is_err() {
                return;
            }
        }
    };
    soon("the client gets an error", sends).await;
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
}

async fn a_backend_that_vanishes_before_its_half_closed_client_has_the_answer_is_noticed() {
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (mut client, backend) = pair.session().await;
    backend_vanishes(&backend);
    client.say(b"question").await;
    client.end().await;
    client.hears_a_reset().await;
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
}

async fn a_client_that_vanishes_with_an_answer_under_way_is_noticed() {
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"question").await;
    backend.hears(b"question").await;
    client_vanishes(&client);
    backend.say(b"answer").await;
    backend.hears_a_reset().await;
    assert_eq!(pair.line().await["close_reason"], "client_reset");
}

async fn during_a_download(kind: Kind) {
    let pair = Pair::new(kind, SETTINGS).await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    // The client reads until it vanishes, so its window is open and megabytes are unacknowledged.
    tokio::select! {
        () = pattern.send(&mut backend, u64::MAX) => unreachable!("it has no end"),
        () = pattern.expect(&mut client, 32 * 1024 * 1024) => {}
    }
    client_vanishes(&client);
    let write = async { while backend.write_all(pattern.from(0, u64::MAX)).await.is_ok() {} };
    soon("the backend gets an error", write).await;
    assert_eq!(pair.line().await["close_reason"], "client_reset");
}

async fn a_client_that_vanishes_during_a_download_is_noticed() {
    during_a_download(Kind::Tcp).await;
}

async fn a_client_that_vanishes_during_a_spliced_download_is_noticed() {
    during_a_download(Kind::Spliced).await;
}

async fn a_client_that_vanishes_with_its_window_closed_is_noticed() {
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (client, mut backend) = pair.session().await;
    client.shrink_buffers();
    let pattern = Pattern::new(seed());
    backend.stuff(&pattern, u64::MAX).await;
    client_vanishes(&client);
    let write = async { while backend.write_all(pattern.from(0, u64::MAX)).await.is_ok() {} };
    soon("the backend gets an error", write).await;
    assert_eq!(pair.line().await["close_reason"], "client_reset");
}

/// Before the proxy passes a reset on, the other side has time to take the bytes that were written to it. A
/// vanished peer gets no more time for that than in any other state.
async fn a_side_that_vanishes_after_the_other_was_reset_is_noticed() {
    // More bytes than the few packets that the proxy counts as delivered although they are unacknowledged.
    const REASON_BYTES: u64 = 500_000;
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (client, mut backend) = pair.session().await;
    client_vanishes(&client);
    let pattern = Pattern::new(seed());
    pattern.send(&mut backend, REASON_BYTES).await;
    let passed_on = || async { pair.proxy.metric(&received(&pair)) == Some(REASON_BYTES as f64) };
    eventually("it was passed on", passed_on).await;
    backend.reset();
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
}

async fn a_client_that_vanishes_in_the_queue_is_noticed() {
    let queue = format!("{SETTINGS}, max_connections: 1, queue: {{size: 1, timeout: 1h}}");
    let pair = Pair::new(Kind::Tcp, &queue).await;
    let (_client, _backend) = pair.session().await;
    let mut waiting = Peer::connect(pair.proxy.address()).await;
    waiting.say(b"question").await;
    let queued = |count: f64| {
        let proxy = &pair.proxy;
        move || async move { proxy.metric("statera_pool_queue{pool=\"web\"}") == Some(count) }
    };
    eventually("the client waits", queued(1.0)).await;
    client_vanishes(&waiting);
    eventually("it leaves the queue", queued(0.0)).await;
    assert_eq!(pair.line().await["close_reason"], "queue_left");
}

async fn a_redis_that_vanishes_is_noticed_and_followed_again() {
    let redis = Redis::start().await;
    vanishes_and_returns(&redis, &redis.url(), "").await;
}

async fn a_redis_behind_tls_that_vanishes_is_noticed_and_followed_again() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    let tls = format!(", tls: {{ca_file: \"{}\"}}", path_text(&authority.file()));
    vanishes_and_returns(&secure.redis, &secure.url(), &tls).await;
}

/// `redis` vanishes until the proxy has noticed it, returns, and gets another weight.
async fn vanishes_and_returns(redis: &Redis, url: &str, tls: &str) {
    let port = url.rsplit(':').next().and_then(|rest| rest.split('/').next()).expect("a port");
    let port = port.parse().expect("a port");
    let proxy =
        Proxy::web(&format!("redis: {{url: \"{url}\"{tls}, resync_interval: 1h}}"), "weights_key: servers");
    let has = |weight: f64| {
        let proxy = &proxy;
        move || async move { proxy.weights() == [("10.0.0.1:80".to_owned(), weight)] }
    };
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    eventually("the table arrives", has(1.0)).await;
    vanishes(port);
    let is_connected = |expected: f64| {
        let proxy = &proxy;
        move || async move { proxy.metric("statera_redis_connected") == Some(expected) }
    };
    eventually("it is noticed", is_connected(0.0)).await;
    returns(port);
    redis.run("ZADD servers 2 10.0.0.1:80").await;
    eventually("it is followed again", has(2.0)).await;
}

fn received(pair: &Pair) -> String {
    format!(
        "statera_backend_bytes_received_total{{pool=\"web\",backend=\"127.0.0.1:{}\"}}",
        pair.backend_port()
    )
}

async fn live_peers_that_read_nothing_for_longer_than_the_timeout_are_kept() {
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let pattern = Pattern::new(seed());
    let (mut client, mut backend) = pair.session().await;
    let (mut uploader, mut slow_backend) = pair.session().await;
    let (mut silent, mut silent_backend) = pair.session().await;
    client.shrink_buffers();
    let downloaded = backend.stuff(&pattern, u64::MAX).await;
    let uploaded = uploader.stuff(&pattern, u64::MAX).await;

    // Meanwhile another peer vanishes three times, and each time its silence is noticed.
    for _ in 0..3 {
        let (client, mut backend) = pair.session().await;
        client_vanishes(&client);
        backend.say(b"answer").await;
        backend.hears_a_reset().await;
    }
    eventually("they are logged", || async { pair.proxy.access_lines().len() >= 3 }).await;
    let lines = pair.proxy.access_lines();
    assert_eq!(lines.len(), 3, "{lines:?}");
    let silence: f64 = lines.iter().map(|line| line["duration_ms"].as_f64().expect("a number")).sum();
    assert!(silence >= 3.0 * PEER_TIMEOUT.as_secs_f64() * 1e3 - 1e3, "{silence} ms");

    pattern.expect(&mut client, downloaded).await;
    pattern.expect(&mut slow_backend, uploaded).await;
    silent.say(b"question").await;
    silent_backend.hears(b"question").await;
    silent_backend.say(b"answer").await;
    silent.hears(b"answer").await;
}

/// A third of the client's packets, chosen at random, is lost.
async fn live_peers_with_lost_packets_are_kept() {
    const ROUNDS: usize = 40;
    let pair = Pair::new(Kind::Tcp, SETTINGS).await;
    let (mut client, mut backend) = pair.session().await;
    let Peer::Tcp(stream) = &client else { panic!("a client comes by TCP") };
    let port = stream.local_addr().expect("bound").port();
    let rule = format!("add rule inet statera in tcp sport {port} numgen random mod 3 == 0 drop");
    let status = Command::new("nft").arg(rule).status().expect("nft starts");
    assert!(status.success(), "nft: {status}");
    let mut pace = interval(PEER_TIMEOUT / 20);
    for _ in 0..ROUNDS {
        pace.tick().await;
        backend.say(b"question").await;
        client.hears(b"question").await;
        client.say(b"answer").await;
        backend.hears(b"answer").await;
    }
}
