//! One direction of a session: bytes from one socket to the other, waiting in nobody's memory.
//!
//! What is there moves through a buffer that the worker owns; only what the other side would not take is parked in a
//! buffer of the direction's own, and nothing more is read until that is gone. So an idle session holds no buffer, a
//! slow reader holds back a fast writer, and a direction never holds more than one worker buffer's worth.

use std::task::{Context, Poll, ready};

use super::stream::Stream;

/// Bytes that one poll may move before the other sessions of the worker get their turn: some 100 µs of copying.
const BUDGET_BYTES: usize = 512 * 1024;

/// The state of one direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    /// What the target would not take, and how much of it went since.
    parked: Option<Box<[u8]>>,
    parked_start: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The source has ended; parked bytes may still wait.
    SourceEnded,
    /// Everything was passed on, or the target is gone.
    Done,
}

/// Which socket of a direction failed. Why does not matter: to the other side it is a reset either way.
#[derive(Debug)]
pub(super) enum Broken {
    /// The one that is read.
    Source,
    /// The one that is written.
    Target,
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
        buffer: &mut [u8],
        mut moved: impl FnMut(u64),
    ) -> Poll<Result<(), Broken>> {
        let mut budget = BUDGET_BYTES;
        loop {
            ready!(self.poll_parked(cx, target, &mut moved))?;
            if self.state != State::Open {
                self.state = State::Done;
                return Poll::Ready(Ok(()));
            }
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let read = ready!(source.poll_read(cx, buffer)).map_err(|_| Broken::Source)?;
            if read == 0 {
                self.state = State::SourceEnded;
                continue;
            }
            budget = budget.saturating_sub(read);
            self.write_or_park(cx, target, &buffer[..read], &mut moved)?;
        }
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
                Poll::Ready(Ok(0)) => return Err(Broken::Target),
                Poll::Ready(Ok(written)) => {
                    moved(written as u64);
                    bytes = &bytes[written..];
                }
                Poll::Ready(Err(_)) => return Err(Broken::Target),
                Poll::Pending => {
                    self.parked = Some(bytes.into());
                    self.parked_start = 0;
                    break;
                }
            }
        }
        Ok(())
    }

    fn poll_parked(
        &mut self,
        cx: &mut Context<'_>,
        target: &mut Stream,
        moved: &mut impl FnMut(u64),
    ) -> Poll<Result<(), Broken>> {
        while let Some(parked) = &self.parked {
            match ready!(target.poll_write(cx, &parked[self.parked_start..])) {
                Ok(0) | Err(_) => return Poll::Ready(Err(Broken::Target)),
                Ok(written) => {
                    moved(written as u64);
                    self.parked_start += written;
                }
            }
            if self.parked_start == parked.len() {
                self.parked = None;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Stops, because the target is gone: nothing more will move.
    pub(super) fn abandon(&mut self) {
        self.parked = None;
        self.state = State::Done;
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// True while bytes wait that were read and not yet taken.
    pub(super) fn holds_bytes(&self) -> bool {
        self.parked.is_some()
    }
}
