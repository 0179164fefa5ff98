//! The storm: a thousand weight changes a second under two thousand connections a second, for half a minute.
//!
//! Each change multiplies all weights by one factor, so that the table changes all the time while the shares
//! stay the same. One backend changes between weight zero and its weight about every second.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use statera::metrics::Observed;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::support::{PATIENCE, Proxy, Redis, eventually};

const LENGTH: Duration = Duration::from_secs(30);
const CHANGES_PER_SECOND: f64 = 1_000.0;
const SESSIONS_PER_SECOND: f64 = 2_000.0;
/// The test fails if less than this part of the rates was reached.
const LEAST_PART: f64 = 0.5;
const TICK: Duration = Duration::from_millis(5);
const PHASE: Duration = Duration::from_secs(1);
const AT_ONCE: usize = 1_000;

/// The weights of the backends. The last backend changes between its weight and zero.
const WEIGHTS: [f64; 6] = [1.0, 2.0, 3.5, 0.5, 5.0, 4.0];
const COMES_AND_GOES: usize = 5;

/// The state of the backend [`COMES_AND_GOES`]: `Storm::phase` modulo 4.
mod phase {
    pub(super) const IN: u64 = 0;
    pub(super) const LEAVING: u64 = 1;
    pub(super) const OUT: u64 = 2;
    pub(super) const COMING: u64 = 3;
}

#[derive(Default)]
struct Storm {
    over: AtomicBool,
    phase: AtomicU64,
    changes: AtomicU64,
    sessions: AtomicU64,
    lost: AtomicU64,
    /// Sessions of each backend that began and ended in one phase in which the proxy surely had the weight,
    /// or zero.
    settled_in: [AtomicU64; WEIGHTS.len()],
    settled_out: [AtomicU64; WEIGHTS.len()],
}

#[tokio::test]
async fn a_storm_of_changes_loses_no_session_and_keeps_the_shares_and_weight_zero() {
    let redis = Redis::start().await;
    let backends = serve_backends();
    redis.run(&change(&backends, 1.0, true).join(" ")).await;
    // With three addresses no client port is needed again while its last connection is in TIME_WAIT.
    let proxy = Proxy::start(&format!(
        "workers: 2\nlisteners: {{web: {{bind: [\"127.0.0.1:0\", \"127.0.0.2:0\", \"127.0.0.3:0\"], pool: web}}}}\n\
         pools: {{web: {{weights_key: servers}}}}\nredis: {{url: \"{}\"}}\nlog: {{access: false}}\n",
        redis.url()
    ));
    eventually("the table arrives", || async { proxy.weights().len() == WEIGHTS.len() }).await;

    let storm = Arc::new(Storm::default());
    let writer = {
        let (storm, observed, client) = (Arc::clone(&storm), proxy.running.observed.clone(), redis.client());
        let backends = backends.clone();
        thread::spawn(move || write(&client, &backends, &observed, &storm))
    };
    let begun = Instant::now();
    connect(&proxy.running.addresses[0].1, &storm).await;
    let seconds = begun.elapsed().as_secs_f64();
    storm.over.store(true, SeqCst);
    writer.join().expect("the writer does not panic");

    let (changes, sessions) = (storm.changes.load(SeqCst) as f64, storm.sessions.load(SeqCst) as f64);
    let snapshots = proxy.metric("statera_snapshot_version{pool=\"web\"}").expect("it is counted");
    println!(
        "{:.0} changes and {:.0} sessions a second for {seconds:.0} s, {snapshots} snapshots, {} phases; in {:?}, out {:?}",
        changes / seconds,
        sessions / seconds,
        storm.phase.load(SeqCst),
        storm.settled_in,
        storm.settled_out,
    );
    assert_eq!(storm.lost.load(SeqCst), 0, "sessions were lost");
    assert!(changes >= LEAST_PART * CHANGES_PER_SECOND * LENGTH.as_secs_f64(), "only {changes} changes");
    assert!(sessions >= LEAST_PART * SESSIONS_PER_SECOND * LENGTH.as_secs_f64(), "only {sessions} sessions");
    assert!(snapshots >= 1_000.0, "only {snapshots} snapshots: the table rested");
    assert!(storm.phase.load(SeqCst) >= 8, "the backend did not come and go");
    assert_eq!(
        storm.settled_out[COMES_AND_GOES].load(SeqCst),
        0,
        "picked although its weight was settled at zero"
    );
    within_the_binomial_bound(&storm.settled_in, &WEIGHTS);
    within_the_binomial_bound(&storm.settled_out[..COMES_AND_GOES], &WEIGHTS[..COMES_AND_GOES]);
    assert_eq!(proxy.picks("configured"), 0.0);
}

/// Asserts that the counts are within six standard deviations of the shares: a correct picker is outside
/// once in half a billion.
fn within_the_binomial_bound(counts: &[AtomicU64], weights: &[f64]) {
    let sessions: u64 = counts.iter().map(|count| count.load(SeqCst)).sum();
    let total: f64 = weights.iter().sum();
    assert!(sessions > 1_000, "only {sessions} sessions in this phase");
    for (backend, (count, weight)) in counts.iter().zip(weights).enumerate() {
        let (sessions, share, count) = (sessions as f64, weight / total, count.load(SeqCst) as f64);
        let bound = 6.0 * (sessions * share * (1.0 - share)).sqrt();
        let deviation = (count - sessions * share).abs();
        assert!(
            deviation <= bound,
            "backend {backend}: {count} of {sessions} sessions deviates by {deviation:.0} > {bound:.0}"
        );
    }
}

