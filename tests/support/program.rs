//! The `statera` program as a process, and the check for other programs that a scenario needs.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

use super::PATIENCE;

/// The path of a program that a scenario needs. Panics with the cure if it is not installed.
pub fn require(program: &str, package: &str) -> PathBuf {
    // Debian installs nginx, nft and ip in sbin, which is not in the PATH of a plain user.
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).chain(sbin).map(|folder| folder.join(program)).find(|p| p.is_file());
    found.unwrap_or_else(|| {
        panic!("{program} is missing: install it by `make test`, or `apt-get install {package}`")
    })
}

/// A running `statera` with its own config file. Dropping it kills it by its own pid.
pub struct Program {
    child: Child,
    folder: TempDir,
}

impl Program {
    /// Starts `statera run` with this config. Its log goes to a file.
    pub fn run(yaml: &str) -> Self {
        Self::run_by(Command::new(Self::path()), yaml)
    }

    /// The path of the program under test.
    pub fn path() -> &'static str {
        env!("CARGO_BIN_EXE_statera")
    }

    /// [`Program::run`] through `launcher` (`prlimit …`, `setpriv …`): its last argument is the program.
    pub fn run_by(mut launcher: Command, yaml: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        // Launchers may run the program as another user, which has to read the config.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("it is ours");
        let config = folder.path().join("config.yaml");
        std::fs::write(&config, yaml).expect("a file");
        let log = std::fs::File::create(folder.path().join("log")).expect("a file");
        let child = launcher
            .args(["run", "-c"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("the program starts");
        Self { child, folder }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that the program has written to standard output and standard error.
    pub fn log(&self) -> String {
        let mut text = String::new();
        let file = std::fs::File::open(self.folder.path().join("log"));
        file.and_then(|mut file| file.read_to_string(&mut text)).expect("a log");
        text
    }

    /// The folder of its config.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }

    /// The exit status, if the program has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is ours")
    }

    /// Blocks until the program ends.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // If it has ended, the kill fails. No other process gets its pid before the wait.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
