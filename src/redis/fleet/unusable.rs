//! The backends that get no sessions from a proxy, as a part of its report in `{servers}:applied`.
//!
//! Each entry stands after [`MARK`]. The first is empty, or [`FAILS_OPEN`]. Then come
//! `backend=reason,reason`, each reason with its cause after a colon, and `+N` where N more backends are
//! not named. A reader that does not know the mark skips all of these; a report without any comes from an
//! older proxy.

use std::fmt::Write as _;

use crate::balance::pool::Cell;
use crate::balance::snapshot::{Reason, Unusable};

/// Stands before each entry of this part, after the separator of the report's entries.
const MARK: char = '!';
/// The first entry where the pool fails open.
const FAILS_OPEN: &str = "fail_open";
/// The most backends that are named: with names of usual length a report grows by 6 kB at most.
const MOST_NAMED: usize = 100;

/// The backends that get no sessions from one proxy, by its report. Any client of Redis may have written
/// the content.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnusableReport {
    /// Too little of the pool is healthy, so this proxy ignores health.
    pub fails_open: bool,
    /// The backends, each with its reasons.
    pub backends: Vec<(String, Vec<ReportedReason>)>,
    /// The number of unusable backends that are not in `backends`.
    pub more: usize,
}

/// One reason: `unhealthy`, `ejected`, `trial`, `unresolved`, `drain`, `maint` or `weight_0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReportedReason {
    /// The reason's name.
    pub name: String,
    /// The cause of the last failure of a check or a session.
    pub cause: Option<String>,
}

/// Returns the part of a report about the unusable backends of `cell`. A backend with a space or `separator`
/// in its name is left out.
pub(in crate::redis) fn report(cell: &Cell, separator: char) -> String {
    let Unusable { backends, more, fails_open } = cell.unusable(MOST_NAMED);
    let mut text = format!("{separator}{MARK}{}", if fails_open { FAILS_OPEN } else { "" });
    for (backend, reasons) in &backends {
        if backend.as_str().contains(|c: char| c.is_whitespace() || c == separator) {
            continue;
        }
        let reasons: Vec<String> = reasons.iter().map(word).collect();
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{MARK}{backend}={}", reasons.join(","));
    }
    if more > 0 {
        let _ = write!(text, "{separator}{MARK}+{more}");
    }
    text
}

fn word(reason: Reason) -> String {
    match reason.cause() {
        Some(cause) => format!("{}:{}", reason.name(), cause.to_string().replace(' ', "_")),
        None => reason.name().to_owned(),
    }
}

/// Adds one entry of a report to `known`. Returns false if the entry is of another part of the report.
pub(in crate::redis) fn take(known: &mut Option<UnusableReport>, entry: &str) -> bool {
    let Some(entry) = entry.strip_prefix(MARK) else { return false };
    let known = known.get_or_insert_default();
    if entry == FAILS_OPEN {
        known.fails_open = true;
    } else if let Some(more) = entry.strip_prefix('+').and_then(|more| more.parse().ok()) {
        known.more = more;
    } else if let Some((backend, reasons)) = entry.rsplit_once('=') {
        known.backends.push((backend.to_owned(), reasons.split(',').map(reason).collect()));
    }
    true
}

fn reason(word: &str) -> ReportedReason {
    let (name, cause) = word.split_once(':').map_or((word, None), |(name, cause)| (name, Some(cause)));
    ReportedReason { name: name.to_owned(), cause: cause.map(|cause| cause.replace('_', " ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::backend::Cause;
    use crate::balance::backend::Health;
    use crate::balance::{Balance, Table};

    fn cell(members: &[(String, f64)]) -> Cell {
        let members: Vec<_> = members.iter().map(|(text, weight)| (text.as_str(), *weight)).collect();
        Cell::new(Table::of(&members), Balance::WeightedRandom, 1)
    }

    fn read(text: &str) -> Option<UnusableReport> {
        let mut known = None;
        for entry in text.split(';').skip(1) {
            assert!(take(&mut known, entry), "{entry}");
        }
        known
    }

    #[test]
    fn what_is_reported_is_read_again() {
        let cell = cell(&[
            ("unix:/a=b".to_owned(), 1.0),
            ("unix:/c;e".to_owned(), 0.0),
            ("b:1".to_owned(), 0.0),
            ("10.0.0.1:80".to_owned(), 1.0),
        ]);
        let backend = cell.registry().get_or_create(&"unix:/a=b".parse().expect("an address"));
        backend.condition.set_health(Health::Unhealthy);
        backend.condition.check_error.set(Cause::NO_ANSWER);
        cell.refresh();
        let text = report(&cell, ';');
        assert_eq!(text, ";!;!b:1=weight_0,unresolved;!unix:/a=b=unhealthy:no_answer_in_time");
        let reason = |name: &str, cause: Option<&str>| ReportedReason {
            name: name.to_owned(),
            cause: cause.map(str::to_owned),
        };
        let known = read(&text).expect("it tells");
        let of_b = vec![reason("weight_0", None), reason("unresolved", None)];
        let of_a = vec![reason("unhealthy", Some("no answer in time"))];
        assert_eq!(known.backends, [("b:1".to_owned(), of_b), ("unix:/a=b".to_owned(), of_a)]);
        assert_eq!((known.more, known.fails_open), (0, false));
    }

    #[test]
    fn a_report_is_bounded_and_counts_the_others() {
        let members: Vec<_> = (0..5_000).map(|n| (format!("10.0.{}.{}:80", n / 200, n % 200), 0.0)).collect();
        let text = report(&cell(&members), ';');
        assert!(text.len() < 6_000 && text.ends_with(";!+4900"), "{} bytes", text.len());
        let known = read(&text).expect("it tells");
        assert_eq!((known.backends.len(), known.more), (MOST_NAMED, 4_900));
    }

    #[test]
    fn a_report_of_an_older_proxy_tells_nothing() {
        let mut known = None;
        assert!(!take(&mut known, "10.0.0.1:80=5") && !take(&mut known, "+7"));
        assert_eq!(known, None);
    }
}
