//! One of three backends is lost in each way in which that happens, under a thousand sessions a second: real nginx processes,
//! killed, frozen, cut off, closed, and with a full queue. And what a minute of weight changes does to what is known of a dead one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::support::{
    Backend, Nginx, Proxy, Redis, dead_address, eventually, get, greeting, in_own_network, output,
};

const TICK: Duration = Duration::from_millis(10);
const SESSIONS_A_TICK: usize = 10;
const AT_ONCE: usize = 4_000;
const MOST: usize = 60_000;

/// Sessions that begin at a pace of their own, whatever becomes of those before.
struct Load {
    stop: Arc<AtomicBool>,
    begun: Arc<AtomicU64>,
    sessions: JoinHandle<Vec<Session>>,
}

struct Session {
    begun: Instant,
    ended: Instant,
    /// What the backend said.
    answer: Result<String, String>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sessions = tokio::spawn(run(address, Arc::clone(&stop), Arc::clone(&begun)));
        Self { stop, begun, sessions }
    }

    /// Waits until this many more have begun.
    async fn more(&self, sessions: u64) {
        let wanted = self.begun.load(Relaxed) + sessions;
        eventually("sessions begin", || async { self.begun.load(Relaxed) >= wanted }).await;
    }

    async fn stop(self) -> Vec<Session> {
        self.stop.store(true, Relaxed);
        self.sessions.await.expect("the load does not panic")
    }
}

async fn run(address: SocketAddr, stop: Arc<AtomicBool>, count: Arc<AtomicU64>) -> Vec<Session> {
    let (permits, mut running) = (Arc::new(Semaphore::new(AT_ONCE)), JoinSet::new());
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while !stop.load(Relaxed) && running.len() < MOST {
        ticks.tick().await;
        for _ in 0..SESSIONS_A_TICK {
            let permit = Arc::clone(&permits).acquire_owned().await.expect("never closed");
            count.fetch_add(1, Relaxed);
            running.spawn(async move {
                let begun = Instant::now();
                let answer = match get(address, "/").await {
                    Ok(answer) => Ok(answer.body),
                    Err(error) => Err(error.to_string()),
                };
                drop(permit);
                Session { begun, ended: Instant::now(), answer }
            });
        }
    }
    running.join_all().await
}

/// Three nginx behind a proxy with `settings`, under load.
struct Setup {
    nginx: [Nginx; 3],
    proxy: Proxy,
    load: Load,
}

impl Setup {
    async fn start(settings: &str, backlog: u32) -> Self {
        let start = |name| Nginx::start_at(crate::support::free_port(), name, backlog);
        let nginx = [start("one").await, start("two").await, start("three").await];
        let members: Vec<String> = nginx.iter().map(|nginx| format!("\"{}\": 1", nginx.address)).collect();
        let proxy = Proxy::web(
            "log: {access: false}",
            &format!(
                "balance: weighted_round_robin, connect: {{timeout: 200ms, attempts: 3}}, {settings}, \
                 backends: {{{}}}",
                members.join(", ")
            ),
        );
        let load = Load::start(proxy.address());
        load.more(500).await;
        Self { nginx, proxy, load }
    }

    /// Of the backend that is lost.
    fn metric(&self, name: &str, more: &str) -> f64 {
        let backend = self.nginx[0].address;
        let series = format!("statera_backend_{name}{{pool=\"web\",backend=\"{backend}\"{more}}}");
        self.proxy.metric(&series).unwrap_or_default()
    }

    /// Sessions that were sent to it, and those that tried.
    fn attempts(&self) -> f64 {
        self.metric("connections_total", "") + self.metric("connect_failures_total", "")
    }

    fn checks(&self, result: &str) -> f64 {
        self.metric("health_checks_total", &format!(",result=\"{result}\""))
    }
}

const CHECKS: &str = "health_check: {interval: 300ms, timeout: 150ms, rise: 2, fall: 3, \
     send: \"GET / HTTP/1.0\\r\\n\\r\\n\", expect: \"200 OK\"}";

/// What sessions see of an outage beside the checks.
#[derive(Clone, Copy)]
enum Outlier {
    Off,
    Default,
    /// The outage outlasts many an ejection.
    Short,
}

