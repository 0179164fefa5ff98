//! The members that get no sessions, with the reasons, as the proxies report them.
//!
//! `redis/fleet/unusable.rs` reads the reports. Any client of Redis may have written a report, so the texts
//! in it are escaped.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use super::escape::word;
use super::show::proxies;
use crate::redis::weights::{Report, ReportedReason};

/// How many different reasons for one member are shown in a line. JSON has all of them.
const MOST_SHOWN: usize = 4;

/// The reports of all proxies, by member.
pub(super) struct Unusable<'a> {
    /// The sets of reasons for each member, and how many proxies report each set.
    members: HashMap<&'a str, BTreeMap<&'a [ReportedReason], usize>>,
    /// How many proxies report which members get no sessions.
    reporting: usize,
    /// How many proxies do not report this, since they are of an older version.
    not_reporting: usize,
    /// How many proxies ignore health.
    fails_open: usize,
    /// How many proxies report only some of the members that get no sessions.
    cut_short: usize,
}

impl<'a> Unusable<'a> {
    pub(super) fn of(reports: &'a [Report]) -> Self {
        let reported = || reports.iter().filter_map(|report| report.unusable.as_ref());
        let mut members: HashMap<&str, BTreeMap<&[ReportedReason], usize>> = HashMap::new();
        for (member, reasons) in reported().flat_map(|report| &report.backends) {
            *members.entry(member).or_default().entry(reasons).or_default() += 1;
        }
        Self {
            members,
            reporting: reported().count(),
            not_reporting: reports.len() - reported().count(),
            fails_open: reported().filter(|report| report.fails_open).count(),
            cut_short: reported().filter(|report| report.more > 0).count(),
        }
    }

    /// The lines above the table.
    pub(super) fn head(&self) -> String {
        let Self { reporting, not_reporting, fails_open, cut_short, .. } = *self;
        let mut text = String::new();
        let of_all = |count: usize| format!("{count} of {}", proxies(reporting));
        if fails_open > 0 {
            text += &format!("health is ignored by {} (fail-open)\n", of_all(fails_open));
        }
        if cut_short > 0 {
            text += &format!(
                "more members get no sessions than are listed here: the reports of {} name only some\n",
                of_all(cut_short)
            );
        }
        if not_reporting > 0 {
            text += &format!(
                "{} of an older version: these do not report which members get no sessions\n",
                proxies(not_reporting)
            );
        }
        text
    }

    /// Returns the text behind a member's weight and state. The text does not repeat these two, and is empty
    /// if no proxy reports another reason.
    pub(super) fn text(&self, member: &str, is_zero: bool, state: Option<&str>) -> String {
        let is_shown = |reason: &ReportedReason| match reason.name.as_str() {
            "weight_0" => is_zero,
            name => state == Some(name),
        };
        let mut texts: BTreeMap<String, usize> = BTreeMap::new();
        for (reasons, count) in self.members.get(member).into_iter().flatten() {
            let own: Vec<String> = reasons.iter().filter(|r| !is_shown(r)).map(reason_text).collect();
            if !own.is_empty() {
                *texts.entry(own.join(", ")).or_default() += count;
            }
        }
        let mut texts: Vec<(String, usize)> = texts.into_iter().collect();
        texts.sort_by(|(a, of_a), (b, of_b)| of_b.cmp(of_a).then_with(|| a.cmp(b)));
        let count: usize = texts.iter().map(|(_, count)| count).sum();
        let why = match &*texts {
            [] => return String::new(),
            [(text, _)] => text.clone(),
            several => {
                let shown = several.iter().take(MOST_SHOWN);
                let shown: Vec<_> = shown.map(|(text, count)| format!("{text} on {count}")).collect();
                let more = if several.len() > MOST_SHOWN { "; …" } else { "" };
                shown.join("; ") + more
            }
        };
        format!("  no sessions from {count} of {}: {why}", proxies(self.reporting))
    }

