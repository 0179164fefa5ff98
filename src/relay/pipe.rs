//! Pipes for splicing, pooled per worker and limited in number.
//!
//! A direction owns a pipe only while bytes are in it, and puts it back when it is empty. A pipe that is
//! dropped with bytes in it is closed and never used again. A direction that gets no pipe peeks.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};

use crate::net::descriptors::{User, is_reserved};

/// The requested capacity. Large pipes need fewer moves: 64 KiB, 256 KiB and 1 MiB were measured to
/// cost 0.51, 0.43 and 0.36 CPU seconds per gigabyte. 1 MiB is the kernel's limit for unprivileged processes
/// (`fs.pipe-max-size`).
const CAPACITY_BYTES: usize = 1024 * 1024;
/// A smaller pipe is no better than the worker's buffer. A user that has 64 MiB of pipes already gets only
/// smaller pipes from the kernel (`fs.pipe-user-pages-soft`).
const MIN_CAPACITY_BYTES: usize = 64 * 1024;
/// The most pipes of a worker. While all of them are in use, other directions peek.
const MAX_PIPES: usize = 32;

/// The pipes of one worker.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    idle: RefCell<Vec<Pipe>>,
    /// The number of open pipes, both idle ones and those that directions own.
    open: Rc<Cell<usize>>,
}

/// A pipe. It is closed when dropped.
#[derive(Debug)]
pub(super) struct Pipe {
    pub(super) reader: OwnedFd,
    pub(super) writer: OwnedFd,
    pub(super) capacity_bytes: usize,
    /// The number of bytes in the pipe.
    pub(super) held_bytes: usize,
    open: Rc<Cell<usize>>,
}

impl Pipes {
    /// Returns an empty pipe. `None` if the limit is reached, or if no descriptor or no large pipe can be
    /// had.
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

    /// Keeps an empty pipe for the next use. Closes a pipe that is not empty.
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
    fn a_worker_opens_a_limited_number_of_pipes() {
        let pipes = Pipes::default();
        let taken: Vec<_> = std::iter::from_fn(|| pipes.take()).collect();
        assert!(taken.len() <= MAX_PIPES && !taken.is_empty());
        drop(taken);
        assert!(pipes.take().is_some());
    }
}
