//! One direction of a session: bytes from one socket to the other, waiting in nobody's memory.
//!
//! - It begins by copying: what is there moves through a buffer that the worker owns, and only what the target would not
//!   take is parked in a buffer of the direction's own.
//! - Where much comes, or where the target has refused something, it peeks: it copies what is there, and takes from the
//!   source only as much as the target took. That is a third system call for each 64 KiB, and nothing has to be parked: a
//!   thousand slow readers cost the kernel's buffers alone. (Memory that was parked once is hardly ever given back: sessions
//!   that live on lie between.)
//! - A direction that keeps filling the worker's buffer is bulk, and goes over to `splice(2)`: the kernel moves pages through
//!   a pooled pipe, and what the target would not take waits there.
//!
//! Nothing more is read until what waits is gone. So an idle session holds neither buffer nor pipe, a slow reader holds
//! back a fast writer, and what a direction holds is bounded by one read or one pipe.
//!
//! It closes nothing and knows nothing of the other direction: `mod.rs` does. Next: `socket.rs` for the system calls, `pipe.rs`.

use std::io;
use std::task::{Context, Poll, ready};

use super::pipe::Pipe;
use super::stream::Stream;
use super::{BUFFER_BYTES, Buffers};

#[cfg(test)]
mod tests;

/// Bytes that one poll may move before the other sessions of the worker get their turn: some 100 µs of copying.
const BUDGET_BYTES: usize = 512 * 1024;
/// What a move counts for at least, so that a peer who trickles bytes as fast as they are moved gets 128 moves, not 500,000.
const MIN_COST_BYTES: usize = 4096;
/// The first read of many. A socket that has nothing under way takes so much at once, so nothing of it is parked.
const FIRST_READ_BYTES: usize = BUFFER_BYTES / 2;
/// Full reads in a row that make a direction bulk. An answer of 64 KiB costs less copied than through a pipe.
const BULK_READS: u8 = 2;
/// For how much a direction looks whose target has refused something: twice what was taken, within these.
const MIN_PEEK_KIB: u8 = 16;
const MAX_PEEK_KIB: u8 = (BUFFER_BYTES / 1024) as u8;
/// Looks in a row that were neither full nor refused, after which a direction copies again.
const QUIET_PEEKS: u8 = 16;
/// A splice of less is no bulk: copying it takes two system calls, moving it through a pipe three.
const SMALL_SPLICE_BYTES: usize = 32 * 1024;
/// Small ones in a row that make a direction peek, and then copy, again.
const SMALL_SPLICES: u8 = 4;

/// The state of one direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    /// What was read and not yet taken by the target. Boxed: all idle sessions pay for its place, few have something in it.
    waiting: Option<Box<Waiting>>,
    state: State,
    path: Path,
    /// Reads in a row that speak for another way.
    switch_streak: u8,
    /// Peeks in a row after which nothing was left.
    quiet_peeks: u8,
    /// The target would not take all that the source has.
    refused: bool,
    /// How much the next look is for, in KiB; 0: as much as there is room for.
    peek_kib: u8,
}

#[derive(Debug)]
enum Waiting {
    Parked {
        bytes: Box<[u8]>,
        /// How much of it has gone.
        start: usize,
    },
    Piped(Pipe),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The source has ended; bytes may still wait.
    SourceEnded,
    /// Everything was passed on.
    Done,
    /// The target is gone.
    Abandoned,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Path {
    #[default]
    Copy,
    Peek,
    Splice,
}

/// Which socket of a direction failed, by which errno (0: none is known). The errno is for the log alone: to the other side
/// it is a reset either way.
#[derive(Debug)]
pub(super) enum Broken {
    /// The one that is read.
    Source(u16),
    /// The one that is written.
    Target(u16),
}

impl Broken {
    fn source(error: io::Error) -> Self {
        Self::Source(errno(&error))
    }

