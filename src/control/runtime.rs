//! Makes the tokio runtime of a control-plane thread.

use std::io;
use std::os::unix::net::UnixStream;

use tokio::runtime::{Builder, Runtime};

/// A runtime for this thread.
///
/// # Errors
/// The system gives no descriptors.
pub fn new() -> io::Result<Runtime> {
    // With its first runtime tokio makes two sockets for signals, beside two descriptors of an epoll and an eventfd, and panics
    // where it gets none. So it is tried before whether there are eight descriptors.
    let probe: io::Result<Vec<_>> = (0..4).map(|_| UnixStream::pair()).collect();
    drop(probe?);
    Builder::new_current_thread().enable_all().build()
}
