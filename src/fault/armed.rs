//! The fault points that the environment variable arms, and what happens at them.

use std::io;
use std::str::FromStr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// The environment variable that arms fault points.
const VARIABLE: &str = "STATERA_FAULTS";

/// What happens at a fault point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// `panic`: the thread panics.
    Panic,
    /// `error`: the work fails with EAGAIN, as where the system gives no thread.
    Error,
    /// `block:5s`: the thread sleeps for so long.
    Block(Duration),
    /// `hang`: the task waits for ever.
    Hang,
}

/// One entry of the list.
#[derive(Debug)]
struct Armed {
    name: String,
    fault: Fault,
    /// The only detail that the entry matches. Empty: all details match.
    detail: String,
    /// How often the fault still happens.
    left: AtomicU32,
}

static ARMED: LazyLock<Vec<Armed>> = LazyLock::new(|| {
    let list = std::env::var(VARIABLE).unwrap_or_default();
    let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    entries.map(|entry| entry.parse().unwrap_or_else(|()| panic!("{VARIABLE}: {entry}"))).collect()
});

pub(super) fn reached(name: &str, detail: &str) {
    match take(&ARMED, name, detail) {
        Some(Fault::Panic) => panic!("the fault point {name} is armed: this defect is made by a test"),
        Some(Fault::Block(time)) => thread::sleep(time),
        Some(Fault::Error | Fault::Hang) | None => {}
    }
}

pub(super) fn reached_fallible(name: &str, detail: &str) -> io::Result<()> {
    match take(&ARMED, name, detail) {
        Some(Fault::Panic) => panic!("the fault point {name} is armed: this defect is made by a test"),
        Some(Fault::Block(time)) => thread::sleep(time),
        Some(Fault::Error) => return Err(io::ErrorKind::WouldBlock.into()),
        Some(Fault::Hang) | None => {}
    }
    Ok(())
}

pub(super) async fn reached_async(name: &str, detail: &str) {
    if take(&ARMED, name, detail) == Some(Fault::Hang) {
        std::future::pending::<()>().await;
    }
}

/// Returns the fault that is to happen now, and counts it. `None` if no entry matches or the fault has
/// happened often enough.
fn take(all: &[Armed], name: &str, detail: &str) -> Option<Fault> {
    let is_met = |armed: &&Armed| armed.name == name && (armed.detail.is_empty() || armed.detail == detail);
    let armed = all.iter().find(is_met)?;
    armed.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).ok()?;
    Some(armed.fault)
}

impl FromStr for Armed {
    type Err = ();

    fn from_str(entry: &str) -> Result<Self, ()> {
        let (name, rest) = entry.split_once('=').ok_or(())?;
        let (rest, times) = rest.rsplit_once('*').map_or((rest, None), |(rest, times)| (rest, Some(times)));
        let times = times.map_or(Ok(u32::MAX), str::parse).map_err(|_| ())?;
        let (fault, detail) = rest.split_once('@').unwrap_or((rest, ""));
        let fault = match fault.split_once(':') {
            None if fault == "panic" => Fault::Panic,
            None if fault == "error" => Fault::Error,
            None if fault == "hang" => Fault::Hang,
            Some(("block", time)) => Fault::Block(humantime::parse_duration(time).map_err(|_| ())?),
            _ => return Err(()),
        };
        let left = AtomicU32::new(times);
        Ok(Self { name: name.to_owned(), fault, detail: detail.to_owned(), left })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_happens_at_its_point_to_its_detail_and_as_often_as_it_is_to() {
        let entries = ["decode=panic@10.0.0.1:80*2", "thread=error", "admin=block:5s"];
        let armed = entries.map(|entry| entry.parse::<Armed>().expect("an entry"));
        let take = |name, detail| take(&armed, name, detail);
        assert_eq!((take("decode", "10.0.0.1:81"), take("other", "10.0.0.1:80")), (None, None));
        let twice = [Some(Fault::Panic), Some(Fault::Panic), None];
        assert_eq!([0; 3].map(|_| take("decode", "10.0.0.1:80")), twice);
        assert_eq!([0; 3].map(|_| take("thread", "any")), [Some(Fault::Error); 3]);
        assert_eq!(take("admin", ""), Some(Fault::Block(Duration::from_secs(5))));
        for wrong in ["decode", "decode=explode", "decode=panic*often", "decode=block", "decode=block:soon"] {
            assert!(wrong.parse::<Armed>().is_err(), "{wrong}");
        }
    }
}
