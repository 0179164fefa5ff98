//! The tokio runtime of a control-plane thread.

use std::io;
use std::os::unix::net::UnixStream;

use tokio::runtime::{Builder, Runtime};

/// Makes a runtime that this thread drives.
///
/// # Errors
/// The process has no descriptors left.
pub fn new() -> io::Result<Runtime> {
    // With its first runtime tokio opens two sockets for signals besides an epoll and an eventfd descriptor,
    // and panics where it gets none. Opening eight descriptors first turns that panic into an error.
    let probe: io::Result<Vec<_>> = (0..4).map(|_| UnixStream::pair()).collect();
    drop(probe?);
    Builder::new_current_thread().enable_all().build()
}
