//! Well-known programs run through Statera unchanged: nginx under wrk, redis-benchmark, iperf3 and files
//! with checksums. Weights are written by redis-cli and by Python.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{ChildStdin, Command, Stdio};
use std::thread;

use rustix::process::Signal;
use tokio::net;

use crate::support::{
    Nginx, PATIENCE, Program, Redis, Server, eventually, free_port, get, output, require, seed, sum_of,
};

/// Starts wrk; it runs until [`all_served`] stops it.
fn wrk(target: SocketAddr, headers: &[&str]) -> Server {
    let program = require("wrk", "wrk");
    Server::start(|_| {
        let mut command = Command::new(program);
        // The scenario takes less than a minute and ends wrk by INT, after which wrk still reports. The long
        // timeout keeps wrk from calling a request failed that is only slow on a loaded machine.
        command.args(["-t1", "-c16", "-d60s", "--timeout", "60s"]).args(headers);
        command.arg(format!("http://{target}/"));
        command
    })
}

/// Stops wrk and returns how many requests it made. Panics if any failed.
async fn all_served(mut wrk: Server) -> u64 {
    wrk.signal(Signal::INT);
    let code = wrk.wait().await;
    let report = wrk.output();
    assert_eq!(code, Some(0), "{report}");
    for failure in ["Socket errors", "Non-2xx", "unable to"] {
        assert!(!report.contains(failure), "{report}");
    }
    let requests = report.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    requests.unwrap_or_else(|| panic!("no count of requests: {report}"))
}

/// One metric of each backend, all from the same scrape.
async fn of_each(statera: &Program, backends: &[Nginx; 3], name: &str) -> [f64; 3] {
    let metrics = statera.metrics().await;
    backends.each_ref().map(|backend| sum_of(&metrics, name, &format!("backend=\"{}\"", backend.address)))
}

/// Waits until the proxy knows `weights` and until 2,000 more sessions have come, whose shares must match
/// the weights.
async fn shares_follow(statera: &Program, backends: &[Nginx; 3], weights: [f64; 3]) {
    eventually("the proxy knows the weights", || async {
        of_each(statera, backends, "statera_backend_weight").await == weights
    })
    .await;
    let before = of_each(statera, backends, "statera_backend_connections_total").await;
    let since = || async {
        let now = of_each(statera, backends, "statera_backend_connections_total").await;
        [now[0] - before[0], now[1] - before[1], now[2] - before[2]]
    };
    eventually("2,000 sessions", || async { since().await.iter().sum::<f64>() >= 2000.0 }).await;
    let counts = since().await;
    let (sum, weight_sum) = (counts.iter().sum::<f64>(), weights.iter().sum::<f64>());
    for (count, weight) in counts.iter().zip(weights) {
        // The share of 2,000 random picks deviates by more than 5.5 points once in two million runs. A
        // backend at weight 0 may still get the sessions that were being opened when the weights changed: at
        // most one per connection of wrk.
        let (share, expected) = (count / sum, weight / weight_sum);
        assert!((share - expected).abs() < 0.055, "{counts:?} of {weights:?}");
        assert!(weight > 0.0 || *count <= 32.0, "{counts:?} of {weights:?}");
    }
}

#[tokio::test]
async fn shares_follow_redis_cli_and_python_while_wrk_runs_and_no_request_fails() {
    let nginx = [Nginx::start("one").await, Nginx::start("two").await, Nginx::start("three").await];
    let redis = Redis::start().await;
    let [one, two, three] = [0, 1, 2].map(|n| nginx[n].address.to_string());
    let (cli, port) = (require("redis-cli", "redis-tools"), redis.port.to_string());
    let zadd = async |members: &[&str]| {
        let mut command = Command::new(&cli);
        command.args(["-p", &port, "ZADD", "servers"]).args(members);
        let ended = output(command).await;
        assert!(ended.status.success() && !ended.stdout.starts_with(b"ERR"), "{ended:?}");
    };
    zadd(&["100", &one, "100", &two, "100", &three]).await;

    let statera = Program::run(&format!(
        "workers: 2\nredis: {{url: \"{}\"}}\nadmin: {{bind: \"127.0.0.1:0\"}}\nlog: {{access: false}}\n\
         listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n",
        redis.url()
    ));
    let entry = statera.addresses().await.0[0];
    let (kept, closed) = (wrk(entry, &[]), wrk(entry, &["-H", "Connection: close"]));
    shares_follow(&statera, &nginx, [100.0, 100.0, 100.0]).await;

    zadd(&["300", &one, "100", &two, "0", &three]).await;
    shares_follow(&statera, &nginx, [300.0, 100.0, 0.0]).await;

    let script = "import redis, sys\n\
                  r = redis.Redis(port=int(sys.argv[1]))\n\
                  with r.pipeline(transaction=True) as p:\n\
                  \x20   p.zadd('servers', {sys.argv[2]: 0, sys.argv[3]: 2.5})\n\
                  \x20   p.zincrby('servers', 7.5, sys.argv[4])\n\
                  \x20   p.execute()\n";
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", script, &port, &one, &two, &three]);
    let ended = output(python).await;
    assert!(ended.status.success(), "install python3-redis? {ended:?}");
    shares_follow(&statera, &nginx, [0.0, 2.5, 7.5]).await;

    let (kept, closed) = (all_served(kept).await, all_served(closed).await);
    assert!(kept > 0 && closed >= 6000, "{kept} and {closed} requests");
    for failure in ["statera_backend_connect_failures_total", "statera_backend_retries_total"] {
        assert_eq!(statera.metric(failure, "").await, 0.0, "{failure}");
    }
    zadd(&["0", &two]).await;
    eventually("only the third is left", || async {
        statera.metric("statera_backend_weight", &format!("backend=\"{two}\"")).await == 0.0
    })
    .await;
    assert_eq!(get(entry, "/").await.expect("an answer").body, "three");
    assert!(nginx.iter().all(|nginx| !nginx.server.output().contains("[alert]")));
}

