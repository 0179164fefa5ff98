//! The pipes that a process has open and what is in them: how a scenario knows that bytes are spliced.

use std::fs::{read_dir, read_link, symlink_metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::ioctl_fionread;

/// Pipes of the process `pid`, counted by their ends.
pub fn pipe_ends(pid: u32) -> usize {
    pipes(pid).len()
}

/// How many bytes each of its pipes holds, without those that hold none. Of the calling process, those of all its tests.
pub fn piped_bytes(pid: u32) -> Vec<u64> {
    let held = pipes(pid).into_iter().filter_map(|path| {
        // Where the process only writes (its output, say), what waits is not for itself.
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
