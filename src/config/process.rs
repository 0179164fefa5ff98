//! The settings of the process: `admin`, `log` and `shutdown`.

use std::net::SocketAddr;
use std::time::Duration;

use super::Secret;

/// The `admin` section.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Loopback, unless there is a token.
    pub bind: SocketAddr,
    /// Asked for as `Authorization: Bearer …` on every path but `/livez` and `/readyz`.
    pub token: Option<Secret>,
}

/// The `log` section.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    /// The least severe level that is written.
    pub level: tracing::Level,
    /// The shape of a line.
    pub format: LogFormat,
    /// One line per session.
    pub access: bool,
    /// Where lines go.
    pub output: LogOutput,
}

/// The shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Where log lines go.
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
    /// Not ready, but still accepting, for this long.
    pub delay: Duration,
    /// Then sessions may finish for this long.
    pub timeout: Duration,
}
