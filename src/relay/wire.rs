//! What the kernel reports about one TCP connection, and what it means: when bytes last moved on the wire,
//! and whether the peer has vanished.
//!
//! The relay sees only reads from and writes to its sockets' buffers. Behind them, two things happen without
//! an event. Megabytes may leave the send buffer for a slow reader: epoll reports a socket as writable only
//! when about a third of the buffer is free. And bytes may wait for the acknowledgement of a machine that
//! has lost its power: keepalive sends no probes while bytes are unacknowledged. TCP_USER_TIMEOUT would
//! work then, but it also cuts a live peer whose window has been closed for that long (measured on 6.18:
//! with a timeout of 3 s, after 3.3 s).
//!
//! This file makes no system calls: `sock_diag.rs` queries the kernel, `mod.rs` acts.

use std::time::Duration;

/// Unanswered retransmissions or window probes before a peer can count as vanished. One may get lost, and
/// the answer takes a round trip.
const MIN_UNANSWERED: u8 = 2;
/// The kernel's default of the shortest (TCP_RTO_MIN) and longest (TCP_RTO_MAX) retransmission timeout.
const FIRST_TIMEOUT: Duration = Duration::from_millis(200);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(120);

/// The state of one TCP connection. Each duration is the time since something happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wire {
    /// Bytes written here and not acknowledged by the peer's kernel, whether they were sent or not.
    pub(super) unacknowledged_bytes: u32,
    /// Packets sent and not acknowledged.
    pub(super) packets_in_flight: u32,
    /// Retransmission timeouts in a row without progress.
    pub(super) retransmits: u8,
    /// Window probes or keepalive probes in a row that were not answered.
    pub(super) probes: u8,
    /// How often the current timeout was doubled. It is also doubled while a live peer answers that its
    /// window is closed.
    pub(super) backoff: u8,
    /// The time since bytes were sent; retransmissions count.
    pub(super) last_data_sent: Duration,
    /// The time since bytes were received.
    pub(super) last_data_received: Duration,
    /// The time since the last packet with an acknowledgement came, even as the answer to a probe.
    pub(super) last_ack: Duration,
}

impl Wire {
    /// The time since a byte last moved: was sent for the first time, acknowledged, or received.
    /// Retransmissions and probes are no moves. `keepalive_idle` is the silence before a keepalive probe,
    /// whose answer must not count as progress.
    ///
    /// Where the state does not say, the result is too short rather than too long.
    pub(super) fn since_bytes_moved(&self, keepalive_idle: Duration) -> Duration {
        let timeouts = self.retransmits.max(self.backoff);
        let sent = if self.packets_in_flight == 0 {
            // Probes of a closed window carry no bytes, so the bytes that were sent last were new.
            let acknowledged = self.unacknowledged_bytes == 0
                && self.last_data_sent.saturating_sub(self.last_ack) < keepalive_idle;
            if acknowledged { self.last_data_sent.min(self.last_ack) } else { self.last_data_sent }
        } else if timeouts == 0 {
            // No probes are sent while bytes are in flight, so an acknowledgement is one of bytes.
            self.last_data_sent.min(self.last_ack)
        } else {
            // The last packet sent was a retransmission. The timeouts before it take at least a known time.
            self.last_ack.max(self.last_data_sent + time_of_timeouts(timeouts))
        };
        sent.min(self.last_data_received)
    }

    /// True if the peer owes an acknowledgement, did not answer at least [`MIN_UNANSWERED`] retransmissions
    /// or probes, and has sent nothing for `limit`.
    ///
    /// A live peer whose window is closed answers each probe. It is silent between two probes, for up to two
    /// minutes, but then no probe is unanswered.
    pub(super) fn is_vanished(&self, limit: Duration) -> bool {
        self.unacknowledged_bytes > 0
            && self.retransmits.max(self.probes) >= MIN_UNANSWERED
            && self.last_ack.min(self.last_data_received) >= limit
    }
}