/// One proxy with a listener and a pool for each backend.
async fn in_front_of(workers: u32, backends: &[SocketAddr]) -> (Program, Vec<SocketAddr>) {
    let (mut listeners, mut pools) = (String::new(), String::new());
    for (n, backend) in backends.iter().enumerate() {
        listeners += &format!("  l{n}: {{bind: \"127.0.0.1:0\", pool: p{n}}}\n");
        pools += &format!("  p{n}: {{backends: {{\"{backend}\": 1}}}}\n");
    }
    let statera = Program::run(&format!(
        "workers: {workers}\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners:\n{listeners}pools:\n{pools}"
    ));
    let (addresses, _) = statera.addresses().await;
    (statera, addresses)
}

#[tokio::test]
async fn redis_benchmark_runs_unchanged_one_by_one_and_pipelined() {
    const COMMANDS: u32 = 20_000;
    let (redis, benchmark) = (Redis::start().await, require("redis-benchmark", "redis-tools"));
    let (statera, entries) = in_front_of(2, &[SocketAddr::from(([127, 0, 0, 1], redis.port))]).await;
    for (pipeline, data_bytes) in [("1", "3"), ("16", "3"), ("1", "4096")] {
        redis.run("CONFIG RESETSTAT").await;
        let mut command = Command::new(&benchmark);
        command.args(["-h", "127.0.0.1", "-p", &entries[0].port().to_string(), "-c", "20", "--csv"]);
        command.args([
            "-n",
            &COMMANDS.to_string(),
            "-P",
            pipeline,
            "-d",
            data_bytes,
            "-t",
            "set,get,incr,lpush",
        ]);
        let ended = output(command).await;
        let (text, errors) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success() && errors.is_empty(), "{text}{errors}");
        let stats = redis::from_redis_value::<String>(redis.run("INFO commandstats").await).expect("a text");
        for test in ["SET", "GET", "INCR", "LPUSH"] {
            assert!(text.contains(&format!("\"{test}\",")), "no result of {test}: {text}");
            let calls = format!("cmdstat_{}:calls={COMMANDS},", test.to_lowercase());
            assert!(stats.contains(&calls), "-P {pipeline}: not {COMMANDS} of {test}: {stats}");
        }
    }
    assert_eq!(statera.metric("statera_backend_connect_failures_total", "").await, 0.0);
}

#[tokio::test]
async fn iperf3_runs_unchanged_in_both_directions_and_both_at_once() {
    const MEGABYTES: u64 = 400;
    let program = require("iperf3", "iperf3");
    // One server per direction: an iperf3 server that has just served a client reports "busy" for a while.
    let directions: [&[&str]; 4] = [&[], &["-R"], &["--bidir"], &["-P", "4"]];
    let mut servers = directions.map(|_| {
        let port = free_port();
        let server = Server::start(|_| {
            let mut command = Command::new(&program);
            command.args(["-s", "--forceflush", "-B", "127.0.0.1", "-p", &port.to_string()]);
            command
        });
        (server, SocketAddr::from(([127, 0, 0, 1], port)))
    });
    for (server, _) in &mut servers {
        // The log is read instead of connecting: a connection would count as a client.
        server.says("Server listening").await;
    }
    // One worker: with --bidir, iperf3 uses the connection that reaches its server second for the reverse
    // direction, and two workers could swap the connections.
    let (statera, entries) = in_front_of(1, &servers.each_ref().map(|(_, address)| *address)).await;
    for (n, (direction, entry)) in directions.iter().zip(entries).enumerate() {
        let mut command = Command::new(&program);
        command.args(["-c", "127.0.0.1", "-p", &entry.port().to_string(), "-J"]);
        command.args(["-n", &format!("{MEGABYTES}M")]).args(*direction);
        let ended = output(command).await;
        let text = String::from_utf8_lossy(&ended.stdout);
        let report: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(ended.status.success() && report.get("error").is_none(), "{direction:?}: {text}");
        let total = |sum: &str| report["end"][sum]["bytes"].as_u64().unwrap_or_default();
        let (sent, received) = ["", "_bidir_reverse"].iter().fold((0, 0), |(sent, received), half| {
            (sent + total(&format!("sum_sent{half}")), received + total(&format!("sum_received{half}")))
        });
        // With -n, iperf3 ends when one side has written that much. Its receiver does not count what is
        // still in the buffers of four sockets and a pipe then.
        let wanted = MEGABYTES * 1024 * 1024;
        assert!(
            sent >= wanted && received >= wanted / 2,
            "{direction:?}: {sent} and {received} bytes: {text}"
        );
        let both = total("sum_received_bidir_reverse") > wanted / 20 && total("sum_received") > wanted / 20;
        assert!(both || *direction != ["--bidir"], "{text}");
        let label = format!("pool=\"p{n}\"");
        let to_backend = statera.metric("statera_backend_bytes_sent_total", &label).await;
        let to_client = statera.metric("statera_backend_bytes_received_total", &label).await;
        assert!(
            to_backend + to_client >= received as f64,
            "{direction:?}: {to_backend} and {to_client} bytes"
        );
    }
}

