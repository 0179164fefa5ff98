//! `statera weights simulate`: it predicts what a proxy does after a change, and changes nothing itself.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::support::{
    Backend, CommandOutput, Operator, Program, Proxy, Redis, dead_address, eventually, seed,
};

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";
const NEW: &str = "db.internal:5432";

/// Runs `statera weights simulate web` with these words, split at spaces, and this config.
async fn simulate(yaml: &str, words: &str) -> CommandOutput {
    let folder = TempDir::new().expect("a folder");
    let config = folder.path().join("config.yaml");
    std::fs::write(&config, yaml).expect("a file");
    let mut command = Command::new(Program::path());
    command.args(["weights", "simulate", "web"]).args(words.split(' ')).arg("-c").arg(config);
    CommandOutput::of(command).await
}

async fn simulated(yaml: &str, words: &str) -> Value {
    let typed = simulate(yaml, &format!("{words} --json")).await;
    assert_eq!((typed.code, typed.stderr.as_str()), (Some(0), ""), "{words}");
    serde_json::from_str(&typed.stdout).unwrap_or_else(|error| panic!("{error}: {}", typed.stdout))
}

fn yaml(top: &str, pool: &str) -> String {
    format!("listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{{pool}}}}}\n{top}\n")
}

/// The member's `now`, `then` and expected sessions.
fn forecast_of<'a>(answer: &'a Value, member: &str) -> (&'a Value, &'a Value, &'a Value) {
    let members = answer["members"].as_array().expect("a list");
    let found =
        members.iter().find(|m| m["member"] == member).unwrap_or_else(|| panic!("{member}: {answer}"));
    (&found["now"], &found["then"], &found["sessions"]["expected"])
}

fn assert_share(side: &Value, weight: f64, percent: f64) {
    let share = side["share_percent"].as_f64().expect("a number");
    assert!(side["weight"] == json!(weight) && (share - percent).abs() < 0.01, "{weight} {percent}: {side}");
}

