//! The settings of the process: `admin`, `log` and `shutdown`.

use std::net::SocketAddr;
use std::time::Duration;

use super::Secret;

/// The `admin` section.
#[derive(Clone, Debug)]
pub struct Admin {
    /// The address to listen on. It is a loopback address unless there is a token.
    pub bind: SocketAddr,
    /// The token that requests must send as `Authorization: Bearer …`, except for `/livez` and `/readyz`.
    pub token: Option<Secret>,
}

/// The `log` section.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    /// The least severe level that is written.
    pub level: tracing::Level,
    /// The shape of a line.
    pub format: LogFormat,
    /// Whether each session is logged by one line.
    pub access: bool,
    /// Where lines are written.
    pub output: LogOutput,
}

/// The shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Plain text, for people.
    Text,
}

/// Where log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogOutput {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The `shutdown` section.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    /// How long `/readyz` answers 503 while connections are still accepted.
    pub delay: Duration,
    /// How long sessions may go on after `delay`.
    pub timeout: Duration,
}
