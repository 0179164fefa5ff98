//! The signals that `statera run` hears: those that end it, and those that are only answered in the log.
//!
//! Without a handler most signals end a process, and with it all sessions. So every signal that is sent by habit has one: by
//! service managers and log rotation (HUP, USR1, USR2), by users of nginx and HAProxy (QUIT, TTIN, TTOU), by limits and timers of
//! the system. Left to the kernel are those that do no harm (WINCH, CONT), those that say that the process is broken (SEGV, ABRT
//! and the like), those that cannot be handled (KILL, STOP; 32 and 33, which belong to the C library; 64, which tokio does not
//! know) and Ctrl-Z's TSTP. PIPE is ignored from the start by Rust's runtime.
//!
//! Handlers replace what was inherited, also "ignored" (nohup ignores HUP; a shell's background job ignores INT and QUIT): a
//! service manager that sends INT must be obeyed, and the answer to HUP harms no background job.

use std::future::poll_fn;
use std::io::{self, IsTerminal as _};
use std::task::{Context, Poll};

use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tracing::warn;

use crate::control::log_limiter::LogLimiter;

/// Log lines of one signal in each window of [`LogLimiter`]. XFSZ needs the bound: the line that tells of it may cause the next one.
const MOST_LINES: u32 = 2;

/// Each begins the drain, and ends the process when it is the second. nginx's users expect QUIT to be the gentle one.
const STOPS: [Number; 3] = [Number::TERM, Number::INT, Number::QUIT];

const CHANGES_NOTHING: &str = "this signal has no effect: send TERM, INT or QUIT to drain and stop";
const NO_PAUSE: &str = "listeners cannot be paused or resumed: send TERM, INT or QUIT to drain and stop";
/// Name, signal and answer of those that end nothing.
const LOGGED: [(&str, Number, &str); 11] = [
    ("HUP", Number::HUP, "reload is not supported yet: restart to read the config again"),
    (
        "USR1",
        Number::USR1,
        "there is no log file to reopen: the log goes to standard output or standard error; where that is a file, rotate it by \
         `copytruncate`",
    ),
    ("USR2", Number::USR2, "handing over to a new binary is not supported yet: restart"),
    ("ALRM", Number::ALARM, CHANGES_NOTHING),
    ("VTALRM", Number::VTALARM, CHANGES_NOTHING),
    ("PROF", Number::PROF, CHANGES_NOTHING),
    ("IO", Number::IO, CHANGES_NOTHING),
    ("PWR", Number::POWER, CHANGES_NOTHING),
    ("STKFLT", Number::STKFLT, CHANGES_NOTHING),
    (
        "XCPU",
        Number::XCPU,
        "the limit of CPU time is used up: raise it (`ulimit -t`, LimitCPU), since the kernel ends the process at the hard one",
    ),
    (
        "XFSZ",
        Number::XFSZ,
        "a file has reached the limit of its size: raise it (`ulimit -f`, LimitFSIZE) or rotate the log; what is not written is \
         counted in statera_log_dropped_total and statera_state_writes_failed_total",
    ),
];
/// HAProxy's users pause and resume listeners by these. Where an output is a terminal they are the shell's, which stops a program
/// in the background that writes: one that handled TTOU would try to write for ever.
const LOGGED_WITHOUT_TERMINAL: [(&str, Number, &str); 2] =
    [("TTIN", Number::TTIN, NO_PAUSE), ("TTOU", Number::TTOU, NO_PAUSE)];
/// Real-time signals. The first of them that the C library leaves to programs is 34 or 35; 64 is beyond tokio.
const REAL_TIME: std::ops::Range<i32> = 34..64;

/// The signals that end nothing. While this lives, and after it, none of them ends the process.
pub(super) struct LoggedSignals(Vec<Answered>);

struct Answered {
    name: String,
    answer: &'static str,
    signal: Signal,
    pace: LogLimiter,
}

impl LoggedSignals {
    /// Installs their handlers. To be called in a runtime, before anything else: what comes before the first
    /// [`LoggedSignals::answer`] is answered then.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    pub(super) fn new() -> io::Result<Self> {
        let mut all = Vec::new();
        let has_terminal = io::stdout().is_terminal() || io::stderr().is_terminal();
        let more = LOGGED_WITHOUT_TERMINAL.into_iter().filter(|_| !has_terminal);
        for (name, number, answer) in LOGGED.into_iter().chain(more) {
            all.push(Answered::new(name.to_owned(), number.as_raw(), answer)?);
        }
        // Which of these the C library keeps for itself is its business: it refuses those.
        all.extend(REAL_TIME.filter_map(|number| {
            Answered::new(format!("real-time signal {number}"), number, CHANGES_NOTHING).ok()
        }));
        Ok(Self(all))
    }

    /// Answers each in the log. Never ends. Cancel safe.
    pub(super) async fn answer(&mut self) {
        poll_fn(|cx| {
            self.0.iter_mut().for_each(|one| one.poll(cx));
            Poll::<()>::Pending
        })
        .await;
    }
}

impl Answered {
    fn new(name: String, number: i32, answer: &'static str) -> io::Result<Self> {
        Ok(Self {
            name,
            answer,
            signal: signal(SignalKind::from_raw(number))?,
            pace: LogLimiter::new(MOST_LINES),
        })
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(())) = self.signal.poll_recv(cx) {
            if let Some(held_back) = self.pace.permit(Instant::now()) {
                warn!(signal = self.name, held_back, "{}", self.answer);
            }
        }
    }
}

/// The signals that end the process in an orderly way.
pub(super) struct StopSignals([Signal; STOPS.len()]);

impl StopSignals {
    /// Installs their handlers; until then they end the process at once. To be called in a runtime.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    pub(super) fn new() -> io::Result<Self> {
        let [first, second, third] = STOPS.map(|number| signal(SignalKind::from_raw(number.as_raw())));
        Ok(Self([first?, second?, third?]))
    }

    /// Waits for the next one. Cancel safe.
    pub(super) async fn next(&mut self) {
        poll_fn(|cx| {
            let come = self.0.iter_mut().any(|signal| signal.poll_recv(cx).is_ready());
            if come { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
