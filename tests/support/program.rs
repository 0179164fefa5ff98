//! The `statera` program, and whatever other programs a scenario runs.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

use super::PATIENCE;

/// Where a program is that a scenario needs; fails with the cure where it is missing.
pub fn require(program: &str, package: &str) -> PathBuf {
    // Debian keeps nginx, nft and ip in sbin, which the PATH of a plain user lacks.
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).chain(sbin).map(|folder| folder.join(program)).find(|p| p.is_file());
    found.unwrap_or_else(|| {
        panic!("{program} is missing: install it by `make test`, or `apt-get install {package}`")
    })
}

/// A started `statera`, with a config file of its own. Killed by its own pid when dropped.
pub struct Program {
    child: Child,
    folder: TempDir,
}

impl Program {
    /// `statera run` with this config; its log goes to a file.
    pub fn run(yaml: &str) -> Self {
        Self::run_by(Command::new(Self::path()), yaml)
    }

    /// The program under test.
    pub fn path() -> &'static str {
        env!("CARGO_BIN_EXE_statera")
    }

    /// The same, started through `launcher` (`prlimit …`, `setpriv …`), whose last argument is the program.
    pub fn run_by(mut launcher: Command, yaml: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        // For launchers that make it another user's program.
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

    /// Everything it has written to standard output and standard error.
    pub fn log(&self) -> String {
        let mut text = String::new();
        let file = std::fs::File::open(self.folder.path().join("log"));
        file.and_then(|mut file| file.read_to_string(&mut text)).expect("a log");
        text
    }

    /// The folder that its config lies in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is ours")
    }

    /// Waits for its end.
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
        // It may have ended; its pid is ours until it is waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
