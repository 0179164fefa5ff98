//! Why a session or a check failed, in 16 bits: small enough for an atomic, and written only on a failure.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use serde::{Serialize, Serializer};

/// An errno of the kernel, or one of some causes of ours that have no errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause(u16);

impl Cause {
    /// No answer came in time, whether the kernel or the proxy gave up first.
    pub const TIMED_OUT: Self = Self(110);
    /// The peer sent a reset.
    pub const RESET: Self = Self(104);
    /// The backend's name has no address yet.
    pub const UNRESOLVED: Self = Self::own(1);
    /// The kernel connected the socket to itself, because nothing listens on that port of this machine.
    pub const TO_ITSELF: Self = Self::own(2);
    /// A check got a connection, but not the expected answer in time.
    pub const NO_ANSWER: Self = Self::own(3);
    /// A check's connection was closed before the expected answer came.
    pub const CLOSED: Self = Self::own(4);
    /// A check got an answer other than the expected one.
    pub const WRONG_ANSWER: Self = Self::own(5);
    /// An error without an errno.
    pub const OTHER: Self = Self::own(6);

    /// Causes without an errno are numbered from here. Linux has no errno above 4095.
    const FIRST_OWN: u16 = 0x8000;

    const fn own(number: u16) -> Self {
        Self(Self::FIRST_OWN + number)
    }

    /// The cause with this errno. `None` for 0.
    #[must_use]
    pub fn of_errno(errno: u16) -> Option<Self> {
        (errno > 0).then_some(Self(errno))
    }
}

impl From<&io::Error> for Cause {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error().and_then(|errno| u16::try_from(errno).ok()) {
            Some(errno) if errno > 0 && errno < Self::FIRST_OWN => Self(errno),
            _ if error.kind() == io::ErrorKind::TimedOut => Self::TIMED_OUT,
            _ => Self::OTHER,
        }
    }
}

/// A text of ours, or the kernel's text without its number and with a lower-case first letter, such as
/// `connection refused`.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::TIMED_OUT => "timed out",
            Self::UNRESOLVED => "name not resolved",
            Self::TO_ITSELF => "nothing listens there",
            Self::NO_ANSWER => "no answer in time",
            Self::CLOSED => "closed before the expected answer",
            Self::WRONG_ANSWER => "unexpected answer",
            Self::OTHER => "unknown error",
            Self(errno) => {
                let text = io::Error::from_raw_os_error(errno.into()).to_string();
                let text = text.split(" (os error").next().unwrap_or_default();
                let first = text.chars().next().map(|first| first.to_ascii_lowercase());
                return first
                    .into_iter()
                    .chain(text.chars().skip(1))
                    .try_for_each(|c| fmt::Write::write_char(f, c));
            }
        })
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The newest cause of one kind. Any thread writes it; the control plane reads it for the log and for
/// reports.
#[derive(Debug, Default)]
pub struct LastCause(AtomicU16);

impl LastCause {
    /// Notes that something failed for this cause.
    pub fn set(&self, cause: Cause) {
        self.0.store(cause.0, Relaxed);
    }

    /// The newest cause. `None`: nothing has failed yet.
    #[must_use]
    pub fn get(&self) -> Option<Cause> {
        Cause::of_errno(self.0.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_reads_as_the_kernels_words_without_its_number() {
        let of = |kind: i32| Cause::from(&io::Error::from_raw_os_error(kind)).to_string();
        assert_eq!(of(111), "connection refused");
        assert_eq!(of(104), "connection reset by peer");
        assert_eq!(of(113), "no route to host");
        assert_eq!(of(110), "timed out");
        assert_eq!(Cause::from(&io::Error::from(io::ErrorKind::TimedOut)), Cause::TIMED_OUT);
        assert_eq!(Cause::from(&io::Error::other("x")).to_string(), "unknown error");
        assert_eq!(i32::from(Cause::RESET.0), rustix::io::Errno::CONNRESET.raw_os_error());
        assert_eq!(i32::from(Cause::TIMED_OUT.0), rustix::io::Errno::TIMEDOUT.raw_os_error());
    }

    #[test]
    fn the_newest_cause_is_kept() {
        let last = LastCause::default();
        assert_eq!(last.get(), None);
        last.set(Cause::UNRESOLVED);
        last.set(Cause::RESET);
        assert_eq!(last.get(), Some(Cause::RESET));
    }
}
