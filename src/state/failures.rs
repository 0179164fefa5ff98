//! Which saved tables cannot be written, and which reasons the log has already.
//!
//! Many pools share one disk, and each retries again and again. So the log gets one line for each new
//! reason, and one when all files can be written again.

use std::collections::BTreeSet;
use std::sync::Arc;

/// The failing writes of one folder.
#[derive(Debug, Default)]
pub(super) struct WriteFailures {
    /// The pools whose last write failed; `None` stands for the folder itself.
    failing: BTreeSet<Option<Arc<str>>>,
    /// The reasons logged since all writes last worked. They name steps and system errors, so they are few.
    logged: BTreeSet<String>,
}

impl WriteFailures {
    /// Records a failed write. Returns true if its reason is to be logged.
    pub(super) fn record_failure(&mut self, pool: Option<&Arc<str>>, reason: &str) -> bool {
        self.failing.insert(pool.cloned());
        self.logged.insert(reason.to_owned())
    }

    /// Records a write that worked, which proves that the folder works too. Returns true if it ended the
    /// last failure, which is to be logged.
    pub(super) fn record_success(&mut self, pool: &Arc<str>) -> bool {
        let had_failures = !self.failing.is_empty();
        self.failing.remove(&Some(Arc::clone(pool)));
        self.failing.remove(&None);
        let all_work = had_failures && self.failing.is_empty();
        if all_work {
            self.logged.clear();
        }
        all_work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_logged_once_and_so_is_the_end_of_all_failures() {
        let mut failures = WriteFailures::default();
        let (web, mail): (Arc<str>, Arc<str>) = ("web".into(), "mail".into());
        assert!(!failures.record_success(&web), "there was no failure");
        assert!(failures.record_failure(None, "read-only"));
        assert!(!failures.record_failure(Some(&web), "read-only"));
        assert!(!failures.record_failure(Some(&mail), "read-only"));
        assert!(failures.record_failure(Some(&mail), "full"), "another reason");
        assert!(!failures.record_success(&web), "mail still fails");
        assert!(failures.record_success(&mail) && !failures.record_success(&mail));
        assert!(failures.record_failure(Some(&web), "full"), "a new failure");
    }
}