/// What an outage must not do, whichever way it comes: the backend gets nothing from the third check that fails on, until the
/// second one that passes; then it gets its share, and no more. Only sessions that were on it may fail.
async fn outage(
    outlier: Outlier,
    backlog: u32,
    break_it: impl AsyncFnOnce(&mut Nginx),
    mend_it: impl AsyncFnOnce(&mut Nginx),
) {
    let settings = match outlier {
        Outlier::Off => "outlier: off, ",
        Outlier::Default => "",
        Outlier::Short => "outlier: {ejection: 100ms}, ",
    };
    let mut setup = Setup::start(&format!("{settings}{CHECKS}"), backlog).await;
    let (broken, failed) = (Instant::now(), setup.checks("failed"));
    break_it(&mut setup.nginx[0]).await;
    eventually("it is found out", || async { setup.metric("up", "") == 0.0 }).await;
    println!("found out after {:?}", broken.elapsed());
    // One may have failed, and the next one passed, for want of a processor.
    let found_out = || setup.checks("failed") - failed >= 3.0;
    if matches!(outlier, Outlier::Off) {
        assert!(found_out(), "`fall` checks decide");
    }
    eventually("the checks find it out", || async { found_out() }).await;
    // Those who tried before are counted when they give up: after `connect.timeout`, which is 200 sessions.
    setup.load.more(600).await;
    let attempts = setup.attempts();
    setup.load.more(1_000).await;
    assert_eq!(setup.attempts(), attempts, "sessions were sent to it all the same");

    let passed = setup.checks("passed");
    mend_it(&mut setup.nginx[0]).await;
    eventually("it is back", || async { setup.metric("up", "") == 1.0 }).await;
    let rise = setup.checks("passed") - passed;
    assert!(rise >= 2.0, "it came back after {rise} checks that passed");
    setup.load.more(20).await;
    let back = Instant::now();
    setup.load.more(1_500).await;
    let counted = Instant::now();
    let sessions = setup.load.stop().await;

    let failed: Vec<_> = sessions.iter().filter(|session| session.answer.is_err()).collect();
    let on_it = failed.iter().filter(|session| session.begun < broken && session.ended >= broken);
    let (failures, allowed) = (failed.len(), on_it.count());
    println!("{failures} of {} sessions failed, {allowed} of them were on it", sessions.len());
    assert_eq!(failures, allowed, "{:?}", failed.first().map(|session| &session.answer));

    let mut shares = BTreeMap::new();
    for session in sessions.iter().filter(|session| session.begun >= back && session.begun < counted) {
        *shares.entry(session.answer.as_deref().unwrap_or("nobody")).or_insert(0) += 1;
    }
    let all: i32 = shares.values().sum();
    // An even spread strays by some sessions; their order here is that of the clients' begin, not that of the picks.
    let most = all / 3 + 60;
    assert!(shares.values().all(|share| (all / 3 - 60..=most).contains(share)), "a burst: {shares:?}");
}

async fn restart(nginx: &mut Nginx) {
    let (name, port) = ("one", nginx.address.port());
    *nginx = Nginx::start_at(port, name, 4096).await;
}

async fn kill(outlier: Outlier) {
    let kill = async |nginx: &mut Nginx| {
        nginx.server.signal(Signal::KILL);
        nginx.server.wait().await;
    };
    outage(outlier, 4096, kill, restart).await;
}

#[tokio::test]
async fn killed() {
    kill(Outlier::Off).await;
}

#[tokio::test]
async fn killed_and_ejected() {
    kill(Outlier::Default).await;
}

#[tokio::test]
async fn killed_for_longer_than_it_is_ejected() {
    kill(Outlier::Short).await;
}

async fn freeze(outlier: Outlier, backlog: u32) {
    let freeze = async |nginx: &mut Nginx| nginx.server.signal(Signal::STOP);
    outage(outlier, backlog, freeze, async |nginx| nginx.server.signal(Signal::CONT)).await;
}

#[tokio::test]
async fn frozen() {
    freeze(Outlier::Off, 4096).await;
}

#[tokio::test]
async fn frozen_with_an_outlier() {
    freeze(Outlier::Default, 4096).await;
}

/// Enough for ten at once; full a fifth of a second after nobody accepts.
const SHORT_BACKLOG: u32 = 64;

#[tokio::test]
async fn frozen_with_a_full_queue() {
    freeze(Outlier::Off, SHORT_BACKLOG).await;
}

#[tokio::test]
async fn frozen_with_a_full_queue_and_ejected() {
    freeze(Outlier::Short, SHORT_BACKLOG).await;
}

/// QUIT closes nginx's socket at once, and lets it finish what it has.
async fn close(outlier: Outlier) {
    outage(outlier, 4096, async |nginx| nginx.server.signal(Signal::QUIT), restart).await;
}

#[tokio::test]
async fn closed() {
    close(Outlier::Off).await;
}

#[tokio::test]
async fn closed_and_ejected() {
    close(Outlier::Default).await;
}

async fn cut_off_in(scenario: &str, outlier: Outlier) {
    if !in_own_network(scenario, "nft add table inet statera") {
        return;
    }
    let nft = async |rule: String| {
        let mut command = Command::new("nft");
        command.arg(rule);
        let done = output(command).await;
        assert!(done.status.success(), "nft: {}", String::from_utf8_lossy(&done.stderr));
    };
    outage(
        outlier,
        4096,
        async |nginx| {
            let port = nginx.address.port();
            nft("add chain inet statera in { type filter hook input priority 0; }".to_owned()).await;
            nft(format!("add rule inet statera in tcp dport {port} drop")).await;
        },
        async |_| nft("delete chain inet statera in".to_owned()).await,
    )
    .await;
}

