//! The signals that `statera run` handles: those that end it, and those that are only answered in the
//! log.
//!
//! Without a handler most signals end a process, and with it all sessions. So every signal that is sent
//! by habit has a handler: by service managers and log rotation (HUP, USR1, USR2), by users of nginx and
//! HAProxy (QUIT, TTIN, TTOU), by limits and timers of the system. The kernel's default stays for signals
//! that do no harm (WINCH, CONT), for those that report a broken process (SEGV, ABRT and the like), for
//! those that cannot be handled (KILL and STOP; 32 and 33, which the C library uses; 64, which tokio does
//! not know), and for TSTP, which Ctrl-Z sends. Rust's runtime ignores PIPE.
//!
//! A handler replaces an inherited setting, also "ignored" (nohup ignores HUP; a shell's background job
//! ignores INT and QUIT): an INT from a service manager must end the process, and the answer to HUP harms
//! no background job.

use std::future::poll_fn;
use std::io::{self, IsTerminal as _};
use std::task::{Context, Poll};

use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tracing::warn;

use crate::control::log_limiter::LogLimiter;

/// How many log lines one signal gets in each window of [`LogLimiter`]. XFSZ needs this limit, since the
/// line that reports it may cause the next XFSZ.
const MOST_LINES: u32 = 2;

/// The first signal of these starts the drain; a second one ends the process at once. QUIT is among these
/// because nginx ends gracefully on QUIT.
const STOPS: [Number; 3] = [Number::TERM, Number::INT, Number::QUIT];

const CHANGES_NOTHING: &str = "this signal has no effect: send TERM, INT or QUIT to drain and stop";
const NO_PAUSE: &str = "listeners cannot be paused or resumed: send TERM, INT or QUIT to drain and stop";
/// The name, number and answer of the signals that do not end the process.
const LOGGED: [(&str, Number, &str); 11] = [
    ("HUP", Number::HUP, "reload is not supported yet: restart to read the config again"),
    (
        "USR1",
        Number::USR1,
        "there is no log file to reopen: the log is written to standard output or standard error; \
         rotate it by `copytruncate` where that is a file",
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
        "the limit of CPU time is reached: raise it (`ulimit -t`, LimitCPU), since the kernel ends the \
         process at the hard limit",
    ),
    (
        "XFSZ",
        Number::XFSZ,
        "a file has reached the size limit: raise it (`ulimit -f`, LimitFSIZE) or rotate the log; lost lines \
         and tables are counted in statera_log_dropped_total and statera_state_writes_failed_total",
    ),
];
/// HAProxy pauses and resumes listeners on these. Where an output is a terminal, they have their default:
/// they stop a program in the background that writes, and a program that handled TTOU would try to write
/// for ever.
const LOGGED_WITHOUT_TERMINAL: [(&str, Number, &str); 2] =
    [("TTIN", Number::TTIN, NO_PAUSE), ("TTOU", Number::TTOU, NO_PAUSE)];
/// Real-time signals. The first one that the C library does not use is 34 or 35; tokio does not know 64.
const REAL_TIME: std::ops::Range<i32> = 34..64;

/// The signals that are only answered in the log. Dropping this leaves their handlers installed.
pub(super) struct LoggedSignals(Vec<Answered>);

struct Answered {
    name: String,
    answer: &'static str,
    signal: Signal,
    pace: LogLimiter,
}

impl LoggedSignals {
    /// Installs the handlers. Must be called in a runtime, before anything else. A signal that comes before
    /// the first call of [`LoggedSignals::answer`] is answered in that call.
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
        // The C library refuses those that it uses itself.
        all.extend(REAL_TIME.filter_map(|number| {
            Answered::new(format!("real-time signal {number}"), number, CHANGES_NOTHING).ok()
        }));
        Ok(Self(all))
    }

    /// Answers each signal in the log. Never returns. Cancel safe.
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

/// The signals that drain the proxy and end the process.
pub(super) struct StopSignals([Signal; STOPS.len()]);

impl StopSignals {
    /// Installs the handlers. Before this call the signals end the process at once. Must be called in a
    /// runtime.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    pub(super) fn new() -> io::Result<Self> {
        let [first, second, third] = STOPS.map(|number| signal(SignalKind::from_raw(number.as_raw())));
        Ok(Self([first?, second?, third?]))
    }

    /// Waits for the next signal. Cancel safe.
    pub(super) async fn next(&mut self) {
        poll_fn(|cx| {
            let has_come = self.0.iter_mut().any(|signal| signal.poll_recv(cx).is_ready());
            if has_come { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
