//! The pipes that a process has open and the bytes in them, which show a scenario that bytes are spliced.

use std::fs::{read_dir, read_link, symlink_metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::ioctl_fionread;

/// The number of open pipe ends of the process `pid`.
pub fn pipe_ends(pid: u32) -> usize {
    pipes(pid).len()
}

/// How many bytes each non-empty pipe of the process `pid` holds. For the calling process that includes the
/// pipes of its other tests.
pub fn piped_bytes(pid: u32) -> Vec<u64> {
    let held = pipes(pid).into_iter().filter_map(|path| {
        // A pipe that the process only writes to, such as its output, holds bytes for another process.
        let reads = symlink_metadata(&path).ok()?.mode() & 0o600 == 0o400;
        let open = || open(&path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok();
        ioctl_fionread(reads.then(open)??).ok()
    });
    held.filter(|bytes| *bytes > 0).collect()
}

fn pipes(pid: u32) -> Vec<PathBuf> {
    let entries = read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_pipe =
        |path: &PathBuf| read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("pipe:"));
    paths.filter(is_pipe).collect()
}
