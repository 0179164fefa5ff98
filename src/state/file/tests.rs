//! Writers that fail, are killed or write at the same time; files that Statera did not write.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::*;

const NAME: &str = "web.table";
/// Enough lines for a write of several system calls and pages.
const LINES: usize = 40_000;

fn folder() -> TempDir {
    TempDir::new().expect("a folder")
}

/// Returns the content that writer `number` writes. It is complete if all lines are there and equal.
fn content(number: u64) -> Vec<u8> {
    format!("{number:09}\n").repeat(LINES).into_bytes()
}

/// Returns the number in a file's content, and fails the test if the content is not complete.
fn number(bytes: &[u8]) -> u64 {
    let number = std::str::from_utf8(&bytes[..9]).expect("a text").parse().expect("a number");
    assert!(bytes == content(number), "a file that is not whole: {} bytes", bytes.len());
    number
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a text")).collect()
}

fn only(name: &str) -> BTreeSet<String> {
    BTreeSet::from([name.to_owned()])
}

#[test]
fn a_written_file_can_be_read_by_its_owner_only() {
    let parent = folder();
    let folder = parent.path().join("not/there/yet");
    assert!(read(&folder.join(NAME)).expect("no folder is no file").is_none());
    write(&folder, NAME, b"one").expect("it is created");
    write(&folder, NAME, b"two").expect("it is replaced");
    assert_eq!(read(&folder.join(NAME)).expect("it is plain").expect("it is there"), b"two");
    assert_eq!(names(&folder), only(NAME));
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&folder.join(NAME))), (0o700, 0o600));
}

#[test]
fn a_write_that_fails_changes_nothing() {
    let folder = folder();
    fs::create_dir_all(folder.path().join("taken.table/by_a_folder")).expect("a folder");
    let error = write(folder.path(), "taken.table", b"x").expect_err("a folder was replaced");
    assert!(error.to_string().starts_with("cannot rename the new file: "), "{error}");
    assert!(error.cure().contains("remove it"), "{error:?}");
    assert_eq!(names(folder.path()), only("taken.table"));

    let file = folder.path().join("a_file");
    fs::write(&file, "not a folder").expect("a file");
    for error in [prepare(&file).expect_err("no folder"), write(&file, NAME, b"x").expect_err("no folder")] {
        assert!(error.to_string().starts_with("cannot make the folder: "), "{error}");
    }
    assert_eq!(fs::read(&file).expect("it is there"), b"not a folder");
}

#[test]
fn file_names_of_pools_are_different_and_stay_in_the_folder() {
    let long = "x".repeat(1_000);
    let pools = ["web", "Web", "..", ".", ".web", "a/b", "a%2fb", "", "\0", "é", "a.b-c_d", &long];
    let longer = format!("{long}y");
    let names: BTreeSet<String> = pools.iter().chain([&longer.as_str()]).map(|pool| name_of(pool)).collect();
    assert_eq!(names.len(), pools.len() + 1, "{names:?}");
    for name in names {
        assert!(!name.starts_with('.') && !name.contains(['/', '\0']), "{name}");
        assert!(name.len() + 1 + 1 + RANDOM_DIGITS + TEMPORARY_SUFFIX.len() <= 255, "{name}");
        assert!(!is_temporary(&name), "{name}");
    }
    assert_eq!((name_of("web"), name_of("..")), ("web.table".to_owned(), "%2e..table".to_owned()));
}

#[test]
fn temporary_files_of_killed_writers_are_removed_and_no_others() {
    let folder = folder();
    let left = folder.path().join(".web.table.0123456789abcdef.tmp");
    fs::write(&left, "half").expect("a file");
    let kept = [".web.table.0123.tmp", ".web.swp", "web.tmp", "notes.txt", NAME];
    for name in kept {
        fs::write(folder.path().join(name), "mine").expect("a file");
    }
    let mut under_way = Temporary::create(folder.path(), NAME).expect("it is made");
    prepare(folder.path()).expect("it can be written");
    assert!(!left.exists() && under_way.path.exists());
    assert_eq!(names(folder.path()).len(), kept.len() + 1);
    under_way.fill(b"whole").expect("it is still ours");
    drop(under_way);
    assert_eq!(names(folder.path()), kept.map(str::to_owned).into());
}

