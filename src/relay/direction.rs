//! Moves the bytes of one direction of a session, from its source socket to its target socket.
//!
//! A direction uses one of three paths:
//!
//! - *Copy*: a read into the worker's buffer, then a write. Bytes that the target refuses are parked in a
//!   buffer of the direction's own.
//! - *Peek*: a read with MSG_PEEK, a write, then a read that discards from the source what the target took.
//!   That is a third system call for each 64 KiB, but refused bytes stay in the source's receive buffer. So
//!   a thousand slow readers need no memory of this process. (Freed parking buffers hardly ever return to
//!   the kernel, because the allocations of other sessions lie between them.)
//! - *Splice*: `splice(2)` moves pages through a pooled pipe without copying them. Bytes that the target
//!   refuses stay in the pipe.
//!
//! | from | to | when |
//! |---|---|---|
//! | copy | peek | a read was full, or the target refused bytes |
//! | peek | splice | the second filled read in a row, most of it taken |
//! | peek | copy | 16 peeks in a row were neither full nor refused |
//! | splice | peek | four small moves in a row, or no pipe is free |
//! | splice | copy | the end of the source, or an urgent byte, which splice cannot pass |
//!
//! Nothing is read while earlier bytes wait. So an idle direction owns neither buffer nor pipe, a slow
//! reader slows down a fast writer, and the bytes that a direction holds are bounded by one read or one
//! pipe.
//!
//! A direction closes no socket and does not know the other direction; `pair.rs` handles both. Next:
//! `socket.rs` for the system calls, `pipe.rs` for the pipes.

use std::io;
use std::task::{Context, Poll, ready};

use super::pipe::Pipe;
use super::stream::Stream;
use super::{BUFFER_BYTES, Buffers};

#[cfg(test)]
mod tests;

/// The bytes that one poll may move before other sessions of the worker run: some 100 µs of copying.
const BUDGET_BYTES: usize = 512 * 1024;
/// The least that a move counts against the budget. So a peer that sends single bytes as fast as they are
/// moved gets 128 moves per poll, not 500,000.
const MIN_COST_BYTES: usize = 4096;
/// The largest read of the copy path from TCP. A socket whose send buffer is empty takes this much at once,
/// so nothing has to be parked.
const FIRST_READ_BYTES: usize = BUFFER_BYTES / 2;
/// Full reads in a row that make a direction splice. With two, an answer of 64 KiB is still copied, which
/// costs less than a pipe.
const BULK_READS: u8 = 2;
/// Bounds of the size of the next peek after the target refused bytes. The size is twice what the target
/// took.
const MIN_PEEK_KIB: u8 = 16;
const MAX_PEEK_KIB: u8 = (BUFFER_BYTES / 1024) as u8;
/// Peeks in a row, neither full nor refused, after which a direction copies again.
const QUIET_PEEKS: u8 = 16;
/// Splicing fewer bytes than this does not pay: a copy takes two system calls, a move through a pipe three.
const SMALL_SPLICE_BYTES: usize = 32 * 1024;
/// Small splices in a row after which a direction peeks again.
const SMALL_SPLICES: u8 = 4;

/// The state of one direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    /// Bytes that were read and that the target has not taken. Boxed, because every idle session has the
    /// field and few have such bytes.
    waiting: Option<Box<Waiting>>,
    state: State,
    path: Path,
    /// Reads in a row that count towards the next switch: full peeks while peeking, small moves while
    /// splicing.
    switch_streak: u8,
    /// Peeks in a row that were neither full nor refused.
    quiet_peeks: u8,
    /// The target refused bytes that are still in the source. The source is not read until the target is
    /// writable.
    refused: bool,
    /// The size of the next peek in KiB; 0 stands for the whole buffer.
    peek_kib: u8,
}

