//! `workers`, `state_dir`, `log` and `shutdown`: how the process itself runs and ends.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::Level;

use super::non_zero_usize;
use crate::config::decode::{Keys, Kind, Section};
use crate::config::{Log, LogFormat, LogOutput, Shutdown};

pub(super) const LOG: Keys = Keys {
    now: &["level", "format", "access", "output"],
    later: &[],
    example: "{level: info, format: json}",
    meant: &[],
};
pub(super) const SHUTDOWN: Keys = Keys {
    now: &["delay", "timeout"],
    later: &[],
    example: "{timeout: 30s}",
    meant: &[(Kind::Duration, "timeout")],
};

/// A larger number of threads is a typing mistake.
const WORKERS_MAX: u64 = 1024;

/// Reads `workers`. `auto` is one thread for each CPU that this process may use, by cgroup limits too.
pub(super) fn workers(root: &Section<'_>) -> NonZeroUsize {
    let auto = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let Some(field) = root.field("workers") else { return auto() };
    if field.is_text("auto") {
        return auto();
    }
    if field.reads_as_integer() {
        return field.integer(&(1..=WORKERS_MAX)).map_or(NonZeroUsize::MIN, non_zero_usize);
    }
    field.refuse(format_args!("write auto, or a whole number from 1 to {WORKERS_MAX}"));
    NonZeroUsize::MIN
}

/// Reads `state_dir`. An empty text, as `${STATE_DIR:-}` may give, means that there is none. `state/`
/// finds out whether the folder can be used.
pub(super) fn state_dir(root: &Section<'_>) -> Option<PathBuf> {
    let field = root.field("state_dir")?;
    let text = field.text().filter(|text| !text.is_empty())?;
    if !Path::new(text).is_absolute() || text.chars().any(char::is_control) {
        field.refuse("the absolute path of a folder is needed, like /var/lib/statera");
    }
    Some(text.into())
}

pub(super) fn log(section: &Section<'_>) -> Log {
    let levels = [
        ("error", Level::ERROR),
        ("warn", Level::WARN),
        ("info", Level::INFO),
        ("debug", Level::DEBUG),
        ("trace", Level::TRACE),
    ];
    let formats = [("json", LogFormat::Json), ("text", LogFormat::Text)];
    Log {
        level: section.choice("level", &levels, &[], Level::INFO),
        format: section.choice("format", &formats, &["haproxy_tcp"], LogFormat::Json),
        access: section.flag("access", true),
        output: output(section),
    }
}

fn output(section: &Section<'_>) -> LogOutput {
    match section.field("output") {
        Some(field) if field.text_contains("/") => {
            field.refuse("a file is not supported yet: write stdout or stderr");
            LogOutput::Stdout
        }
        Some(field) => {
            let outputs = [("stdout", LogOutput::Stdout), ("stderr", LogOutput::Stderr)];
            field.choice(&outputs, &[]).unwrap_or(LogOutput::Stdout)
        }
        None => LogOutput::Stdout,
    }
}

pub(super) fn shutdown(section: &Section<'_>) -> Shutdown {
    Shutdown {
        delay: section.duration("delay", Duration::ZERO),
        timeout: section.duration("timeout", Duration::from_secs(30)),
    }
}
