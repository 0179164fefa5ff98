//! What the clock keeps of one session: some ticks, and a set of what is known of it.
//!
//! There is one for each idle session, so its size counts.

use std::task::Waker;

/// Counted from the clock's start; it wraps, and only differences are used.
pub(super) type Tick = u32;
/// A longer silence is as good as any: 248 days at the shortest tick, 68 years at the longest.
pub(super) const NO_LIMIT: Tick = Tick::MAX / 2;

/// One session, or none. There is one for each idle session, so its size counts.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) waker: Option<Waker>,
    /// The tick of its last activity.
    pub(super) last_activity: Tick,
    /// Ticks of silence that it is allowed, or [`NO_LIMIT`].
    pub(super) limit: Tick,
    /// The tick at which it is woken once, whatever it does.
    pub(super) settles_at: Tick,
    pub(super) state: State,
    /// Once it has settled: its peers are checked at each tick at which these bits of a count are all 0.
    pub(super) check_mask: u8,
    /// The key of its backend.
    pub(super) backend: u64,
}

/// A set of what is known of a session. Bits, because eight bytes an entry are 40 MB at a million idle sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct State(u8);

impl State {
    pub(super) const SETTLED: Self = Self(1);
    /// It waits for a socket to take bytes, and is woken now and then to look after the other one.
    pub(super) const STALLED: Self = Self(2);
    /// It is told to end.
    pub(super) const END_REQUESTED: Self = Self(4);
    /// It was told to end before, and was let go because bytes moved.
    pub(super) const DEFERRED: Self = Self(8);
    /// Bytes have moved since its peers were last known to have all of them.
    pub(super) const UNCONFIRMED: Self = Self(16);
    /// Its peers are to be checked.
    pub(super) const CHECK_DUE: Self = Self(32);
    /// It is to move to a lower place.
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
    pub(super) fn is_expired(&self, now: Tick) -> bool {
        self.limit != NO_LIMIT && now.wrapping_sub(self.last_activity) >= self.limit
    }

    /// Its peers are to be checked at this tick. By its `place`, so that not all sessions are checked at the same one.
    pub(super) fn is_check_due(&self, now: Tick, index: u32) -> bool {
        self.state.has_all(State::SETTLED.and(State::UNCONFIRMED))
            && now.wrapping_add(index) & Tick::from(self.check_mask) == 0
    }
}
