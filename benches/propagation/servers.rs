//! The servers that weights are written to, and what a config says of them.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::time::Instant;

use super::LIMIT;

/// What runs, until it is dropped.
pub struct Servers {
    _processes: Vec<Redis>,
    /// A connection to the server that has the key `servers`.
    pub connection: redis::Connection,
    /// The `redis` section of a config.
    pub section: String,
}

type Start = fn(&Path) -> Servers;

/// Each needs a folder of its own.
pub const TOPOLOGIES: [(&str, Start); 5] =
    [("tcp", tcp), ("unix", unix), ("tls", tls), ("sentinel", sentinel), ("cluster", cluster)];

struct Redis(Child);

impl Redis {
    fn run(arguments: &[&str]) -> Self {
        let server = Command::new("redis-server").args(arguments).stdout(Stdio::null()).spawn();
        Self(server.expect("redis-server is installed (apt-get install redis-server)"))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It has ended already, or ends now.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// A server that answers, and a connection to it.
fn start(more: &[&str]) -> (Redis, u16, redis::Connection) {
    let port = free_port();
    let own =
        ["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--notify-keyspace-events", "KA"];
    let server = Redis::run(&[&own[..], more].concat());
    let connection = connect(port);
    (server, port, connection)
}

fn connect(port: u16) -> redis::Connection {
    let client = redis::Client::open(("127.0.0.1", port)).expect("an address");
    let begun = Instant::now();
    loop {
        match client.get_connection() {
            Ok(connection) => return connection,
            Err(error) => assert!(begun.elapsed() < LIMIT, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn one((process, _, connection): (Redis, u16, redis::Connection), section: String) -> Servers {
    Servers { _processes: vec![process], connection, section }
}

fn tcp(_: &Path) -> Servers {
    let server = start(&[]);
    let section = format!("url: \"redis://127.0.0.1:{}/0\"", server.1);
    one(server, section)
}

fn unix(folder: &Path) -> Servers {
    let socket = folder.join("redis.sock");
    let server = start(&["--unixsocket", text(&socket)]);
    one(server, format!("url: \"unix://{}\"", text(&socket)))
}

fn tls(folder: &Path) -> Servers {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("randomness"));
    let authority = authority.expect("a certificate");
    let key = KeyPair::generate().expect("randomness");
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    let [ca, crt, pem] =
        [("ca.pem", authority.pem()), ("redis.crt", certificate.pem()), ("redis.key", key.serialize_pem())]
            .map(|(name, content)| {
                let path = folder.join(name);
                fs::write(&path, content).expect("a file");
                path
            });
    let port = free_port();
    let server = start(&[
        "--tls-port",
        &port.to_string(),
        "--tls-ca-cert-file",
        text(&ca),
        "--tls-cert-file",
        text(&crt),
        "--tls-key-file",
        text(&pem),
        "--tls-auth-clients",
        "no",
    ]);
    one(server, format!("url: \"rediss://127.0.0.1:{port}/0\", tls: {{ca_file: {}}}", text(&ca)))
}

fn sentinel(folder: &Path) -> Servers {
    let (server, primary, connection) = start(&[]);
    let (port, file) = (free_port(), folder.join("sentinel.conf"));
    let lines = format!("port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {primary} 1\n");
    fs::write(&file, lines).expect("a file");
    let sentinel = Redis::run(&[text(&file), "--sentinel"]);
    drop(connect(port));
    let section = format!("sentinel: {{master: mymaster, nodes: [\"127.0.0.1:{port}\"]}}");
    Servers { _processes: vec![server, sentinel], connection, section }
}

/// Three primaries that know each other; the first has the upper slots, that of `servers` (11,335) among
/// them.
fn cluster(folder: &Path) -> Servers {
    const BOUNDS: [u16; 4] = [16_384, 10_923, 5_461, 0];
    let mut nodes: Vec<_> = (0..3)
        .map(|node| {
            let (file, bus) = (folder.join(format!("nodes-{node}")), free_port().to_string());
            start(&["--cluster-enabled", "yes", "--cluster-config-file", text(&file), "--cluster-port", &bus])
        })
        .collect();
    let (first, first_bus) = {
        let connection = &mut nodes[0].2;
        let (_, bus): (String, u16) =
            redis::cmd("CONFIG").arg("GET").arg("cluster-port").query(connection).expect("redis runs");
        (nodes[0].1, bus)
    };
    for (place, (_, _, connection)) in nodes.iter_mut().enumerate() {
        let mut cluster = |words: &[&str]| {
            redis::cmd("CLUSTER").arg(words).exec(connection).expect("redis runs");
        };
        cluster(&["SET-CONFIG-EPOCH", &(place + 1).to_string()]);
        cluster(&["ADDSLOTSRANGE", &BOUNDS[place + 1].to_string(), &(BOUNDS[place] - 1).to_string()]);
        if place > 0 {
            cluster(&["MEET", "127.0.0.1", &first.to_string(), &first_bus.to_string()]);
        }
    }
    let begun = Instant::now();
    for (_, _, connection) in &mut nodes {
        let mut is_whole = || {
            let info: String = redis::cmd("CLUSTER").arg("INFO").query(connection).expect("redis runs");
            info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
        };
        while !is_whole() {
            assert!(begun.elapsed() < LIMIT * 4, "the nodes do not find each other");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // The last one names the owner.
    let section = format!("cluster: {{nodes: [\"127.0.0.1:{}\"]}}", nodes[2].1);
    let (processes, mut connections): (Vec<_>, Vec<_>) =
        nodes.into_iter().map(|(process, _, connection)| (process, connection)).unzip();
    Servers { _processes: processes, connection: connections.swap_remove(0), section }
}