    /// The reasons for one member in JSON; `None` where every proxy sends it sessions.
    pub(super) fn json(&self, member: &str) -> Option<Value> {
        let answers = self.members.get(member)?;
        let reason = |reason: &ReportedReason| json!({"reason": reason.name, "error": reason.cause});
        let answer = |(reasons, count): (&&[ReportedReason], &usize)| {
            let reasons: Vec<Value> = reasons.iter().map(reason).collect();
            json!({"proxies": count, "reasons": reasons})
        };
        let proxies: usize = answers.values().sum();
        let answers: Vec<Value> = answers.iter().map(answer).collect();
        Some(json!({"proxies": proxies, "of": self.reporting, "answers": answers}))
    }

    /// The numbers of proxies in JSON.
    pub(super) fn head_json(&self) -> Value {
        json!({
            "proxies": self.reporting,
            "not_known_of": self.not_reporting,
            "cut_short": self.cut_short,
            "fail_open": self.fails_open,
        })
    }
}

fn reason_text(ReportedReason { name, cause }: &ReportedReason) -> String {
    let name = match name.as_str() {
        "weight_0" => "weight 0",
        "trial" => "ejected, next session is its trial",
        "unresolved" => "name not resolved",
        name => &*word(name),
    };
    match cause {
        Some(cause) => format!("{name} ({})", word(cause)),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::redis::weights::{ContentHash, UnusableReport};

    /// Reasons by their name and cause.
    type Reasons<'a> = &'a [(&'a str, Option<&'a str>)];

    fn report(unusable: Option<&[(&str, Reasons<'_>)]>) -> Report {
        let reason = |(name, cause): &(&str, Option<&str>)| ReportedReason {
            name: (*name).to_owned(),
            cause: cause.map(str::to_owned),
        };
        let unusable = unusable.map(|backends| UnusableReport {
            backends: backends
                .iter()
                .map(|(id, reasons)| ((*id).to_owned(), reasons.iter().map(reason).collect()))
                .collect(),
            ..UnusableReport::default()
        });
        let (proxy, hash, age) = ("a/1/0000".to_owned(), ContentHash::default(), Duration::ZERO);
        Report { proxy, hash, leaving: Vec::new(), unnamed: 0, unusable, age }
    }

    #[test]
    fn each_member_is_shown_with_the_proxies_that_send_it_nothing_and_why() {
        let refused = Some("connection refused");
        let reports = [
            report(Some(&[("a:1", &[("unhealthy", refused)]), ("b:1", &[("drain", None)])])),
            report(Some(&[
                ("a:1", &[("unhealthy", refused)]),
                ("b:1", &[("drain", None), ("ejected", refused)]),
            ])),
            report(Some(&[("a:1", &[("trial", Some("timed out"))]), ("c:1", &[("weight_0", None)])])),
            report(None),
        ];
        let all = Unusable::of(&reports);
        assert_eq!(
            all.text("a:1", false, None),
            "  no sessions from 3 of 3 proxies: unhealthy (connection refused) on 2; ejected, next session is \
             its trial (timed out) on 1"
        );
        let drained = all.text("b:1", false, Some("drain"));
        assert_eq!(drained, "  no sessions from 1 of 3 proxies: ejected (connection refused)");
        assert_eq!(all.text("c:1", true, None), "");
        assert_eq!(all.text("c:1", false, None), "  no sessions from 1 of 3 proxies: weight 0");
        assert_eq!((all.text("d:1", false, None).as_str(), all.json("d:1")), ("", None));
        assert_eq!(all.json("a:1").expect("some")["proxies"], 3);
        let head = "1 proxy of an older version: these do not report which members get no sessions\n";
        assert_eq!(all.head(), head);
    }

    #[test]
    fn no_text_of_a_report_reaches_a_terminal_unescaped() {
        let reports = [report(Some(&[("a:1", &[("\x1b[2J", Some("\u{9b}31m\n"))])]))];
        let text = Unusable::of(&reports).text("a:1", false, None);
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
}