const FILE_BYTES: u64 = 1_000_000_000;
const PIECE_BYTES: usize = 1 << 20;

/// A `b2sum` process that reads from a pipe.
struct Checksum {
    child: std::process::Child,
    pipe: ChildStdin,
}

impl Checksum {
    fn start() -> Self {
        let program = require("b2sum", "coreutils");
        let mut child =
            Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("b2sum starts");
        let pipe = child.stdin.take().expect("it was asked for");
        Self { child, pipe }
    }

    fn finish(self) -> String {
        drop(self.pipe);
        let ended = self.child.wait_with_output().expect("b2sum ends with its input");
        assert!(ended.status.success());
        String::from_utf8(ended.stdout).expect("hexadecimal")
    }
}

/// Sends a file made from `seed`, shuts down the write side, and returns the file's checksum.
fn send_file(mut stream: TcpStream, seed: u64) -> String {
    let (mut random, mut checksum) = (fastrand::Rng::with_seed(seed), Checksum::start());
    let (mut piece, mut left) = (vec![0; PIECE_BYTES], FILE_BYTES);
    while left > 0 {
        piece.truncate(usize::try_from(left).unwrap_or(PIECE_BYTES));
        random.fill(&mut piece);
        stream.write_all(&piece).expect("the peer reads");
        checksum.pipe.write_all(&piece).expect("b2sum reads");
        left -= piece.len() as u64;
    }
    stream.shutdown(Shutdown::Write).expect("connected");
    checksum.finish()
}

/// Reads until the peer shuts down its write side. Returns the length and the checksum of the bytes.
fn receive_file(mut stream: TcpStream) -> (u64, String) {
    let (mut checksum, mut piece, mut length) = (Checksum::start(), vec![0; PIECE_BYTES], 0);
    loop {
        let count = stream.read(&mut piece).expect("the peer sends");
        if count == 0 {
            return (length, checksum.finish());
        }
        checksum.pipe.write_all(&piece[..count]).expect("b2sum reads");
        length += count as u64;
    }
}

/// Sends and receives a file at the same time. Every wait for the peer is bounded.
fn exchange(stream: TcpStream, seed: u64) -> (String, (u64, String)) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
    let writer = stream.try_clone().expect("a descriptor");
    let sender = thread::spawn(move || send_file(writer, seed));
    let received = receive_file(stream);
    (sender.join().expect("it sends all"), received)
}

#[tokio::test]
async fn a_gigabyte_passes_in_both_directions_at_once_with_its_checksum() {
    let (seed, listener) = (seed(), TcpListener::bind("127.0.0.1:0").expect("a free port"));
    let (statera, entries) = in_front_of(2, &[listener.local_addr().expect("bound")]).await;
    // Connects before `accept` blocks, so that a failed connect fails the test instead of hanging it.
    let client =
        net::TcpStream::connect(entries[0]).await.and_then(net::TcpStream::into_std).expect("it accepts");
    client.set_nonblocking(false).expect("a socket");
    eventually("the session reaches the backend", || async {
        statera.metric("statera_backend_connections_total", "").await == 1.0
    })
    .await;
    let (backend, _) = listener.accept().expect("the session");

    let client = thread::spawn(move || exchange(client, seed));
    let backend = thread::spawn(move || exchange(backend, seed.wrapping_add(1)));
    let (to_backend, got_by_client) =
        tokio::task::spawn_blocking(|| client.join()).await.expect("a thread").expect("the client ends well");
    let (to_client, got_by_backend) = backend.join().expect("the backend ends well");
    assert_ne!(to_backend, to_client, "two different files");
    assert_eq!(got_by_backend, (FILE_BYTES, to_backend));
    assert_eq!(got_by_client, (FILE_BYTES, to_client));

    eventually("the session is logged", || async { statera.log().contains("\"close_reason\":\"finished\"") })
        .await;
    for (name, reason) in [("sent", "to the backend"), ("received", "from the backend")] {
        let bytes = statera.metric(&format!("statera_backend_bytes_{name}_total"), "").await;
        assert_eq!(bytes, FILE_BYTES as f64, "{reason}");
    }
}