#[tokio::test]
async fn cut_off() {
    cut_off_in("outage::cut_off", Outlier::Off).await;
}

#[tokio::test]
async fn cut_off_and_ejected() {
    cut_off_in("outage::cut_off_and_ejected", Outlier::Default).await;
}

#[tokio::test]
async fn without_checks_its_sessions_eject_it_and_bring_it_back() {
    let settings = "outlier: {consecutive_failures: 5, ejection: 1s, max_ejected_percent: 50}";
    let mut setup = Setup::start(settings, 4096).await;
    let broken = Instant::now();
    setup.nginx[0].server.signal(Signal::KILL);
    setup.nginx[0].server.wait().await;
    eventually("it is ejected", || async { setup.metric("up", "") == 0.0 }).await;
    eventually("it was probed in vain", || async { setup.metric("ejections_total", "") >= 3.0 }).await;
    // Each ejection but the first has seen one probe.
    let failures = setup.metric("connect_failures_total", "");
    assert!(failures < 60.0, "{failures} sessions tried it");
    restart(&mut setup.nginx[0]).await;
    eventually("it is back", || async { setup.metric("up", "") == 1.0 }).await;
    setup.load.more(300).await;
    let sessions = setup.load.stop().await;
    let failed = sessions.iter().filter(|session| session.answer.is_err() && session.begun >= broken).count();
    assert_eq!(failed, 0, "of {} sessions", sessions.len());
    assert!(sessions.iter().rev().take(200).any(|session| session.answer.as_deref() == Ok("one")));
}

/// Five seconds of a thousand changes a second, a minute with STATERA_LONG.
#[tokio::test]
async fn what_is_known_of_a_dead_backend_survives_any_number_of_weight_changes() {
    let seconds = if std::env::var_os("STATERA_LONG").is_some() { 60 } else { 5 };
    let redis = Redis::start().await;
    let (living, (_guard, dead)) =
        ([Backend::named("a").await, Backend::named("b").await, Backend::named("c").await], dead_address());
    let table = |factor: u64| {
        let weights =
            living.iter().zip([1, 2, 3]).map(|(b, weight)| format!("{} {}", weight * factor, b.address));
        format!("ZADD servers {} {factor} {dead}", weights.collect::<Vec<_>>().join(" "))
    };
    redis.run(&table(1)).await;
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\"}}\nlog: {{access: false}}", redis.url()),
        "weights_key: servers, balance: weighted_round_robin, outlier: {ejection: 1h}",
    );
    let failures = || {
        let series = format!("statera_backend_connect_failures_total{{pool=\"web\",backend=\"{dead}\"}}");
        proxy.metric(&series).unwrap_or_default()
    };
    let version = || proxy.metric("statera_snapshot_version{pool=\"web\"}").unwrap_or_default();
    eventually("the table arrives", || async { proxy.weights().len() == 4 }).await;
    while proxy.metric(&format!("statera_backend_up{{pool=\"web\",backend=\"{dead}\"}}")) == Some(1.0) {
        greeting(proxy.address()).await.expect("a retry finds another one");
    }
    let (failed_before, version_before) = (failures(), version());

    let (over, changes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writing = {
        let (over, changes) = (Arc::clone(&over), Arc::clone(&changes));
        let commands: Vec<String> = (1..=50).map(table).collect();
        let client = redis.client();
        std::thread::spawn(move || {
            let mut connection = client.get_connection().expect("redis answers");
            let begun = std::time::SystemTime::now();
            while !over.load(Relaxed) {
                for command in &commands {
                    let mut words = command.split(' ');
                    let mut typed = redis::cmd(words.next().expect("a command"));
                    typed.arg(words.collect::<Vec<_>>());
                    typed.exec(&mut connection).expect("redis takes it");
                    let done = changes.fetch_add(1, Relaxed) + 1;
                    let due = Duration::from_millis(done);
                    if let Some(early) = begun.elapsed().ok().and_then(|passed| due.checked_sub(passed)) {
                        std::thread::sleep(early);
                    }
                }
            }
        })
    };
    let (begun, mut counts) = (Instant::now(), BTreeMap::<String, u32>::new());
    while begun.elapsed() < Duration::from_secs(seconds) {
        *counts.entry(greeting(proxy.address()).await.expect("an answer")).or_default() += 1;
    }
    over.store(true, Relaxed);
    writing.join().expect("the writer does not panic");

    let (changes, snapshots) = (changes.load(Relaxed), version() - version_before);
    println!("{changes} changes, {snapshots} snapshots, {counts:?}");
    assert!(changes > seconds * 300 && snapshots > seconds as f64 * 100.0, "that was no storm");
    assert_eq!(failures(), failed_before, "sessions tried it after it was ejected");
    // One spread over all those snapshots, not one each.
    let sessions: u32 = counts.values().sum();
    for (name, weight) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
        let stray = (f64::from(counts[name]) - f64::from(sessions) * weight / 6.0).abs();
        assert!(stray <= 12.0, "{name} strayed by {stray}: {counts:?}");
    }
}
