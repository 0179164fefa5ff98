//! Pipes that bulk passes through without being copied, pooled by the worker and limited in number.
//!
//! A pipe belongs to a direction only while bytes are in it; an empty one goes back to the pool. One that dies with
//! bytes in it is closed, never used again. Where no pipe is to be had, a direction peeks.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};

use crate::net::descriptors::{User, is_reserved};

/// Fewer, larger moves: 64 KiB, 256 KiB and 1 MiB were measured to cost 0.51, 0.43 and 0.36 CPU seconds a gigabyte.
/// 1 MiB is what the kernel grants to an unprivileged process (`fs.pipe-max-size`).
const CAPACITY_BYTES: usize = 1024 * 1024;
/// Below this a pipe is no better than the worker's buffer. The kernel gives such small ones to a user who holds
/// 64 MiB of pipes already (`fs.pipe-user-pages-soft`).
const MIN_CAPACITY_BYTES: usize = 64 * 1024;
/// A worker that moves this many bulk flows at once copies the others.
const MAX_PIPES: usize = 32;

/// A worker's pipes.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    idle: RefCell<Vec<Pipe>>,
    /// Open pipes, here and in directions.
    open: Rc<Cell<usize>>,
}

/// A pipe; closed when dropped.
#[derive(Debug)]
pub(super) struct Pipe {
    pub(super) reader: OwnedFd,
    pub(super) writer: OwnedFd,
    pub(super) capacity_bytes: usize,
    /// What was moved in and not yet out.
    pub(super) held_bytes: usize,
    open: Rc<Cell<usize>>,
}

impl Pipes {
    /// An empty pipe; `None`: the limit is reached, or no descriptor is left for it.
    pub(super) fn take(&self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.borrow_mut().pop() {
            return Some(pipe);
        }
        if self.open.get() >= MAX_PIPES {
            return None;
        }
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
        if is_reserved(&reader, User::Sessions) || is_reserved(&writer, User::Sessions) {
            return None;
        }
        let capacity_bytes =
            fcntl_setpipe_size(&writer, CAPACITY_BYTES).or_else(|_| fcntl_getpipe_size(&writer)).ok()?;
        if capacity_bytes < MIN_CAPACITY_BYTES {
            return None;
        }
        self.open.set(self.open.get() + 1);
        Some(Pipe { reader, writer, capacity_bytes, held_bytes: 0, open: Rc::clone(&self.open) })
    }

    /// Takes back a pipe that is empty.
    pub(super) fn put_back(&self, pipe: Pipe) {
        if pipe.held_bytes == 0 {
            self.idle.borrow_mut().push(pipe);
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.open.set(self.open.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_pipes_are_used_again_and_others_are_not() {
        let pipes = Pipes::default();
        let pipe = pipes.take().expect("a pipe");
        assert!(pipe.capacity_bytes >= MIN_CAPACITY_BYTES);
        pipes.put_back(pipe);
        assert_eq!(pipes.open.get(), 1);
        let mut pipe = pipes.take().expect("the same pipe");
        assert_eq!(pipes.open.get(), 1);
        pipe.held_bytes = 1;
        pipes.put_back(pipe);
        assert_eq!((pipes.open.get(), pipes.idle.borrow().len()), (0, 0));
    }

    #[test]
    fn there_is_a_limit() {
        let pipes = Pipes::default();
        let taken: Vec<_> = std::iter::from_fn(|| pipes.take()).collect();
        assert!(taken.len() <= MAX_PIPES && !taken.is_empty());
        drop(taken);
        assert!(pipes.take().is_some());
    }
}
