//! Why a check did not pass, in words for the log and in short for the proxy's report.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::balance::backend::Cause;
use crate::config::HealthCheck;

/// How much of the expected and of the received answer is logged.
const SHOWN_BYTES: usize = 40;
/// How much a backend may send before the expected answer has come.
pub(super) const ANSWER_MAX_BYTES: usize = 64 * 1024;

/// Why a check did not pass.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckError {
    #[error("no connection within {0:?}")]
    NoConnection(Duration),
    #[error("cannot connect: {}", Cause::from(.0))]
    Connect(io::Error),
    #[error("the kernel connected the socket to itself: nothing listens on that port of this machine")]
    ToItself,
    #[error("the connection broke: {}", Cause::from(.0))]
    Broken(io::Error),
    #[error("no answer within {0:?}, expected {1}")]
    Silent(Duration, ExpectedAnswer),
    #[error("the connection was closed before the answer, expected {0}")]
    Closed(ExpectedAnswer),
    #[error("not among the first {ANSWER_MAX_BYTES} bytes of the answer: {0}")]
    TooMuch(ExpectedAnswer),
    /// The check's own thread was late, so this says nothing about the backend.
    #[error("this machine was too busy to read the answer in time: it looked {0:?} late")]
    Late(Duration),
    /// A shortage of this machine, which says nothing about the backend.
    #[error("no descriptor, memory or local port left: {0}")]
    Exhausted(io::Error),
}

/// The expected answer and what came instead, escaped for a log line.
#[derive(Debug)]
pub(super) struct ExpectedAnswer {
    expected: String,
    /// `None` if nothing came.
    got: Option<String>,
}

impl ExpectedAnswer {
    pub(super) fn new(settings: &HealthCheck, received: &[u8]) -> Self {
        let expected = shown(settings.expect.as_deref().unwrap_or_default());
        Self { expected, got: (!received.is_empty()).then(|| shown(received)) }
    }
}

impl fmt::Display for ExpectedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.expected)?;
        self.got.iter().try_for_each(|got| write!(f, ", got {got}"))
    }
}

impl CheckError {
    /// Returns the error in short, for the report of this proxy.
    pub(super) fn cause(&self) -> Cause {
        match self {
            Self::NoConnection(_) => Cause::TIMED_OUT,
            Self::Connect(error) | Self::Broken(error) | Self::Exhausted(error) => error.into(),
            Self::ToItself => Cause::TO_ITSELF,
            Self::Silent(..) => Cause::NO_ANSWER,
            Self::Closed(_) => Cause::CLOSED,
            Self::TooMuch(_) => Cause::WRONG_ANSWER,
            Self::Late(_) => Cause::OTHER,
        }
    }

    /// False if the error is due to this machine and not to the backend.
    pub(super) fn is_of_backend(&self) -> bool {
        !matches!(self, Self::Late(_) | Self::Exhausted(_))
    }
}

fn shown(received: &[u8]) -> String {
    let more = if received.len() > SHOWN_BYTES { "…" } else { "" };
    format!("\"{}{more}\"", received[..received.len().min(SHOWN_BYTES)].escape_ascii())
}
