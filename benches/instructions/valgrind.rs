//! Runs a program under callgrind and reads how many instructions it took.
//!
//! What callgrind wrote of the last run of each case stays in `target/instructions`: `callgrind_annotate`
//! shows where the instructions went.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

/// Fifty times slower than without valgrind, on a machine that others share.
const RUN_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(20);
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// glibc chooses its memcpy by the processor; without these, they all choose the same.
const SAME_EVERYWHERE: &str =
    "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM";
/// So many looks in a row must find it asleep; each takes some 30 µs.
const LOOKS: u32 = 3;

/// Valgrind, as it is on this machine.
pub struct Valgrind {
    /// The versions that the figures depend on.
    pub versions: String,
    folder: PathBuf,
}

impl Valgrind {
    /// # Errors
    /// It is not here; says how to install it.
    pub fn find() -> Result<Self> {
        let valgrind = said_by("valgrind")
            .context("valgrind is missing: apt-get install valgrind (tests/install.sh instructions)")?;
        let compiler = said_by(&std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()))
            .unwrap_or_else(|_| "an unknown rustc".into());
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/instructions");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { versions: format!("{valgrind}, {compiler}"), folder })
    }

    /// Starts `program`; what it prints goes beside the counts.
    pub fn start(&self, name: &str, program: &Path, arguments: &[&str]) -> Result<Counted> {
        let counts = self.folder.join(format!("{}.callgrind", name.replace(' ', "-")));
        let log = counts.with_extension("log");
        // Counts of an earlier run must not be taken for this one's.
        if counts.exists() {
            fs::remove_file(&counts)?;
        }
        let output = File::create(&log)?;
        let child = Command::new("setpriv")
            .env("GLIBC_TUNABLES", SAME_EVERYWHERE)
            // Should this process be killed, the program ends too.
            .args(["--pdeathsig", "KILL", "valgrind", "--tool=callgrind"])
            .arg(format!("--callgrind-out-file={}", counts.display()))
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot run setpriv (apt-get install util-linux)")?;
        Ok(Counted { child, counts, log })
    }
}

/// The first line that a program says about its version.
fn said_by(program: &str) -> Result<String> {
    let said = Command::new(program).arg("--version").stdin(Stdio::null()).output()?;
    ensure!(said.status.success(), "{program} --version: {}", said.status);
    Ok(String::from_utf8_lossy(&said.stdout).lines().next().unwrap_or_default().trim().to_owned())
}

/// What a whole run took.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    pub instructions: u64,
    /// Calls of the functions that allocate memory.
    pub allocations: u64,
}

/// Calls of `malloc` and its like in a file of callgrind's. There, `cfn=(7) malloc` names the function that
/// is called, the second time as `cfn=(7)`; the line after it says how often.
fn allocations(text: &str) -> u64 {
    const ALLOCATING: [&str; 5] = ["malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign"];
    let mut numbers = Vec::new();
    let mut calls = 0;
    let mut called = "";
    for line in text.lines() {
        if let Some(function) = line.strip_prefix("fn=").or_else(|| line.strip_prefix("cfn=")) {
            let (number, name) = function.split_once(' ').unwrap_or((function, ""));
            if ALLOCATING.contains(&name) {
                numbers.push(number);
            }
            called = if line.starts_with('c') { number } else { "" };
        } else if let Some(count) = line.strip_prefix("calls=")
            && numbers.contains(&called)
        {
            calls += count.split(' ').next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    calls
}

/// A program whose instructions are being counted. Killed when dropped.
pub struct Counted {
    child: Child,
    counts: PathBuf,
    log: PathBuf,
}

impl Counted {
    /// Waits until the program ends by itself, and returns what it took.
    pub fn wait(mut self) -> Result<Counts> {
        self.wait_for(RUN_LIMIT)?;
        self.counts()
    }

    /// The same, after a TERM.
    pub fn terminate(mut self) -> Result<Counts> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("a child has a pid")?;
        kill_process(pid, Signal::TERM)?;
        self.wait_for(STOP_LIMIT)?;
        self.counts()
    }

    /// Waits until all threads of the program sleep: it has done everything that there was to do.
    ///
    /// Under valgrind one thread runs at a time, and between two of them all may seem asleep for a moment. So
    /// it takes several looks.
    pub fn settle(&mut self) -> Result<()> {
        let (begun, mut asleep) = (Instant::now(), 0);
        while asleep < LOOKS {
            asleep = if self.is_asleep()? { asleep + 1 } else { 0 };
            if begun.elapsed() > SETTLE_LIMIT {
                self.check()?;
                bail!("it is still busy after {SETTLE_LIMIT:?}:\n{}", self.log());
            }
        }
        Ok(())
    }

    fn is_asleep(&self) -> Result<bool> {
        for thread in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            // Its state comes after its name, which stands in brackets.
            let stat = fs::read_to_string(thread?.path().join("stat")).unwrap_or_default();
            if !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S')) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// # Errors
    /// The program has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("it ended too early ({status}):\n{}", self.log()),
            None => Ok(()),
        }
    }

    fn wait_for(&mut self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(begun.elapsed() < limit, "it did not end within {limit:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        };
        ensure!(status.success(), "it failed ({status}):\n{}", self.log());
        Ok(())
    }

    fn counts(&self) -> Result<Counts> {
        let text = fs::read_to_string(&self.counts)
            .with_context(|| format!("callgrind wrote no counts:\n{}", self.log()))?;
        let total = text.lines().rev().find_map(|line| line.strip_prefix("totals: "));
        let total = total.with_context(|| format!("{} has no totals", self.counts.display()))?;
        let instructions = total.trim().parse();
        let instructions =
            instructions.with_context(|| format!("{}: totals: {total}", self.counts.display()))?;
        Ok(Counts { instructions, allocations: allocations(&text) })
    }

    /// The last lines that it printed.
    fn log(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // Does nothing to a child that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
