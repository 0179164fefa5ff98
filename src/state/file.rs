//! Reads and writes the files of `state_dir`. A process that is killed at any moment leaves a complete file.
//!
//! The functions block, so they run on threads that may wait for a disk. A write creates a temporary file in
//! the same folder, syncs it (fsync), renames it over the old file, which is atomic, and syncs the folder.
//! The writer holds a lock on the temporary file, so that other processes remove only the temporary files of
//! writers that are gone. A file is read only if no other user can have written it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Unusable;

/// The largest file that is read. A table of 100,000 members with the longest names has less than half of
/// this.
pub(super) const MAX_BYTES: u64 = 64 * 1024 * 1024;
const SUFFIX: &str = ".table";
const TEMPORARY_SUFFIX: &str = ".tmp";
const RANDOM_DIGITS: usize = 16;
/// A file name may have 255 bytes; the temporary one has 22 more than this and `SUFFIX`.
const NAME_MAX_BYTES: usize = 200;
/// The most attempts to create a temporary file. An attempt fails if the name is taken, or if another
/// process removes the file at once.
const CREATE_ATTEMPTS: usize = 10;
const GROUP_AND_OTHERS_WRITE: u32 = 0o022;

/// The step of a write that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {error}")]
pub(super) struct WriteError {
    step: &'static str,
    error: io::Error,
}

impl WriteError {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self { step, error }
    }

    /// What the operator can do.
    pub(super) fn cure(&self) -> &'static str {
        match self.error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room on its disk",
            ErrorKind::PermissionDenied => "let this user write to it, or name another folder",
            ErrorKind::ReadOnlyFilesystem => "mount it writable, or name another folder",
            ErrorKind::NotADirectory | ErrorKind::AlreadyExists | ErrorKind::IsADirectory => {
                "something else has this name: remove it, or name another folder"
            }
            _ => "check the folder and its disk",
        }
    }
}

/// Returns the name of a pool's file. Bytes other than ASCII letters, digits, `_`, `-` and `.` (not as the
/// first byte) are written as `%` and two hexadecimal digits.
pub(super) fn name_of(pool: &str) -> String {
    let mut name = String::new();
    for (at, byte) in pool.bytes().enumerate() {
        let is_plain = byte.is_ascii_alphanumeric() || b"_-".contains(&byte) || (byte == b'.' && at > 0);
        if is_plain {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02x}"));
        }
    }
    // config.yaml allows 1 to 64 bytes. The checksum keeps two longer names apart that begin alike, and an
    // empty name must not give a hidden file.
    if name.is_empty() || name.len() > NAME_MAX_BYTES {
        name.truncate(NAME_MAX_BYTES - 9);
        name.push_str(&format!("%{:08x}", crc32fast::hash(pool.as_bytes())));
    }
    name + SUFFIX
}

/// Returns the content of a file, `None` if the file does not exist.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, Unusable> {
    // Without NONBLOCK, opening a named pipe would wait for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(descriptor) => File::from(descriptor),
        // If `state_dir` itself is not a folder, `prepare` reports it.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(Errno::LOOP) => return Err(Unusable::NotPlain("a symbolic link")),
        Err(error) => return Err(Unusable::Unreadable(error.into())),
    };
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(Unusable::NotPlain(if about.is_dir() { "a folder" } else { "a pipe or a device" }));
    }
    // The content decides where sessions go, and its checksum does not prove which user wrote it.
    if ![0, rustix::process::geteuid().as_raw()].contains(&about.uid()) {
        return Err(Unusable::OtherOwner(about.uid()));
    }
    if about.mode() & GROUP_AND_OTHERS_WRITE != 0 {
        return Err(Unusable::OpenToOthers);
    }
    if about.len() > MAX_BYTES {
        return Err(Unusable::TooLarge);
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Replaces the content of `name` by `bytes`. If a step before or at the rename fails, the old file stays
/// as it was. If only the sync of the folder fails, the new file is there, but may not outlast a crash.
pub(super) fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let mut temporary = Temporary::create(folder, name)?;
    temporary.fill(bytes)?;
    fs::rename(&temporary.path, folder.join(name)).map_err(WriteError::at("rename the new file"))?;
    // Only this sync makes the rename durable. Some file systems cannot sync a folder and answer EINVAL.
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error) if error.kind() != ErrorKind::InvalidInput => {
            Err(WriteError { step: "sync the folder", error })
        }
        _ => Ok(()),
    }
}

/// Creates the folder if it is missing, removes the temporary files of killed writers, and checks that a
/// file can be written.
pub(super) fn prepare(folder: &Path) -> Result<(), WriteError> {
    make(folder)?;
    // Temporary files that cannot be removed do no harm.
    let _ = sweep(folder);
    Temporary::create(folder, &name_of("probe"))?.fill(b"Can this folder be written?\n")
}

fn make(folder: &Path) -> Result<(), WriteError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(WriteError::at("make the folder"))
}

fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let is_ours = entry.file_name().to_str().is_some_and(is_temporary) && entry.file_type()?.is_file();
        // The lock is held until the file is removed, so that a writer that has just created it notices.
        if is_ours
            && let Ok(file) = File::open(entry.path())
            && !matches!(file.try_lock(), Err(TryLockError::WouldBlock))
        {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

fn is_temporary(name: &str) -> bool {
    let inner = name.strip_prefix('.').and_then(|name| name.strip_suffix(TEMPORARY_SUFFIX));
    inner.and_then(|inner| inner.rsplit_once('.')).is_some_and(|(name, random)| {
        name.ends_with(SUFFIX)
            && random.len() == RANDOM_DIGITS
            && random.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// A file that is being written. It is removed when dropped, unless it was renamed.
struct Temporary {
    file: File,
    path: PathBuf,
}

impl Temporary {
    fn create(folder: &Path, name: &str) -> Result<Self, WriteError> {
        let mut last = io::Error::from(ErrorKind::AlreadyExists);
        for _ in 0..CREATE_ATTEMPTS {
            let random = fastrand::u64(..);
            let path = folder.join(format!(".{name}.{random:0RANDOM_DIGITS$x}{TEMPORARY_SUFFIX}"));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => {
                    let temporary = Self { file, path };
                    if temporary.is_ours() {
                        return Ok(temporary);
                    }
                }
                Err(error) => {
                    last = error;
                    match last.kind() {
                        // Another process has removed the folder, or replaced it by something else.
                        ErrorKind::NotFound | ErrorKind::NotADirectory => make(folder)?,
                        ErrorKind::AlreadyExists => {}
                        _ => break,
                    }
                }
            }
        }
        Err(WriteError { step: "create a file", error: last })
    }

    /// False if a process that removes temporary files was faster than our lock. True on file systems
    /// without locks.
    fn is_ours(&self) -> bool {
        !matches!(self.file.try_lock(), Err(TryLockError::WouldBlock))
            && self.file.metadata().is_ok_and(|about| about.nlink() > 0)
    }

    fn fill(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.file.write_all(bytes).map_err(WriteError::at("write a file"))?;
        self.file.sync_all().map_err(WriteError::at("sync a file"))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is no file of this name. The name is random, so it is no other writer's
        // either.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests;