#[tokio::test]
async fn weights_are_added_to_the_table_in_redis_and_nothing_is_written() {
    let operator = Operator::start().await;
    operator.done(&format!("set web {A}=100 {B}=100")).await;
    operator.redis.run("ZADD servers 1 no-backend").await;
    let keys = || async {
        (operator.table().await, operator.redis.run("KEYS *").await, operator.json("get web").await)
    };
    let before = keys().await;

    let answer = operator.json(&format!("simulate web {B}=300 {NEW}=400 --sessions 800")).await;
    assert_eq!(
        (&answer["now_from"], &answer["version"], &answer["sessions"]),
        (&json!("redis"), &json!(1), &json!(800))
    );
    assert_eq!(answer["left_out"][0]["member"], "no-backend");
    for (member, now, then, share, expected) in [
        (A, Some(100.0), 100.0, 12.5, 100.0),
        (B, Some(100.0), 300.0, 37.5, 300.0),
        (NEW, None, 400.0, 50.0, 400.0),
    ] {
        let (now_is, then_is, sessions) = forecast_of(&answer, member);
        match now {
            Some(weight) => assert_share(now_is, weight, 50.0),
            None => assert_eq!(now_is, &Value::Null, "{member} is new"),
        }
        assert_share(then_is, then, share);
        assert_eq!(sessions, &json!(expected), "{member}");
    }

    let text = operator.done(&format!("simulate web {B}=300 {NEW}=400")).await.stdout;
    for part in [
        "key servers, version 1: nothing is written",
        "of 10000 sessions",
        "50.0 %",
        "->",
        "37.5 %",
        "12.5 %",
        "ignored by proxies: no-backend",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let only = operator.json(&format!("simulate web {B}=300 {NEW}=100 --only")).await;
    assert_eq!((only["members"].as_array().map(Vec::len), &only["now_from"]), (Some(2), &Value::Null));
    assert_share(forecast_of(&only, B).1, 300.0, 75.0);
    assert_eq!(keys().await, before);
}

#[tokio::test]
async fn without_a_redis_section_the_other_backends_come_from_the_config() {
    let pool = format!("backends: {{\"{A}\": 1, \"{B}\": 1}}, balance: source_hash");
    let answer = simulated(&yaml("", &pool), &format!("{B}=0")).await;
    assert_eq!((&answer["now_from"], &answer["version"]), (&json!("config"), &Value::Null));
    assert_share(forecast_of(&answer, A).1, 1.0, 100.0);
    let moved = answer["moved_clients_percent"].as_f64().expect("a number");
    assert!((49.9..=50.1).contains(&moved), "{moved} % move");

    let text = simulate(&yaml("", &pool), &format!("{A}=0 {B}=0")).await.stdout;
    assert!(text.contains("all weights are 0: proxies would refuse sessions"), "{text}");
}

#[tokio::test]
async fn what_cannot_be_simulated_is_named_with_its_exit_code() {
    let (_dead, address) = dead_address();
    let away = yaml(&format!("redis: {{url: \"redis://{address}\"}}"), "");
    for (words, code, why) in [
        (format!("{A}=-1"), 2, "-1 is not a weight"),
        ("10.0.0.256:80=1".to_owned(), 2, "10.0.0.256:80=1: its host is neither"),
        (format!("{A}=1 {A}=2"), 2, "named twice"),
        (format!("{A}=1 --sessions 0"), 2, "--sessions"),
        (format!("{A}=1 --active 5"), 2, "--active: the pool's balance is weighted_random"),
        (format!("{A}=1"), 4, "--only needs no redis"),
    ] {
        let typed = simulate(&away, &words).await;
        assert_eq!((typed.code, typed.stdout.as_str()), (Some(code), ""), "{words}: {}", typed.stderr);
        assert!(typed.stderr.contains(why), "{words}: {}", typed.stderr);
    }
    assert_share(forecast_of(&simulated(&away, &format!("{A}=1 --only")).await, A).1, 1.0, 100.0);
}

/// Opens a session from the address `client` of 127.0.0.0/8. Returns the backend's name and the session.
async fn session(client: u32, proxy: SocketAddr) -> (u8, TcpStream) {
    let socket = TcpSocket::new_v4().expect("a socket");
    let address = Ipv4Addr::from_bits(Ipv4Addr::new(127, 0, 0, 0).to_bits() | client);
    socket.bind(SocketAddr::from((address, 0))).expect("an address of the loopback");
    let mut stream = socket.connect(proxy).await.expect("it listens");
    (stream.read_u8().await.expect("a greeting"), stream)
}

/// Opens `count` sessions with `active` at a time and counts them by backend. As in the simulation, each new
/// session ends a random active one.
async fn sessions(count: u32, active: usize, proxy: SocketAddr) -> HashMap<u8, u32> {
    let mut rng = fastrand::Rng::with_seed(seed());
    let (mut names, mut open) = (HashMap::new(), Vec::new());
    for number in 0..count + 2 * active as u32 {
        if open.len() >= active {
            drop(open.swap_remove(rng.usize(..open.len())));
        }
        // Leaves out the network address and the broadcast address.
        let (name, stream) = session(rng.u32(1..(1 << 24) - 1), proxy).await;
        open.push(stream);
        if number >= 2 * active as u32 {
            *names.entry(name).or_default() += 1;
        }
    }
    names
}

#[tokio::test]
async fn a_proxy_does_what_was_simulated() {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    const SESSIONS: u32 = 2_000;
    const ACTIVE: usize = 12;
    let redis = Redis::start().await;
    let mut backends = Vec::new();
    for name in NAMES {
        // Sends its name and stays open until the client ends, so that `least_conn` sees active sessions.
        backends.push(
            Backend::start(move |mut stream| async move {
                let (mut reader, mut writer) = stream.split();
                use tokio::io::AsyncWriteExt as _;
                if writer.write_all(name.as_bytes()).await.is_ok() {
                    let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
                }
            })
            .await,
        );
    }
    let top = format!("redis: {{url: \"{}\"}}", redis.url());
    redis.set_weights(backends.iter().map(|backend| (backend, 100.0))).await;
    let mut runs = JoinSet::new();
    let mut forecasts = HashMap::new();
    let mut proxies = Vec::new();
    for balance in ["weighted_random", "weighted_round_robin", "least_conn", "source_hash"] {
        let pool = format!("weights_key: servers, balance: {balance}");
        let active = if balance == "least_conn" { format!(" --active {ACTIVE}") } else { String::new() };
        let words =
            format!("{}=50 {}=300 --sessions {SESSIONS}{active}", backends[0].address, backends[1].address);
        forecasts.insert(balance, simulated(&yaml(&top, &pool), &words).await);
        proxies.push((balance, Proxy::web(&top, &pool)));
    }
    redis.set_weights(backends.iter().zip([50.0, 300.0, 100.0])).await;
    for (balance, proxy) in &proxies {
        eventually("the weights arrive", || async {
            proxy.weights().iter().map(|w| w.1).sum::<f64>() == 450.0
        })
        .await;
        let (balance, address) = (*balance, proxy.address());
        let active = if balance == "least_conn" { ACTIVE } else { 1 };
        runs.spawn(async move { (balance, sessions(SESSIONS, active, address).await) });
    }
    for (balance, counts) in runs.join_all().await {
        for (backend, name) in backends.iter().zip(NAMES) {
            let members = forecasts[balance]["members"].as_array().expect("a list");
            let address = backend.address.to_string();
            let member = members.iter().find(|m| m["member"] == address).expect("it is simulated");
            let number = |key: &str| member["sessions"][key].as_f64().expect("a number");
            let seen = f64::from(counts.get(&name.as_bytes()[0]).copied().unwrap_or(0));
            // Twice the width that 95 of 100 runs stay within: one run in 11,000 leaves it. The minimum is
            // for counts that hardly vary.
            let reach = 2.0 * (number("most") - number("least")).max(4.0) / 2.0;
            assert!(
                (seen - number("expected")).abs() <= reach,
                "{balance} {name}: {seen} sessions, and {member} was predicted"
            );
        }
    }
}
