//! Both directions of a session: moves bytes both ways, closes a half whose source has ended, and knows what each side still owes.
//!
//! It has no clock: how long a session may be silent is decided in `mod.rs`.

use std::task::{Context, Poll};

use super::direction::{Broken, Direction, errno};
use super::stream::Stream;
use super::{Buffers, Ended, Meter, Side};

/// Both directions of a session.
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
            Poll::Ready(self.refused_by().map_or(Ended::Finished, Ended::Reset))
        } else {
            Poll::Pending
        }
    }

    /// Moves what can be moved to `target_side`, and closes that half when its source has ended. `Some`: the session is
    /// over. `broken` is set to the errno of a socket that broke.
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
                // What the target sent before it went away still waits in its socket: the other direction fetches it.
                direction.abandon();
            }
            // Where both have ended, closing says the same and costs one system call less.
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

    /// A side that would not take our bytes; the client where neither did. What it sent before was still passed on.
    fn refused_by(&self) -> Option<Side> {
        if self.to_client.is_abandoned() {
            Some(Side::Client)
        } else {
            self.to_backend.is_abandoned().then_some(Side::Backend)
        }
    }

    /// Both halves are open.
    pub(super) fn is_open(&self) -> bool {
        !self.to_backend.is_done() && !self.to_client.is_done()
    }

    /// Bytes were read that the other side has not taken.
    pub(super) fn holds_bytes(&self) -> bool {
        self.to_backend.holds_bytes() || self.to_client.holds_bytes()
    }

    /// Lets the next move try to write what waits, where that may succeed without an event.
    pub(super) fn retry_writes(&self) -> bool {
        (self.to_client.holds_bytes() && self.client.retry_write())
            | (self.to_backend.holds_bytes() && self.backend.retry_write())
    }

    /// A side that was reset and is not being read, because its last bytes still wait for the other side.
    pub(super) fn broken_source(&self) -> Option<Side> {
        if self.to_backend.holds_bytes() && self.client.is_broken() {
            Some(Side::Client)
        } else if self.to_client.holds_bytes() && self.backend.is_broken() {
            Some(Side::Backend)
        } else {
            None
        }
    }

    /// Why the connection to `side` broke; 0 if the kernel does not say.
    pub(super) fn errno(&self, side: Side) -> u16 {
        let stream = if side == Side::Client { &self.client } else { &self.backend };
        stream.error().as_ref().map_or(0, errno)
    }

    /// Whose bytes a half-closed session still waits for.
    pub(super) fn awaited(&self) -> Side {
        if self.to_backend.is_done() { Side::Backend } else { Side::Client }
    }
}
