//! The files of `state_dir`: written so that a kill at any moment leaves a whole one, read with suspicion.
//!
//! Blocking: for threads that may wait for a disk. A write goes to a file of its own name in the same folder, is made to
//! last (fsync), takes the place of the old file (rename, which is all or nothing), and that is made to last, too. While
//! it is written, the temporary file is locked: whoever starts beside us removes only those whose writer is gone.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Unusable;

/// A table of 100,000 members with the longest names has half of this.
pub(super) const MAX_BYTES: u64 = 64 * 1024 * 1024;
const SUFFIX: &str = ".table";
const TEMPORARY_SUFFIX: &str = ".tmp";
const RANDOM_DIGITS: usize = 16;
/// A file name may have 255 bytes; the temporary one has 22 more than this and `SUFFIX`.
const NAME_MAX_BYTES: usize = 200;
/// Of a name that is taken, or removed at once by one who sweeps.
const CREATE_ATTEMPTS: usize = 10;
const GROUP_AND_OTHERS_WRITE: u32 = 0o022;

/// A step of a write failed.
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

    /// What a person can do.
    pub(super) fn cure(&self) -> &'static str {
        match self.error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room on its disk",
            ErrorKind::PermissionDenied => "let this user write to it, or name another folder",
            ErrorKind::ReadOnlyFilesystem => "mount it writable, or name another folder",
            ErrorKind::NotADirectory | ErrorKind::AlreadyExists | ErrorKind::IsADirectory => {
                "something else has this name: remove it, or name another folder"
            }
            _ => "look after the folder and its disk",
        }
    }
}

/// The file of a pool. What could mean something to a file system is written as `%` and two digits.
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
    // config.yaml allows 1 to 64 bytes. A longer one must not meet another that begins like it, and none must not hide.
    if name.is_empty() || name.len() > NAME_MAX_BYTES {
        name.truncate(NAME_MAX_BYTES - 9);
        name.push_str(&format!("%{:08x}", crc32fast::hash(pool.as_bytes())));
    }
    name + SUFFIX
}

/// The content of a file; `None` where there is none.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, Unusable> {
    // Without NONBLOCK, opening a pipe that somebody left there would wait for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(descriptor) => File::from(descriptor),
        // A folder that is none is told of by whoever tries to write.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(Errno::LOOP) => return Err(Unusable::NotPlain("a symbolic link")),
        Err(error) => return Err(Unusable::Unreadable(error.into())),
    };
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(Unusable::NotPlain(if about.is_dir() { "a folder" } else { "a pipe or a device" }));
    }
    // A checksum proves that a file is whole, not who wrote it, and whoever wrote it says where sessions go.
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

/// Makes `bytes` the content of `name`, or leaves what was there.
pub(super) fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let mut temporary = Temporary::create(folder, name)?;
    temporary.fill(bytes)?;
    fs::rename(&temporary.path, folder.join(name)).map_err(WriteError::at("rename the new file"))?;
    // The name lasts only now. Some file systems cannot be asked for that.
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error) if error.kind() != ErrorKind::InvalidInput => {
            Err(WriteError { step: "make the folder last", error })
        }
        _ => Ok(()),
    }
}

/// Makes the folder where it is missing, removes what killed writers left behind, and tries whether it can be written.
pub(super) fn prepare(folder: &Path) -> Result<(), WriteError> {
    make(folder)?;
    // What cannot be removed does no harm.
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
        // The lock is held until it is gone, so that a writer that has just made it sees that.
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

/// A file that is being written. Removed when dropped, unless it was given another name.
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
                        // Someone has removed the folder, or put something else there.
                        ErrorKind::NotFound | ErrorKind::NotADirectory => make(folder)?,
                        ErrorKind::AlreadyExists => {}
                        _ => break,
                    }
                }
            }
        }
        Err(WriteError { step: "create a file", error: last })
    }

    /// False if one who sweeps was faster than the lock. Where the file system knows no locks, nobody can tell.
    fn is_ours(&self) -> bool {
        !matches!(self.file.try_lock(), Err(TryLockError::WouldBlock))
            && self.file.metadata().is_ok_and(|about| about.nlink() > 0)
    }

    fn fill(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.file.write_all(bytes).map_err(WriteError::at("write a file"))?;
        self.file.sync_all().map_err(WriteError::at("make a file last"))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already where it was renamed; no other file ever has this name.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests;