/// Returns the shortest time that `count` timeouts in a row take. Each is twice as long as the one before,
/// up to [`LONGEST_TIMEOUT`].
fn time_of_timeouts(count: u8) -> Duration {
    let timeouts = (0..u32::from(count)).map(|doublings| {
        let factor = 1u32.checked_shl(doublings).unwrap_or(u32::MAX);
        FIRST_TIMEOUT.saturating_mul(factor).min(LONGEST_TIMEOUT)
    });
    timeouts.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
    const LIMIT: Duration = Duration::from_secs(120);

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn moved(wire: Wire) -> Duration {
        wire.since_bytes_moved(KEEPALIVE_IDLE)
    }

    /// The state of a connection without any activity for an hour.
    fn silent() -> Wire {
        Wire {
            last_data_sent: seconds(3600),
            last_data_received: seconds(3600),
            last_ack: seconds(3600),
            ..Wire::default()
        }
    }

    #[test]
    fn bytes_sent_received_or_acknowledged_are_moves() {
        assert_eq!(moved(silent()), seconds(3600));
        assert_eq!(moved(Wire { last_data_received: seconds(2), ..silent() }), seconds(2));
        assert_eq!(moved(Wire { last_data_sent: seconds(3), ..silent() }), seconds(3));
        let in_flight = Wire { unacknowledged_bytes: 9, packets_in_flight: 1, ..silent() };
        assert_eq!(moved(Wire { last_ack: seconds(1), ..in_flight }), seconds(1), "a slow path");
        let delivered = Wire { last_data_sent: seconds(40), last_ack: seconds(10), ..silent() };
        assert_eq!(moved(delivered), seconds(10), "the last acknowledgement of a slow path");
    }

    #[test]
    fn answers_to_keepalive_probes_are_no_moves() {
        assert_eq!(moved(Wire { last_ack: seconds(5), ..silent() }), seconds(3600));
    }

    #[test]
    fn answers_of_a_peer_whose_window_is_closed_are_no_moves() {
        let closed = Wire { unacknowledged_bytes: 9, backoff: 4, last_ack: seconds(1), ..silent() };
        assert_eq!(moved(closed), seconds(3600));
        let just_closed = Wire { last_data_sent: seconds(2), ..closed };
        assert_eq!(moved(just_closed), seconds(2));
    }

    #[test]
    fn retransmissions_are_no_moves() {
        let lost = Wire { unacknowledged_bytes: 9, packets_in_flight: 1, ..silent() };
        let now = Duration::ZERO;
        let vanished = Wire { retransmits: 8, backoff: 8, last_data_sent: now, ..lost };
        assert_eq!(moved(vanished), seconds(3600));
        // A live peer that drops the bytes for want of memory, and acknowledges what it had before.
        let dropping = Wire { backoff: 4, last_data_sent: now, last_ack: now, ..lost };
        assert_eq!(moved(dropping), Duration::from_millis(200 + 400 + 800 + 1600));
        assert_eq!(moved(Wire { backoff: 60, ..dropping }), seconds(3600), "the count goes on for hours");
        assert!(time_of_timeouts(u8::MAX) > seconds(7 * 3600) && time_of_timeouts(0) == now);
    }

    #[test]
    fn only_a_peer_that_owes_an_answer_and_gives_none_has_vanished() {
        let vanished = Wire { unacknowledged_bytes: 9, packets_in_flight: 1, retransmits: 5, ..silent() };
        assert!(vanished.is_vanished(LIMIT));
        assert!(Wire { retransmits: 0, probes: 2, ..vanished }.is_vanished(LIMIT), "its window was closed");
        assert!(!silent().is_vanished(LIMIT), "keepalive probes it");
        assert!(!Wire { retransmits: 1, ..vanished }.is_vanished(LIMIT));
        assert!(!Wire { last_ack: seconds(119), ..vanished }.is_vanished(LIMIT));
        assert!(!Wire { last_data_received: seconds(119), ..vanished }.is_vanished(LIMIT));
        let closed = Wire { unacknowledged_bytes: 9, backoff: 12, ..silent() };
        assert!(!closed.is_vanished(LIMIT), "it has answered each probe");
        assert!(!Wire { probes: 1, ..closed }.is_vanished(LIMIT), "the probe was just sent");
    }
}
