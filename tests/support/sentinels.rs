//! A primary, its replicas and the sentinels that watch over them: real ones, on free ports.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{PATIENCE, Redis, eventually, free_port, require};

/// The name that the sentinels know the primary by.
pub const MASTER: &str = "mymaster";

/// One primary, two replicas, three sentinels. Each is ended by its own pid when this is dropped.
pub struct Sentinels {
    /// The first is the primary at the start.
    pub servers: Vec<Redis>,
    nodes: Vec<Node>,
}

/// One sentinel.
struct Node {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Sentinels {
    /// Starts the set, and waits until everybody knows everybody.
    pub async fn start() -> Self {
        Self::start_with("").await
    }

    /// The same with more lines in each sentinel's config.
    pub async fn start_with(more: &str) -> Self {
        let own =
            ["--notify-keyspace-events", "KA", "--repl-diskless-sync-delay", "0", "--repl-timeout", "10"];
        let primary = Redis::start_with(&own).await;
        let port = primary.port.to_string();
        let following = [&own[..], &["--replicaof", "127.0.0.1", &port]].concat();
        let replicas = [Redis::start_with(&following).await, Redis::start_with(&following).await];
        let mut servers = vec![primary];
        servers.extend(replicas);
        eventually("both replicas follow", || async {
            info(&servers[0], "replication").await.matches("state=online").count() == 2
        })
        .await;
        let nodes = (0..3).map(|_| Node::start(servers[0].port, more)).collect();
        let set = Self { servers, nodes };
        eventually("the sentinels know each other", || async { set.is_known_to_all().await }).await;
        set
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

    /// For the `redis` section of a config.
    pub fn section(&self) -> String {
        let nodes: Vec<String> =
            self.nodes.iter().map(|node| format!("\"127.0.0.1:{}\"", node.port)).collect();
        format!("sentinel: {{master: {MASTER}, nodes: [{}]}}", nodes.join(", "))
    }

    /// Asks for a planned failover.
    pub async fn fail_over(&self) {
        let answer: redis::RedisResult<String> = self.nodes[0].ask(&["SENTINEL", "FAILOVER", MASTER]).await;
        assert_eq!(answer.as_deref(), Ok("OK"));
    }

    /// Waits until a sentinel names another primary than `old`, and that one takes writes; the place of it.
    pub async fn new_primary(&self, old: usize) -> usize {
        let found = async || {
            for node in &self.nodes {
                let named = node.ask::<(String, u16)>(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]).await;
                let Ok((_, port)) = named else { continue };
                let place = self.servers.iter().position(|server| server.port == port)?;
                if place != old && info(&self.servers[place], "replication").await.contains("role:master") {
                    return Some(place);
                }
            }
            None
        };
        eventually("another one is the primary", || async { found().await.is_some() }).await;
        found().await.expect("it was there")
    }

    /// Ends a sentinel.
    pub fn kill_sentinel(&mut self, place: usize) {
        self.nodes[place].end();
    }

    /// SIGSTOP or SIGCONT to a sentinel.
    pub fn signal_sentinel(&self, place: usize, signal: Signal) {
        let pid = Pid::from_raw(self.nodes[place].child.id().try_into().expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }
}

/// A section of INFO.
pub async fn info(server: &Redis, section: &str) -> String {
    redis::from_redis_value(server.run(&format!("INFO {section}")).await).expect("a text")
}

impl Node {
    fn start(primary_port: u16, more: &str) -> Self {
        require("redis-server", "redis-server");
        let (folder, port) = (TempDir::new().expect("a folder"), free_port());
        let config = folder.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor {MASTER} 127.0.0.1 {primary_port} 2\n\
             sentinel down-after-milliseconds {MASTER} 300\nsentinel failover-timeout {MASTER} 2000\n{more}\n",
            folder.path().display()
        );
        std::fs::write(&config, text).expect("a file");
        // Debian's redis-sentinel is the same program by another name, in a package of its own.
        let child = Command::new("redis-server")
            .arg(&config)
            .arg("--sentinel")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("a sentinel starts");
        Self { child, port, _folder: folder }
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
        // It may have ended; its pid is ours until it is waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}