    fn target(error: io::Error) -> Self {
        Self::Target(errno(&error))
    }
}

/// 0 where the kernel gave none.
pub(super) fn errno(error: &io::Error) -> u16 {
    error.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or(0)
}

impl Direction {
    /// Moves bytes until one side would block. Ready once the source has ended and all its bytes were taken; the target
    /// is not told, since that costs a system call that a session which is over on both sides can do without.
    ///
    /// `moved` is called with the number of bytes that the target took.
    pub(super) fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        target: &mut Stream,
        buffers: &Buffers,
        mut moved: impl FnMut(u64),
    ) -> Poll<Result<(), Broken>> {
        let mut budget = BUDGET_BYTES;
        loop {
            ready!(self.poll_write_waiting(cx, target, buffers, &mut moved))?;
            if self.refused {
                ready!(target.poll_writable(cx));
                self.refused = false;
            }
            if self.state != State::Open {
                self.state = State::Done;
                return Poll::Ready(Ok(()));
            }
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let read = match self.path {
                Path::Copy => ready!(self.poll_copy(cx, source, target, buffers, &mut moved))?,
                Path::Peek => ready!(self.poll_peek(cx, source, target, buffers, &mut moved))?,
                Path::Splice => ready!(self.poll_splice(cx, source, buffers))?,
            };
            match read {
                Some(0) => self.state = State::SourceEnded,
                Some(read) => budget = budget.saturating_sub(read.max(MIN_COST_BYTES)),
                // The way has changed.
                None => {}
            }
        }
    }

