//! A real primary with its replicas, and the sentinels that monitor them, on free ports.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use super::{Authority, Identity, PATIENCE, Redis, eventually, free_port, info, tls_settings};

/// The name that the sentinels know the primary by.
pub const MASTER: &str = "mymaster";

/// One primary, two replicas and three sentinels. Dropping it ends each by its own pid.
pub struct Sentinels {
    /// The first is the primary at the start.
    pub servers: Vec<Redis>,
    /// The port by which the sentinels know each server.
    known_ports: Vec<u16>,
    nodes: Vec<Node>,
}

/// One sentinel.
struct Node {
    child: Child,
    /// The port for the scenario's commands, without TLS.
    port: u16,
    /// The port for the proxies.
    known_port: u16,
    folder: TempDir,
}

impl Sentinels {
    /// Starts the set, and waits until all servers and sentinels know each other.
    pub async fn start() -> Self {
        Self::start_with("").await
    }

    /// [`Sentinels::start`] with more lines in the config of each sentinel.
    pub async fn start_with(more: &str) -> Self {
        Self::start_all(more, None).await
    }

    /// [`Sentinels::start`] with TLS on every connection, where both sides present a certificate.
    pub async fn start_secure(authority: &Authority, identity: &Identity) -> Self {
        Self::start_all("", Some((authority, identity))).await
    }

    /// [`Sentinels::start`] for a busy machine: the first sentinel misses a server after 1.5 s and leads
    /// every failover, and the others only vote. If all were equal and one was frozen, the other two could
    /// each vote for itself again and again.
    pub async fn start_patient() -> Self {
        // In the config, since the usual 300 ms would be over before a command could change them.
        let calm = ["down-after-milliseconds mymaster 5000", "failover-timeout mymaster 4000"];
        let set = Self::start_with(&calm.map(|line| format!("sentinel {line}")).join("\n")).await;
        for node in &set.nodes {
            let words = ["SENTINEL", "SET", MASTER, "quorum", "1"];
            assert_eq!(node.ask::<String>(&words).await.as_deref(), Ok("OK"));
        }
        let words = ["SENTINEL", "SET", MASTER, "down-after-milliseconds", "1500"];
        assert_eq!(set.nodes[0].ask::<String>(&words).await.as_deref(), Ok("OK"));
        set
    }

    async fn start_all(more: &str, tls: Option<(&Authority, &Identity)>) -> Self {
        let (mut servers, mut known_ports) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let mut arguments: Vec<String> =
                ["--notify-keyspace-events", "KA", "--repl-diskless-sync-delay", "0", "--repl-timeout", "10"]
                    .map(str::to_owned)
                    .to_vec();
            let tls_port = tls.map(|(authority, identity)| {
                let port = free_port();
                for (name, value) in tls_settings(port, authority, identity, "yes") {
                    arguments.extend([format!("--{name}"), value]);
                }
                port
            });
            let server = Redis::start_with(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
            known_ports.push(tls_port.unwrap_or(server.port));
            servers.push(server);
        }
        let mut set = Self { servers, known_ports, nodes: Vec::new() };
        set.follow(1, 0).await;
        set.follow(2, 0).await;
        set.has_replicas(0).await;
        set.nodes = (0..3).map(|_| Node::start(set.known_ports[0], more, tls)).collect();
        eventually("the sentinels know each other", || async { set.is_known_to_all().await }).await;
        set
    }

    /// Makes a server a replica of the primary.
    pub async fn follow(&self, replica: usize, primary: usize) {
        self.servers[replica].run(&format!("REPLICAOF 127.0.0.1 {}", self.known_ports[primary])).await;
    }

