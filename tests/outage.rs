//! One of three backends fails under a thousand sessions a second. The backends are nginx processes that are
//! killed, frozen, cut off by a packet filter or closed, some of them with a full accept queue. The last
//! scenario changes weights for a while and shows that an ejected backend stays ejected.

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
    Backend, Nginx, Proxy, Redis, backend_series, dead_address, eventually, get, greeting, in_own_network,
    output,
};

const TICK: Duration = Duration::from_millis(10);
const SESSIONS_A_TICK: usize = 10;
const AT_ONCE: usize = 4_000;
const MOST: usize = 60_000;

/// Opens sessions at a fixed rate, without waiting for the earlier ones to end.
struct Load {
    stop: Arc<AtomicBool>,
    begun: Arc<AtomicU64>,
    sessions: JoinHandle<Vec<Session>>,
}

struct Session {
    begun: Instant,
    ended: Instant,
    /// The body of the backend's answer, or the error.
    answer: Result<String, String>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sessions = tokio::spawn(run(address, Arc::clone(&stop), Arc::clone(&begun)));
        Self { stop, begun, sessions }
    }

    /// Waits until `sessions` more sessions have begun.
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

/// Three nginx processes behind a proxy, under load. The first of them is the one that fails.
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

    /// A metric of the backend that fails.
    fn metric(&self, name: &str, more: &str) -> f64 {
        let backend = self.nginx[0].address;
        let series = format!("statera_backend_{name}{{pool=\"web\",backend=\"{backend}\"{more}}}");
        self.proxy.metric(&series).unwrap_or_default()
    }

    /// Sessions of the failing backend: those that connected and those that could not.
    fn attempts(&self) -> f64 {
        self.metric("connections_total", "") + self.metric("connect_failures_total", "")
    }

    fn checks(&self, result: &str) -> f64 {
        self.metric("health_checks_total", &format!(",result=\"{result}\""))
    }
}

const CHECKS: &str = "health_check: {interval: 300ms, timeout: 150ms, rise: 2, fall: 3, \
     send: \"GET / HTTP/1.0\\r\\n\\r\\n\", expect: \"200 OK\"}";

/// How the pool's outlier detection is set.
#[derive(Clone, Copy)]
enum Outlier {
    Off,
    Default,
    /// With ejections so short that several end during the outage.
    Short,
}

/// Breaks the first backend, mends it, and asserts what holds for every kind of outage: from the third
/// failed check until the second passed one the backend gets no sessions; then it gets its share and no
/// burst. The only sessions that may fail are those that were on the backend when it broke.
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
    eventually("the backend is marked as down", || async { setup.metric("up", "") == 0.0 }).await;
    println!("marked as down after {:?}", broken.elapsed());
    // More may have failed than `fall`: on a busy machine a check can fail and the next one pass.
    let fall_reached = || setup.checks("failed") - failed >= 3.0;
    if matches!(outlier, Outlier::Off) {
        assert!(fall_reached(), "`fall` checks decide");
    }
    eventually("`fall` checks have failed", || async { fall_reached() }).await;
    // Sessions that were connecting are counted when they give up, after `connect.timeout`: the time of 200
    // sessions.
    setup.load.more(600).await;
    let attempts = setup.attempts();
    setup.load.more(1_000).await;
    assert_eq!(setup.attempts(), attempts, "sessions were sent to an unhealthy backend");

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
        *shares.entry(session.answer.as_deref().unwrap_or("none")).or_insert(0) += 1;
    }
    let all: i32 = shares.values().sum();
    // The sessions are ordered by their begin at the client, not by their pick, so an even spread deviates a
    // little.
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
async fn a_killed_backend_costs_only_its_own_sessions() {
    kill(Outlier::Off).await;
}

#[tokio::test]
async fn a_killed_backend_that_is_ejected_costs_only_its_own_sessions() {
    kill(Outlier::Default).await;
}

