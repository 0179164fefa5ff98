//! A real redis-server on a free port, in a folder of its own.

use std::env;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use redis::Value;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::cluster::port_with_bus;
use super::{Backend, PATIENCE, eventually, free_port, require};

/// The rights of docs/questions/redis-rights.md with a password: for [`Redis::grant`].
pub const LEAST_RIGHTS: &str = "on >secret resetkeys %R~servers* %R~{servers}:states resetchannels \
    &__keyspace@0__:servers* &__keyspace@0__:{servers}:states nocommands +hello +auth +ping +select \
    +client|setname +client|id +client|tracking +subscribe +unsubscribe +zrange +zcard +hlen +hgetall \
    +hget +hstrlen +eval_ro +evalsha_ro +script|load +config|get";

/// A running redis-server. Dropping it kills it by its own pid.
pub struct Redis {
    server: Option<Child>,
    pub port: u16,
    arguments: Vec<String>,
    folder: TempDir,
}

impl Redis {
    /// Starts a server with keyspace notifications switched on.
    pub async fn start() -> Self {
        Self::start_with(&["--notify-keyspace-events", "KA"]).await
    }

    /// Starts a server with these arguments. Without one for notifications they are off, as by Redis's
    /// default.
    pub async fn start_with(arguments: &[&str]) -> Self {
        // A node of a cluster needs a second port for its bus.
        let port = if arguments.contains(&"--cluster-enabled") { port_with_bus() } else { free_port() };
        Self::start_at(port, arguments).await
    }

    /// [`Redis::start_with`] on this port.
    pub async fn start_at(port: u16, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut redis = Self { server: None, port, arguments, folder: TempDir::new().expect("a folder") };
        redis.launch().await;
        redis
    }

    /// Starts the server again on its port after [`Redis::kill`]. It is empty, since nothing was saved.
    pub async fn launch(&mut self) {
        assert!(self.server.is_none(), "it runs");
        let server = Command::new(Self::program())
            .args([
                "--port",
                &self.port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .arg("--dir")
            .arg(self.folder.path())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server starts");
        self.server = Some(server);
        let client = self.client();
        eventually("redis-server answers", || async {
            match client.get_multiplexed_async_connection().await {
                Ok(mut connection) => match redis::cmd("PING").query_async::<Value>(&mut connection).await {
                    Ok(_) => true,
                    // A server that asks for a password answers too.
                    Err(error) => error.code() == Some("NOAUTH"),
                },
                Err(_) => false,
            }
        })
        .await;
    }

    /// The `url` for the `redis` section of a config.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// A client for the scenario's commands, with the password of `--requirepass` if there is one.
    pub fn client(&self) -> redis::Client {
        let password = self.arguments.iter().skip_while(|argument| *argument != "--requirepass").nth(1);
        let password = password.map(|password| format!(":{password}@")).unwrap_or_default();
        redis::Client::open(format!("redis://{password}127.0.0.1:{}/", self.port)).expect("an address")
    }

    /// A connection for the scenario's commands, with timeouts that a busy machine keeps.
    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let patient = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        self.client().get_multiplexed_async_connection_with_config(&patient).await.expect("it runs")
    }

    /// Runs one command, split at its spaces.
    pub async fn run(&self, command: &str) -> Value {
        self.run_words(&command.split(' ').collect::<Vec<_>>()).await
    }

    /// Runs one command whose words may hold anything.
    pub async fn run_words<W: redis::ToRedisArgs + std::fmt::Debug>(&self, words: &[W]) -> Value {
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(word);
        }
        let mut connection = self.connection().await;
        command.query_async(&mut connection).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// True for versions before Redis 7, which brought read-only scripts and read-only rights to keys.
    pub fn is_before_7() -> bool {
        let version = Command::new(Self::program()).arg("--version").output().expect("it runs").stdout;
        let version = String::from_utf8_lossy(&version).into_owned();
        let (_, number) = version.split_once(" v=").expect("a version");
        number.split('.').next().and_then(|major| major.parse::<u32>().ok()).expect("a number") < 7
    }

    /// Makes the user `statera` with `rights`, in the syntax of Redis 7.
    pub async fn grant(&self, rights: &str) {
        self.grant_to("statera", rights).await;
    }

    /// [`Redis::grant`] for the user `user`.
    pub async fn grant_to(&self, user: &str, rights: &str) {
        let mut rights = rights.to_owned();
        if Self::is_before_7() {
            rights = rights.replace("%R~", "~").replace("_ro", "");
            // After `~*` Redis refuses rights to single keys.
            if rights.contains("~* ") {
                rights = rights.replace("~{servers}:states ", "");
            }
        }
        self.run(&format!("ACL SETUSER {user} {rights}")).await;
    }

    /// Replaces the table at the key `servers` in one transaction.
    pub async fn set_weights<'a>(&self, weights: impl IntoIterator<Item = (&'a Backend, f64)>) {
        let mut pipe = redis::pipe();
        pipe.atomic().del("servers").ignore();
        for (backend, weight) in weights {
            pipe.cmd("ZADD").arg("servers").arg(weight).arg(backend.address.to_string()).ignore();
        }
        let mut connection = self.connection().await;
        pipe.query_async::<()>(&mut connection).await.expect("the weights are written");
    }

    /// False if the server was built without TLS.
    pub fn speaks_tls() -> bool {
        // A server with TLS complains of the missing certificate, one without TLS of the setting. Both end
        // at once.
        let arguments = ["--port", "0", "--save", "", "--tls-port", "1"];
        let tried = Command::new(Self::program()).args(arguments).output().expect("it runs");
        String::from_utf8_lossy(&[tried.stdout, tried.stderr].concat()).contains("tls-cert-file")
    }

    /// The path of the server: Debian's, unless `STATERA_TEST_REDIS_SERVER` names another (`make
    /// test-redis-matrix`).
    pub fn program() -> PathBuf {
        match env::var_os("STATERA_TEST_REDIS_SERVER") {
            Some(path) => path.into(),
            None => require("redis-server", "redis-server"),
        }
    }

    fn pid(&self) -> Pid {
        let id = self.server.as_ref().expect("it runs").id();
        Pid::from_raw(id.try_into().expect("a pid")).expect("not zero")
    }

    /// Stops the server by SIGSTOP: its connections stay open, and it answers nothing.
    pub fn freeze(&self) {
        kill_process(self.pid(), Signal::STOP).expect("it runs");
    }

    /// Lets the server run again by SIGCONT.
    pub fn thaw(&self) {
        kill_process(self.pid(), Signal::CONT).expect("it runs");
    }

    /// Ends the server by SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().expect("it runs");
            server.wait().expect("it ends");
        }
    }
}

/// The text of a section of INFO.
pub async fn info(server: &Redis, section: &str) -> String {
    redis::from_redis_value(server.run(&format!("INFO {section}")).await).expect("a text")
}

/// The number after `name` in a text of INFO; 0 if the name is not there.
pub fn info_number(info: &str, name: &str) -> u64 {
    let line = info.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split([',', '\r']).next()?.parse().ok()).unwrap_or(0)
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
