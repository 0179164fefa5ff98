//! Both directions of a session: moves bytes in each, and passes the end of a source on to its target.
//!
//! There is no clock here: how long a session may be silent is decided in `mod.rs`.

use std::task::{Context, Poll};

use super::direction::{Broken, Direction, errno};
use super::stream::Stream;
use super::{Buffers, Ended, Meter, Side};

/// The two streams of a session, and its two directions.
pub(super) struct Pair<'a> {
    pub(super) client: &'a mut Stream,
    pub(super) backend: &'a mut Stream,
    pub(super) to_backend: Direction,
    pub(super) to_client: Direction,
}

impl Pair<'_> {
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        buffers: &Buffers,
        meter: &mut Meter<'_>,
    ) -> Poll<Ended> {
        let errno = &mut meter.session.errno;
        let to_backend = self.poll_towards(Side::Backend, cx, buffers, errno, |bytes| {
            meter.session.to_backend += bytes;
            meter.backend.bytes_sent.add(bytes);
        });
        if let Some(ended) = to_backend {
            return Poll::Ready(ended);
        }
        let errno = &mut meter.session.errno;
        let to_client = self.poll_towards(Side::Client, cx, buffers, errno, |bytes| {
            if meter.session.to_client == 0 {
                meter.backend.answered.add(1);
            }
            meter.session.to_client += bytes;
            meter.backend.bytes_received.add(bytes);
        });
        if let Some(ended) = to_client {
            return Poll::Ready(ended);
        }
        if self.to_backend.is_done() && self.to_client.is_done() {
            Poll::Ready(self.broken_target().map_or(Ended::Finished, Ended::Reset))
        } else {
            Poll::Pending
        }
    }

    /// Moves bytes to `target_side`. Once the source has ended, shuts the target down, unless the other
    /// direction is done already. Returns `Some` if the source broke, which ends the session. `broken` gets
    /// the errno of the socket that broke.
    fn poll_towards(
        &mut self,
        target_side: Side,
        cx: &mut Context<'_>,
        buffers: &Buffers,
        broken: &mut u16,
        moved: impl FnMut(u64),
    ) -> Option<Ended> {
        let (direction, opposite, source, source_side, target) = match target_side {
            Side::Backend => {
                (&mut self.to_backend, &self.to_client, &mut *self.client, Side::Client, &mut *self.backend)
            }
            Side::Client => {
                (&mut self.to_client, &self.to_backend, &mut *self.backend, Side::Backend, &mut *self.client)
            }
        };
        if direction.is_done() {
            return None;
        }
        match direction.poll_move(cx, source, target, buffers, moved) {
            Poll::Pending => {}
            Poll::Ready(Err(Broken::Source(errno))) => {
                *broken = errno;
                return Some(Ended::Reset(source_side));
            }
            Poll::Ready(Err(Broken::Target(errno))) => {
                if *broken == 0 {
                    *broken = errno;
                }
                // What the target sent before it broke is still in its receive buffer: the other direction
                // reads it.
                direction.abandon();
            }
            // The other direction is done, too, so the session is over: closing the sockets ends this half,
            // and saves the system call.
            Poll::Ready(Ok(())) if opposite.is_done() => {}
            Poll::Ready(Ok(())) => {
                if let Err(error) = target.shutdown() {
                    if *broken == 0 {
                        *broken = errno(&error);
                    }
                    direction.abandon();
                }
            }
        }
        None
    }

    /// Returns the side that broke when it was written to; the client if both did. Call it when both
    /// directions are done: then all that the other direction could move was passed on.
    fn broken_target(&self) -> Option<Side> {
        if self.to_client.is_abandoned() {
            Some(Side::Client)
        } else {
            self.to_backend.is_abandoned().then_some(Side::Backend)
        }
    }

    /// True while both halves are open.
    pub(super) fn is_open(&self) -> bool {
        !self.to_backend.is_done() && !self.to_client.is_done()
    }

    /// True if a side has refused bytes, in either direction.
    pub(super) fn holds_bytes(&self) -> bool {
        self.to_backend.holds_bytes() || self.to_client.holds_bytes()
    }

    /// Makes the next move try again to write refused bytes, where that may work without an event (unix
    /// sockets). Returns false if there are none.
    pub(super) fn retry_writes(&self) -> bool {
        (self.to_client.holds_bytes() && self.client.retry_write())
            | (self.to_backend.holds_bytes() && self.backend.retry_write())
    }

    /// Returns a side that was reset and is not read, because bytes that it sent still wait for the other
    /// side.
    pub(super) fn broken_source(&self) -> Option<Side> {
        if self.to_backend.holds_bytes() && self.client.is_broken() {
            Some(Side::Client)
        } else if self.to_client.holds_bytes() && self.backend.is_broken() {
            Some(Side::Backend)
        } else {
            None
        }
    }

    /// The errno of the connection to `side`, or 0 if the kernel gives none.
    pub(super) fn errno(&self, side: Side) -> u16 {
        let stream = if side == Side::Client { &self.client } else { &self.backend };
        stream.error().as_ref().map_or(0, errno)
    }

    /// Returns the side that has not yet ended its half in a half-closed session.
    pub(super) fn awaited(&self) -> Side {
        if self.to_backend.is_done() { Side::Backend } else { Side::Client }
    }
}
