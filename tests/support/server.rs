//! Programs of other projects: servers that run beside a scenario, and clients that run to their end.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use super::{PATIENCE, eventually};

/// A program that runs until this is dropped. It is ended by its own pid: by TERM, and by KILL after two
/// seconds.
pub struct Server {
    child: Child,
    folder: TempDir,
}

impl Server {
    /// Starts the command that `prepare` returns for the folder of this server. Its output goes to a file in
    /// that folder.
    pub fn start(prepare: impl FnOnce(&Path) -> Command) -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut command = prepare(folder.path());
        let output = File::create(folder.path().join("output")).expect("a file");
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a descriptor"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child, folder }
    }

    /// Standard output and standard error so far.
    pub fn output(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("output")).expect("a file");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until it has written `text`. Panics with all that it has written where it ends before that.
    pub async fn says(&mut self, text: &str) {
        let Self { child, folder } = self;
        let output = folder.path().join("output");
        let mut written = String::new();
        eventually(&format!("a server says {text:?}"), || {
            written = String::from_utf8_lossy(&std::fs::read(&output).expect("a file")).into_owned();
            let ended = child.try_wait().expect("it is ours");
            assert!(written.contains(text) || ended.is_none(), "it has ended ({ended:?}): {written}");
            std::future::ready(written.contains(text))
        })
        .await;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }

    /// Waits until the program ends. Returns its exit code, or `None` if a signal ended it.
    pub async fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.output());
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn ends_within(&mut self, limit: Duration) -> bool {
        let pause = Duration::from_millis(10);
        for _ in 0..limit.as_millis() / pause.as_millis() {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(pause);
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // TERM first: by KILL nginx would leave its workers behind.
            self.signal(Signal::TERM);
            if !self.ends_within(Duration::from_secs(2)) {
                let _ = self.child.kill();
            }
        }
        let _ = self.child.wait();
    }
}

/// Runs a program to its end, which must come within [`PATIENCE`].
pub async fn output(command: Command) -> Output {
    let text = format!("{command:?}");
    let mut command = tokio::process::Command::from(command);
    let ended = timeout(PATIENCE, command.stdin(Stdio::null()).kill_on_drop(true).output()).await;
    ended.unwrap_or_else(|_| panic!("{text} does not end")).unwrap_or_else(|error| panic!("{text}: {error}"))
}
