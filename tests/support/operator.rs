//! An operator who changes weights: a Redis, a config file, and the commands `statera weights …`.

use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::{Program, Redis, output};

/// An operator with a Redis and a config, which has one pool `web` with the key `servers` (or the key of
/// [`Operator::with`]).
pub struct Operator {
    pub redis: Redis,
    folder: TempDir,
    key: String,
}

/// The exit code and the output of a command that has ended.
#[derive(Debug)]
pub struct CommandOutput {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Operator {
    pub async fn start() -> Self {
        Self::with(Redis::start().await, "servers")
    }

    pub fn with(redis: Redis, key: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let operator = Self { redis, folder, key: key.to_owned() };
        operator.write_config("");
        operator
    }

    /// A config for a proxy that follows this table. `more` goes into the `redis` section, whose timeouts a
    /// busy machine keeps.
    pub fn yaml(&self, more: &str) -> String {
        format!(
            "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
             pools: {{web: {{weights_key: \"{}\", backends: {{\"127.0.0.1:9\": 1}}}}}}\n\
             redis: {{url: \"{}\", {more} connect_timeout: 10s, response_timeout: 10s}}\n",
            self.key,
            self.redis.url()
        )
    }

    /// Writes the config for the commands from now on. `more` goes into the `redis` section: `username: bob,
    /// password: geheim,`.
    pub fn write_config(&self, more: &str) {
        std::fs::write(self.folder.path().join("config.yaml"), self.yaml(more)).expect("a file");
    }

    /// The command `statera weights` with these words and the config, not yet started.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(Program::path());
        command.arg("weights").args(words).arg("-c").arg(self.folder.path().join("config.yaml"));
        command.env("USER", "jo");
        command
    }

    /// Runs `statera weights` with these words, split at spaces.
    pub async fn weights(&self, words: &str) -> CommandOutput {
        self.weights_of(&words.split(' ').collect::<Vec<_>>()).await
    }

    /// Runs `statera weights` with words that may contain spaces.
    pub async fn weights_of<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> CommandOutput {
        CommandOutput::of(self.command(words)).await
    }

    /// Runs `statera weights` with these words, which must succeed.
    pub async fn done(&self, words: &str) -> CommandOutput {
        let output = self.weights(words).await;
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{words}");
        output
    }

    /// Runs `statera weights … --json`, which must succeed, and returns its output.
    pub async fn json(&self, words: &str) -> Value {
        let output = self.done(&format!("{words} --json")).await;
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.stdout))
    }

    /// The table that Redis holds, sorted by member.
    pub async fn table(&self) -> Vec<(String, f64)> {
        let mut connection = self.redis.connection().await;
        let mut zrange = redis::cmd("ZRANGE");
        let table = zrange.arg(&self.key).arg(0).arg(-1).arg("WITHSCORES").query_async(&mut connection).await;
        let mut table: Vec<(String, f64)> = table.expect("a sorted set");
        table.sort_by(|a, b| a.0.cmp(&b.0));
        table
    }
}

impl CommandOutput {
    pub async fn of(command: Command) -> Self {
        let ended = output(command).await;
        let text = |bytes| String::from_utf8(bytes).expect("a text");
        Self { code: ended.status.code(), stdout: text(ended.stdout), stderr: text(ended.stderr) }
    }
}
