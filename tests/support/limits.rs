//! Resource limits for a started program: threads, descriptors, file sizes.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tempfile::TempDir;

use super::{Program, require};

/// A launcher for [`Program::run_by`] that starts the program through `prlimit` with these limits:
/// `--nofile=256:256`.
pub fn limited(limits: &[&str]) -> Command {
    let mut launcher = Command::new(require("prlimit", "util-linux"));
    launcher.args(limits).arg("--").arg(Program::path());
    launcher
}

/// Starts the program as a user that RLIMIT_NPROC binds: not root, and in a user namespace of its own, so
/// that the kernel counts the threads of this program alone.
pub struct Unprivileged {
    /// A folder that every user may write to. It holds a copy of the program, since other users may not be
    /// able to read the checkout.
    pub folder: TempDir,
}

impl Unprivileged {
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).expect("it is ours");
        std::fs::copy(Program::path(), folder.path().join("statera")).expect("there is room");
        Self { folder }
    }

    /// Sets the limit of threads beside the first one while the program runs.
    pub fn limit_threads(&self, program: &Program, threads: u64) {
        let mut command = Self::by_its_user("prlimit");
        command.args(["--pid", &program.pid().to_string(), &format!("--nproc={}:", threads + 1)]);
        assert!(command.status().expect("prlimit starts").success());
    }

    /// A command that runs a program of util-linux as that user.
    fn by_its_user(program: &str) -> Command {
        let program = require(program, "util-linux");
        if !rustix::process::geteuid().is_root() {
            return Command::new(program);
        }
        let mut command = Command::new(require("setpriv", "util-linux"));
        command.args(["--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--"]);
        command.arg(program);
        command
    }

    /// A launcher for [`Program::run_by`]: the program may start `threads` threads beside its first one.
    pub fn launcher(&self, threads: u64) -> Command {
        let mut launcher = Self::by_its_user("unshare");
        launcher.args(["--user", "--"]).arg(require("prlimit", "util-linux"));
        launcher.args([&format!("--nproc={}:", threads + 1), "--"]);
        launcher.arg(self.folder.path().join("statera"));
        launcher
    }
}

impl Program {
    /// Sets one of its limits while it runs. The hard one must be as this test has it.
    pub fn limit(&self, resource: Resource, soft: u64) {
        let pid = Pid::from_raw(self.pid().try_into().expect("a pid"));
        let maximum = getrlimit(resource).maximum;
        prlimit(pid, resource, Rlimit { current: Some(soft), maximum }).expect("it runs");
    }

    /// Waits until the program ends and returns its exit code. Unlike [`Program::wait`] it does not block
    /// the scenario's backends.
    pub async fn ends(&mut self) -> Option<i32> {
        let mut status = None;
        super::eventually("it ends", || {
            status = self.ended();
            let over = status.is_some();
            async move { over }
        })
        .await;
        status.and_then(|status| status.code())
    }

    /// Waits until the program accepts sessions or has ended. Returns the exit code if it has ended.
    pub async fn accepts_or_ends(&mut self) -> Option<i32> {
        let mut code = None;
        super::eventually("it accepts or ends", || {
            let ended = self.ended();
            code = ended.map(|status| status.code().unwrap_or(-1));
            let over = code.is_some() || !self.messages("listener accepting connections").is_empty();
            async move { over }
        })
        .await;
        code
    }
}