#[tokio::test]
async fn a_backend_killed_for_longer_than_its_ejections_costs_only_its_own_sessions() {
    kill(Outlier::Short).await;
}

async fn freeze(outlier: Outlier, backlog: u32) {
    let freeze = async |nginx: &mut Nginx| nginx.server.signal(Signal::STOP);
    outage(outlier, backlog, freeze, async |nginx| nginx.server.signal(Signal::CONT)).await;
}

#[tokio::test]
async fn a_frozen_backend_costs_only_its_own_sessions() {
    freeze(Outlier::Off, 4096).await;
}

#[tokio::test]
async fn a_frozen_backend_with_outlier_detection_costs_only_its_own_sessions() {
    freeze(Outlier::Default, 4096).await;
}

/// Long enough for ten connections at once. At the test's rate it is full 0.2 s after nginx stops accepting.
const SHORT_BACKLOG: u32 = 64;

#[tokio::test]
async fn a_frozen_backend_with_a_full_accept_queue_costs_only_its_own_sessions() {
    freeze(Outlier::Off, SHORT_BACKLOG).await;
}

#[tokio::test]
async fn a_frozen_backend_with_a_full_accept_queue_that_is_ejected_costs_only_its_own_sessions() {
    freeze(Outlier::Short, SHORT_BACKLOG).await;
}

/// QUIT makes nginx close its listening socket at once and finish the requests it has.
async fn close(outlier: Outlier) {
    outage(outlier, 4096, async |nginx| nginx.server.signal(Signal::QUIT), restart).await;
}

#[tokio::test]
async fn a_closed_backend_costs_only_its_own_sessions() {
    close(Outlier::Off).await;
}

#[tokio::test]
async fn a_closed_backend_that_is_ejected_costs_only_its_own_sessions() {
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
async fn a_backend_that_is_cut_off_costs_only_its_own_sessions() {
    cut_off_in("outage::a_backend_that_is_cut_off_costs_only_its_own_sessions", Outlier::Off).await;
}

#[tokio::test]
async fn a_backend_that_is_cut_off_and_ejected_costs_only_its_own_sessions() {
    cut_off_in("outage::a_backend_that_is_cut_off_and_ejected_costs_only_its_own_sessions", Outlier::Default)
        .await;
}

#[tokio::test]
async fn without_checks_failed_sessions_eject_a_backend_and_a_trial_session_brings_it_back() {
    let settings = "outlier: {consecutive_failures: 5, ejection: 1s, max_ejected_percent: 50}";
    let mut setup = Setup::start(settings, 4096).await;
    setup.nginx[0].server.signal(Signal::KILL);
    setup.nginx[0].server.wait().await;
    // Only now: a session that began before may have been cut by the kill.
    let broken = Instant::now();
    eventually("it is ejected", || async { setup.metric("up", "") == 0.0 }).await;
    eventually("trial sessions have failed", || async { setup.metric("ejections_total", "") >= 3.0 }).await;
    // Each ejection but the first was preceded by one trial session.
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

/// A thousand changes a second for five seconds; for a minute with STATERA_LONG.
#[tokio::test]
async fn an_ejected_backend_stays_ejected_through_thousands_of_weight_changes() {
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
        let series = backend_series("connect_failures_total", dead);
        proxy.metric(&series).unwrap_or_default()
    };
    let version = || proxy.metric("statera_snapshot_version{pool=\"web\"}").unwrap_or_default();
    eventually("the table arrives", || async { proxy.weights().len() == 4 }).await;
    while proxy.metric(&backend_series("up", dead)) == Some(1.0) {
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
    // The round robin goes on from snapshot to snapshot instead of beginning again with each.
    let sessions: u32 = counts.values().sum();
    for (name, weight) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
        let stray = (f64::from(counts[name]) - f64::from(sessions) * weight / 6.0).abs();
        assert!(stray <= 12.0, "{name} strayed by {stray}: {counts:?}");
    }
}