    /// Reads once into the worker's buffer, and writes what the target takes. `Some(0)`: the source has ended.
    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        target: &mut Stream,
        buffers: &Buffers,
        moved: &mut impl FnMut(u64),
    ) -> Poll<Result<Option<usize>, Broken>> {
        let mut buffer = buffers.copy.borrow_mut();
        let limit = if source.can_peek() { FIRST_READ_BYTES } else { BUFFER_BYTES };
        let read = ready!(source.poll_read(cx, &mut buffer[..limit])).map_err(Broken::source)?;
        self.write_or_park(cx, target, &buffer[..read], moved)?;
        if source.can_peek() && (read == limit || self.holds_bytes()) {
            self.switch_to(Path::Peek);
            self.switch_streak = u8::from(read == limit);
        }
        Poll::Ready(Ok(Some(read)))
    }

    /// Copies what the source has, and takes from it what the target took. `None`: only a read tells what there is.
    fn poll_peek(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        target: &mut Stream,
        buffers: &Buffers,
        moved: &mut impl FnMut(u64),
    ) -> Poll<Result<Option<usize>, Broken>> {
        let mut buffer = buffers.copy.borrow_mut();
        let limit = if self.peek_kib == 0 { BUFFER_BYTES } else { usize::from(self.peek_kib) * 1024 };
        let available = ready!(source.poll_peek(cx, &mut buffer[..limit])).map_err(Broken::source)?;
        if available == 0 {
            self.switch_to(Path::Copy);
            return Poll::Ready(Ok(None));
        }
        let mut taken = 0;
        while taken < available && !self.refused {
            match target.poll_write(cx, &buffer[taken..available]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(Broken::Target(0))),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::target(error))),
                Poll::Ready(Ok(written)) => taken += written,
                Poll::Pending => self.refused = true,
            }
        }
        if taken > 0 {
            moved(taken as u64);
            let is_all = !self.refused && available < limit;
            source.discard(&mut buffer[..taken], is_all).map_err(Broken::source)?;
        }
        // A target that takes little at a time must not make us copy everything each time.
        let next = u8::try_from(2 * taken / 1024).unwrap_or(u8::MAX).clamp(MIN_PEEK_KIB, MAX_PEEK_KIB);
        self.peek_kib = if self.refused { next } else { 0 };
        let is_full = available == BUFFER_BYTES;
        // Who looks at the same bytes again and again has a slow reader, no bulk, and must not sit on a pipe.
        self.switch_streak = if is_full && taken >= available / 2 { self.switch_streak + 1 } else { 0 };
        self.quiet_peeks = if is_full || self.refused { 0 } else { self.quiet_peeks + 1 };
        if self.switch_streak >= BULK_READS && source.can_splice() && target.can_splice() {
            self.switch_to(Path::Splice);
        } else if self.quiet_peeks >= QUIET_PEEKS {
            self.switch_to(Path::Copy);
        }
        self.switch_streak = self.switch_streak.min(BULK_READS);
        // Where the target has refused something, it wakes us.
        if self.refused { Poll::Pending } else { Poll::Ready(Ok(Some(available))) }
    }

    fn switch_to(&mut self, path: Path) {
        (self.path, self.switch_streak, self.quiet_peeks, self.peek_kib) = (path, 0, 0, 0);
    }

    /// Moves what the source has into a pipe. `None`: the way has changed.
    fn poll_splice(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        buffers: &Buffers,
    ) -> Poll<Result<Option<usize>, Broken>> {
        let Some(mut pipe) = buffers.pipes.take() else {
            self.switch_to(Path::Peek);
            return Poll::Ready(Ok(None));
        };
        let read = match source.poll_fill(cx, &mut pipe) {
            Poll::Ready(Ok(read)) => read,
            other => {
                buffers.pipes.put_back(pipe);
                return other.map(|result| result.map(Some).map_err(Broken::source));
            }
        };
        if read == 0 {
            // The end, or an urgent byte, behind which the stream goes on: only a read tells them apart.
            buffers.pipes.put_back(pipe);
            self.switch_to(Path::Copy);
            return Poll::Ready(Ok(None));
        }
        self.switch_streak = if read < SMALL_SPLICE_BYTES { self.switch_streak + 1 } else { 0 };
        if self.switch_streak >= SMALL_SPLICES {
            self.switch_to(Path::Peek);
        }
        self.waiting = Some(Box::new(Waiting::Piped(pipe)));
        Poll::Ready(Ok(Some(read)))
    }

    fn write_or_park(
        &mut self,
        cx: &mut Context<'_>,
        target: &mut Stream,
        mut bytes: &[u8],
        moved: &mut impl FnMut(u64),
    ) -> Result<(), Broken> {
        while !bytes.is_empty() {
            match target.poll_write(cx, bytes) {
                Poll::Ready(Ok(0)) => return Err(Broken::Target(0)),
                Poll::Ready(Err(error)) => return Err(Broken::target(error)),
                Poll::Ready(Ok(written)) => {
                    moved(written as u64);
                    bytes = &bytes[written..];
                }
                Poll::Pending => {
                    self.waiting = Some(Box::new(Waiting::Parked { bytes: bytes.into(), start: 0 }));
                    break;
                }
            }
        }
        Ok(())
    }

    /// Ready once nothing waits.
    fn poll_write_waiting(
        &mut self,
        cx: &mut Context<'_>,
        target: &mut Stream,
        buffers: &Buffers,
        moved: &mut impl FnMut(u64),
    ) -> Poll<Result<(), Broken>> {
        loop {
            let Some(waiting) = self.waiting.as_deref_mut() else { return Poll::Ready(Ok(())) };
            let (written, left) = match waiting {
                Waiting::Parked { bytes, start } => {
                    let written = ready!(target.poll_write(cx, &bytes[*start..])).map_err(Broken::target)?;
                    *start += written;
                    (written, bytes.len() - *start)
                }
                Waiting::Piped(pipe) => {
                    let written = ready!(target.poll_empty(cx, pipe)).map_err(Broken::target)?;
                    (written, pipe.held_bytes)
                }
            };
            if written == 0 {
                return Poll::Ready(Err(Broken::Target(0)));
            }
            moved(written as u64);
            if left == 0
                && let Some(Waiting::Piped(pipe)) = self.waiting.take().map(|waiting| *waiting)
            {
                buffers.pipes.put_back(pipe);
            }
        }
    }

    /// Stops, because the target is gone: nothing more will move.
    pub(super) fn abandon(&mut self) {
        self.refused = false;
        self.waiting = None;
        self.state = State::Abandoned;
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done | State::Abandoned)
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.state == State::Abandoned
    }

    /// True while bytes wait, here or in the source, that the target would not take.
    pub(super) fn holds_bytes(&self) -> bool {
        self.waiting.is_some() || self.refused
    }
}
