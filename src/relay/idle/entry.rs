//! What the idle clock keeps of one session: some ticks and a set of flags.

use std::task::Waker;

/// A number of ticks since the clock's start. It wraps, so only differences are compared.
pub(super) type Tick = u32;
/// No limit. The largest possible limit is 248 days at the shortest tick and 68 years at the longest.
pub(super) const NO_LIMIT: Tick = Tick::MAX / 2;

/// The entry of one session, or a free entry. Each idle session has one, so its size (40 bytes) matters.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) waker: Option<Waker>,
    /// The tick of the session's last activity.
    pub(super) last_activity: Tick,
    /// The ticks of silence after which the session ends, or [`NO_LIMIT`].
    pub(super) limit: Tick,
    /// The tick at which the session has lived for its settle time. The session is woken at this tick.
    pub(super) settles_at: Tick,
    pub(super) state: State,
    /// For a settled session: its peers are checked at ticks at which these bits of (tick + index) are all
    /// 0.
    pub(super) check_mask: u8,
    /// The key of the session's backend.
    pub(super) backend: u64,
}

/// A set of flags of a session. Bits, because a `bool` for each flag would make the entry eight bytes larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct State(u8);

impl State {
    /// The session has lived for its settle time.
    pub(super) const SETTLED: Self = Self(1);
    /// Bytes wait for one socket, so the other socket is not read. The clock wakes the session now and then
    /// to check whether the unread socket was reset.
    pub(super) const STALLED: Self = Self(2);
    /// The session's end was requested.
    pub(super) const END_REQUESTED: Self = Self(4);
    /// The session's end was requested before and delayed, because bytes moved.
    pub(super) const DEFERRED: Self = Self(8);
    /// Bytes have moved since the peers were last known to have all of them.
    pub(super) const UNCONFIRMED: Self = Self(16);
    /// The session's peers are to be checked.
    pub(super) const CHECK_DUE: Self = Self(32);
    /// The session is to move to a lower entry.
    pub(super) const MOVE_REQUESTED: Self = Self(64);

    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(super) fn has_any(self, of: Self) -> bool {
        self.0 & of.0 != 0
    }

    pub(super) fn has_all(self, of: Self) -> bool {
        self.0 & of.0 == of.0
    }

    pub(super) fn set(&mut self, these: Self, on: bool) {
        self.0 = if on { self.0 | these.0 } else { self.0 & !these.0 };
    }
}

impl Entry {
    /// True if the session was silent for its limit.
    pub(super) fn is_expired(&self, now: Tick) -> bool {
        self.limit != NO_LIMIT && now.wrapping_sub(self.last_activity) >= self.limit
    }

    /// True if the session's peers are to be checked at this tick. The index spreads the checks of many
    /// sessions over the ticks.
    pub(super) fn is_check_due(&self, now: Tick, index: u32) -> bool {
        self.state.has_all(State::SETTLED.and(State::UNCONFIRMED))
            && now.wrapping_add(index) & Tick::from(self.check_mask) == 0
    }
}
