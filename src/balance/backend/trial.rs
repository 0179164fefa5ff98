//! The trial session that an ejected backend gets: its number, and how far it has come.
//!
//! Both fit into one `u32`, which `condition.rs` keeps in an atomic.

use std::num::NonZeroU16;

/// How far the trial session of a backend has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrialProgress {
    /// There is no trial session; the next session becomes it.
    Wanted = 0,
    /// The trial session has been picked, and is about to connect.
    Begun = 1,
    /// The session has connected.
    Connected = 2,
    /// The session was answered, or ended without the backend's fault.
    Succeeded = 3,
    /// The session failed by the backend's fault.
    Failed = 4,
}

impl TrialProgress {
    pub(super) fn of(state: u32) -> Self {
        match state % 8 {
            0 => Self::Wanted,
            1 => Self::Begun,
            2 => Self::Connected,
            3 => Self::Succeeded,
            _ => Self::Failed,
        }
    }
}

/// The number of a trial. A session with the number of an earlier trial has no effect any more. Two bytes,
/// since a session has no room for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrialNumber(NonZeroU16);

impl TrialNumber {
    const FIRST: Self = Self(NonZeroU16::MIN);

    pub(super) fn of(state: u32) -> Self {
        u16::try_from(state >> 8).ok().and_then(NonZeroU16::new).map_or(Self::FIRST, Self)
    }

    pub(super) fn next(self) -> Self {
        self.0.checked_add(1).map_or(Self::FIRST, Self)
    }

    pub(super) fn with(self, progress: TrialProgress) -> u32 {
        u32::from(self.0.get()) << 8 | progress as u32
    }
}