/// Starts backends that send their number and close. They run on one thread, which ends with the process.
fn serve_backends() -> Vec<SocketAddr> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(async {
            let mut addresses = Vec::new();
            for number in 0..WEIGHTS.len() {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                addresses.push(listener.local_addr().expect("bound"));
                tokio::spawn(async move {
                    loop {
                        let (mut stream, _) = listener.accept().await.expect("descriptors");
                        // An error here shows at the client, too.
                        let _ = stream.write_all(&[b'0' + number as u8]).await;
                    }
                });
            }
            sender.send(addresses).expect("the scenario waits");
            std::future::pending::<()>().await;
        });
    });
    receiver.recv().expect("they start")
}

/// The words of one command that changes every weight and no share.
fn change(backends: &[SocketAddr], factor: f64, is_in: bool) -> Vec<String> {
    let mut words = vec!["ZADD".to_owned(), "servers".to_owned()];
    for (number, (backend, weight)) in backends.iter().zip(WEIGHTS).enumerate() {
        let weight = if number == COMES_AND_GOES && !is_in { 0.0 } else { weight * factor };
        words.extend([weight.to_string(), backend.to_string()]);
    }
    words
}

/// Changes weights at the wanted rate, and begins the next phase when the proxy has the weight that the
/// current one is for.
fn write(client: &redis::Client, backends: &[SocketAddr], observed: &Observed, storm: &Storm) {
    let mut connection = client.get_connection().expect("redis runs");
    let comes_and_goes = backends[COMES_AND_GOES].to_string();
    let is_in_the_snapshot = || {
        let snapshot = observed.pools()[0].pool.cell.load();
        let member = snapshot.members().iter().find(|member| member.backend.id().as_str() == comes_and_goes);
        member.is_some_and(|member| !member.weight.is_zero())
    };
    let begun = Instant::now();
    let mut phase_begun = begun;
    let mut written = 0u64;
    while !storm.over.load(SeqCst) && begun.elapsed() < 2 * LENGTH {
        let now = storm.phase.load(SeqCst) % 4;
        let moves_on = match now {
            phase::IN | phase::OUT => phase_begun.elapsed() >= PHASE,
            phase::LEAVING => !is_in_the_snapshot(),
            _ => is_in_the_snapshot(),
        };
        let now = if moves_on {
            phase_begun = Instant::now();
            (storm.phase.fetch_add(1, SeqCst) + 1) % 4
        } else {
            now
        };
        let due = (begun.elapsed().as_secs_f64() * CHANGES_PER_SECOND) as u64;
        let mut changes = redis::pipe();
        // Late changes are caught up with in small bursts.
        let burst = written..due.min(written + 50);
        for number in burst.clone() {
            let factor = 0.1 + (number % 997) as f64 / 100.0;
            changes
                .add_command(command(&change(backends, factor, matches!(now, phase::IN | phase::COMING))))
                .ignore();
        }
        written = burst.end.max(written);
        if !changes.is_empty() {
            changes.query::<()>(&mut connection).expect("redis runs");
        }
        storm.changes.store(written, SeqCst);
        thread::sleep(TICK);
    }
}

fn command(words: &[String]) -> redis::Cmd {
    let mut command = redis::Cmd::new();
    command.arg(words);
    command
}

/// Opens sessions at the wanted rate, without waiting for earlier ones to end.
async fn connect(addresses: &[SocketAddr], storm: &Arc<Storm>) {
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let begun = Instant::now();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut opened = 0u64;
    while begun.elapsed() < LENGTH {
        ticks.tick().await;
        let due = (begun.elapsed().as_secs_f64() * SESSIONS_PER_SECOND) as u64;
        while opened < due {
            let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { break };
            let address = addresses[(opened % addresses.len() as u64) as usize];
            let storm = Arc::clone(storm);
            opened += 1;
            tokio::spawn(async move {
                session(address, &storm).await;
                drop(permit);
            });
        }
    }
    let all = permits.acquire_many(AT_ONCE as u32);
    drop(timeout(PATIENCE, all).await.expect("every session ends").expect("it is never closed"));
}

async fn session(address: SocketAddr, storm: &Storm) {
    let began_in = storm.phase.load(SeqCst);
    let talk = async {
        let mut stream = TcpStream::connect(address).await?;
        let mut name = Vec::new();
        stream.read_to_end(&mut name).await?;
        std::io::Result::Ok(name)
    };
    let name = timeout(PATIENCE, talk).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    let ended_in = storm.phase.load(SeqCst);
    storm.sessions.fetch_add(1, SeqCst);
    let number = match name.as_deref() {
        Ok([digit @ b'0'..=b'5']) => usize::from(digit - b'0'),
        other => {
            if storm.lost.fetch_add(1, SeqCst) < 10 {
                println!("lost: {other:?}");
            }
            return;
        }
    };
    match began_in % 4 {
        phase::IN if began_in == ended_in => storm.settled_in[number].fetch_add(1, SeqCst),
        phase::OUT if began_in == ended_in => storm.settled_out[number].fetch_add(1, SeqCst),
        _ => 0,
    };
}