    /// Waits until both other servers follow the primary.
    pub async fn has_replicas(&self, primary: usize) {
        let deadline = Instant::now() + PATIENCE;
        while info(&self.servers[primary], "replication").await.matches("state=online").count() < 2 {
            if Instant::now() > deadline {
                for server in &self.servers {
                    println!("{}: {}", server.port, info(server, "replication").await);
                }
                panic!("not both replicas follow {}", self.servers[primary].port);
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the first sentinel has finished any failover to this primary and knows two replicas that
    /// can take over. A failover that meets another one, or finds no replica, is tried again only after ten
    /// seconds or more.
    pub async fn is_settled(&self, primary: usize) {
        self.has_replicas(primary).await;
        let port = self.known_ports[primary].to_string();
        let is_done = async || -> redis::RedisResult<bool> {
            let master: Vec<String> = self.nodes[0].ask(&["SENTINEL", "MASTER", MASTER]).await?;
            let replicas: Vec<Vec<String>> = self.nodes[0].ask(&["SENTINEL", "REPLICAS", MASTER]).await?;
            let has = |fields: &[String], name: &str, value: &str| {
                fields.chunks(2).any(|field| field == [name, value])
            };
            let is_master = has(&master, "flags", "master") && has(&master, "port", &port);
            // A sentinel asks the replicas for their primary every ten seconds, and every second once the
            // primary is away.
            Ok(is_master && replicas.iter().all(|fields| has(fields, "flags", "slave")))
        };
        let settling = async {
            while is_done().await != Ok(true) {
                sleep(Duration::from_millis(50)).await;
            }
        };
        let settled = timeout(PATIENCE, settling).await;
        assert!(settled.is_ok(), "the sentinels do not settle on {port}:\n{}", self.logs());
    }

    /// The last log lines of all sentinels.
    fn logs(&self) -> String {
        let last = |node: &Node| {
            let log = std::fs::read_to_string(node.folder.path().join("log")).expect("a log");
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(40)..].join("\n")
        };
        self.nodes.iter().map(last).collect::<Vec<_>>().join("\n---\n")
    }

    /// True if both other servers hold all that was written to the primary so far, so that no failover loses
    /// it.
    pub async fn is_replicated(&self, primary: usize) -> bool {
        // WAIT covers only the writes of its own connection.
        let mut written = redis::pipe();
        written.cmd("SET").arg("replicated").arg("?").ignore().cmd("WAIT").arg(2).arg(2_000);
        let mut connection = self.servers[primary].connection().await;
        let (replicas,): (u32,) = written.query_async(&mut connection).await.expect("a number");
        replicas == 2
    }

    async fn is_known_to_all(&self) -> bool {
        for node in &self.nodes {
            let fields = node.ask::<Vec<String>>(&["SENTINEL", "MASTER", MASTER]).await.unwrap_or_default();
            let is = |name: &str, value: &str| fields.chunks(2).any(|field| field == [name, value]);
            if !(is("num-slaves", "2") && is("num-other-sentinels", "2") && is("flags", "master")) {
                return false;
            }
        }
        true
    }

    /// The key `sentinel` for the `redis` section of a config, with all sentinels.
    pub fn section(&self) -> String {
        let nodes: Vec<String> =
            self.nodes.iter().map(|node| format!("\"127.0.0.1:{}\"", node.known_port)).collect();
        format!("sentinel: {{master: {MASTER}, nodes: [{}]}}", nodes.join(", "))
    }

    /// Asks for a planned failover, again and again until a replica can take over.
    pub async fn fail_over(&self) {
        let asked = async || self.nodes[0].ask::<String>(&["SENTINEL", "FAILOVER", MASTER]).await;
        eventually("a failover begins", || async { asked().await.is_ok() }).await;
    }

    /// Waits until a sentinel names another primary than `old`, and it takes writes. Returns its index.
    pub async fn new_primary(&self, old: usize) -> usize {
        let found = async || {
            for node in &self.nodes {
                // A sentinel that is frozen must not hold up the others.
                let asked = node.ask::<(String, u16)>(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]);
                let Ok(Ok((_, port))) = timeout(Duration::from_millis(500), asked).await else { continue };
                let index = self.known_ports.iter().position(|known| *known == port)?;
                if index != old && info(&self.servers[index], "replication").await.contains("role:master") {
                    return Some(index);
                }
            }
            None
        };
        let search = async {
            loop {
                if let Some(index) = found().await {
                    return index;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        // A sentinel that the machine held up for two seconds does nothing for the next 30 s (its TILT
        // mode).
        let primary = timeout(Duration::from_secs(60), search).await;
        primary.unwrap_or_else(|_| panic!("no other server is the primary:\n{}", self.logs()))
    }

    /// Ends a sentinel.
    pub fn kill_sentinel(&mut self, index: usize) {
        self.nodes[index].end();
    }

    /// SIGSTOP or SIGCONT to a sentinel.
    pub fn signal_sentinel(&self, index: usize, signal: Signal) {
        let pid = Pid::from_raw(self.nodes[index].child.id().try_into().expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }
}

impl Node {
    fn start(primary_port: u16, more: &str, tls: Option<(&Authority, &Identity)>) -> Self {
        let (folder, port) = (TempDir::new().expect("a folder"), free_port());
        let config = folder.path().join("sentinel.conf");
        let (mut more, mut known_port) = (more.to_owned(), port);
        if let Some((authority, identity)) = tls {
            known_port = free_port();
            for (name, value) in tls_settings(known_port, authority, identity, "yes") {
                more += &format!("\n{name} {value}");
            }
        }
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor {MASTER} 127.0.0.1 {primary_port} 2\n\
             sentinel down-after-milliseconds {MASTER} 300\n\
             sentinel failover-timeout {MASTER} 2000\n{more}\n",
            folder.path().display()
        );
        std::fs::write(&config, text).expect("a file");
        // Debian's redis-sentinel is the same program under another name.
        let log = std::fs::File::create(folder.path().join("log")).expect("a file");
        let child = Command::new(Redis::program())
            .arg(&config)
            .arg("--sentinel")
            .stdin(Stdio::null())
            .stdout(log)
            .spawn()
            .expect("a sentinel starts");
        Self { child, port, known_port, folder }
    }

    async fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> redis::RedisResult<T> {
        let patient = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(Duration::from_secs(5)));
        let client = redis::Client::open(format!("redis://127.0.0.1:{}/", self.port))?;
        let mut connection: MultiplexedConnection =
            client.get_multiplexed_async_connection_with_config(&patient).await?;
        let mut command = redis::Cmd::new();
        command.arg(words);
        command.query_async(&mut connection).await
    }

    fn end(&mut self) {
        // If it has ended, the kill fails. No other process gets its pid before the wait.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}