#[test]
fn only_a_plain_file_that_no_other_user_can_write_is_read() {
    let folder = folder();
    let path = folder.path().join(NAME);
    let refusal = || {
        let refusal = read(&path).expect_err("a refusal").to_string();
        let remove = if path.is_dir() && !path.is_symlink() { fs::remove_dir } else { fs::remove_file };
        remove(&path).expect("it is there");
        refusal
    };
    symlink("/etc/hostname", &path).expect("a link");
    assert_eq!(refusal(), "it is a symbolic link, not a plain file");
    fs::create_dir(&path).expect("a folder");
    assert_eq!(refusal(), "it is a folder, not a plain file");
    let pipe = Command::new("mkfifo").arg(&path).status().expect("mkfifo runs");
    assert!(pipe.success());
    assert_eq!(refusal(), "it is a pipe or a device, not a plain file");
    File::create(&path).and_then(|file| file.set_len(MAX_BYTES + 1)).expect("a file");
    assert_eq!(refusal(), "it is larger than 64 MiB");
    fs::write(&path, "x").expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).expect("it is ours");
    assert_eq!(refusal(), "others may write to it: chmod go-w");
    // Only root can change a file's owner.
    if rustix::process::geteuid().is_root() {
        fs::write(&path, "x").expect("a file");
        std::os::unix::fs::chown(&path, Some(65_534), None).expect("root may");
        assert_eq!(refusal(), "it belongs to another user (uid 65534)");
    }
}

#[test]
fn concurrent_writers_and_removers_leave_a_complete_file() {
    let folder = folder();
    write(folder.path(), NAME, &content(0)).expect("it is written");
    thread::scope(|scope| {
        let writers: Vec<_> = (1..=2)
            .map(|writer| {
                let path = folder.path();
                scope.spawn(move || {
                    for _ in 0..40 {
                        write(path, NAME, &content(writer)).expect("it is written");
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            for _ in 0..200 {
                prepare(folder.path()).expect("it can be written");
            }
        });
        while writers.iter().any(|writer| !writer.is_finished()) {
            number(&read(&folder.path().join(NAME)).expect("it is plain").expect("it is there"));
        }
    });
    assert_eq!(names(folder.path()), only(NAME));
}

/// The environment variable that names the folder to the child process, which writes to it.
const INSIDE: &str = "STATERA_TEST_KILLED_WRITER";
const THIS: &str = "state::file::tests::a_writer_that_is_killed_at_any_moment_leaves_a_complete_file";

/// Writes again and again until the parent process kills this one, but not for ever.
fn write_until_killed(folder: &Path) {
    let last = read(&folder.join(NAME)).expect("it is plain").map_or(0, |bytes| number(&bytes));
    for next in 1..100_000 {
        write(folder, NAME, &content(last + next)).expect("it is written");
    }
}

/// The child process that writes. Dropping this kills the process.
struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_writer_that_is_killed_at_any_moment_leaves_a_complete_file() {
    if let Some(folder) = std::env::var_os(INSIDE) {
        return write_until_killed(Path::new(&folder));
    }
    let folder = folder();
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let last = || read(&folder.path().join(NAME)).expect("it is plain").map_or(0, |bytes| number(&bytes));
    let mut left_behind = 0;
    for round in 0..40 {
        let before = last();
        let child = Command::new(std::env::current_exe().expect("this test's program"))
            .args(["--exact", THIS])
            .env(INSIDE, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("it starts");
        let writer = Writer(child);
        for waited in 0.. {
            if last() > before {
                break;
            }
            assert!(waited < 20_000, "seed {seed}, round {round}: it does not write");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_micros(random.u64(0..8_000)));
        drop(writer);
        assert!(last() > before, "seed {seed}, round {round}");
        left_behind += names(folder.path()).len() - 1;
        prepare(folder.path()).expect("it can be written");
        assert_eq!(names(folder.path()), only(NAME), "seed {seed}, round {round}");
    }
    assert!(left_behind > 0, "seed {seed}: no writer was killed during a write");
}