/// Bytes that were taken out of the source and that the target has not taken yet.
#[derive(Debug)]
enum Waiting {
    Parked {
        bytes: Box<[u8]>,
        /// The number of bytes that the target has taken.
        start: usize,
    },
    Piped(Pipe),
}

/// How far a direction has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The source has ended. Bytes may still wait.
    SourceEnded,
    /// All bytes were passed on.
    Done,
    /// The target broke. Nothing more is moved.
    Abandoned,
}

/// How a direction moves its bytes: see the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Path {
    #[default]
    Copy,
    Peek,
    Splice,
}

/// The socket of a direction that failed, with its errno (0: not known). The errno is only logged; the other
/// side gets a reset in any case.
#[derive(Debug)]
pub(super) enum Broken {
    /// The socket that is read.
    Source(u16),
    /// The socket that is written.
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

/// The errno of `error`, or 0 if it has none.
pub(super) fn errno(error: &io::Error) -> u16 {
    error.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or(0)
}

impl Direction {
    /// Moves bytes until one side would block. Ready once the source has ended and the target has taken all
    /// of its bytes. Then the caller sends the target a FIN, or closes it right away if the other direction
    /// has ended, too: that saves a system call.
    ///
    /// Calls `moved` with the number of bytes each time the target takes some.
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
                // The budget is spent: other sessions run first, then this task again.
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
                // Only the path has changed.
                None => {}
            }
        }
    }

    /// Reads once into the worker's buffer and writes it to the target. `Some(0)`: the source has ended.
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

    /// Writes a copy of what is in the source to the target, and discards from the source what the target
    /// took. `None`: there are no bytes to peek at, and a plain read must find out why.
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
        // For a target that takes little at a time, the next peek copies less.
        let next = u8::try_from(2 * taken / 1024).unwrap_or(u8::MAX).clamp(MIN_PEEK_KIB, MAX_PEEK_KIB);
        self.peek_kib = if self.refused { next } else { 0 };
        let is_full = available == BUFFER_BYTES;
        // With a slow target the peeks are full as well, because bytes collect in the source. Such a
        // direction must not splice: its bytes would occupy a pipe while they wait.
        self.switch_streak = if is_full && taken >= available / 2 { self.switch_streak + 1 } else { 0 };
        self.quiet_peeks = if is_full || self.refused { 0 } else { self.quiet_peeks + 1 };
        if self.switch_streak >= BULK_READS && source.can_splice() && target.can_splice() {
            self.switch_to(Path::Splice);
        } else if self.quiet_peeks >= QUIET_PEEKS {
            self.switch_to(Path::Copy);
        }
        // Bounded, because the streak grows on where a side cannot splice.
        self.switch_streak = self.switch_streak.min(BULK_READS);
        // After a refusal, the target's next event wakes the task.
        if self.refused { Poll::Pending } else { Poll::Ready(Ok(Some(available))) }
    }

    /// Changes the path and begins to count anew.
    fn switch_to(&mut self, path: Path) {
        (self.path, self.switch_streak, self.quiet_peeks, self.peek_kib) = (path, 0, 0, 0);
    }

    /// Moves what is in the source into a pipe. `None`: only the path has changed.
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
            // 0 stands for the end, or for an urgent byte with more bytes after it. A plain read tells
            // which.
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

    /// Writes `bytes` to the target, and parks what it refuses.
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

    /// Writes waiting bytes to the target. Ready once none is left.
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

    /// Gives up, because the target broke: what waits is dropped, and nothing more is moved.
    pub(super) fn abandon(&mut self) {
        self.refused = false;
        self.waiting = None;
        self.state = State::Abandoned;
    }

    /// Nothing more will be moved.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done | State::Abandoned)
    }

    /// The target broke.
    pub(super) fn is_abandoned(&self) -> bool {
        self.state == State::Abandoned
    }

    /// True if the target has refused bytes. They wait here or in the source.
    pub(super) fn holds_bytes(&self) -> bool {
        self.waiting.is_some() || self.refused
    }
}
