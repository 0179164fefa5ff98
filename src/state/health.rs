//! What was said of failing writes: each reason once when it begins, and once that everything works again.
//!
//! Many pools share one disk, and each tries again and again: none of that is news.

use std::collections::BTreeSet;
use std::sync::Arc;

/// Which files fail, and why.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Names of pools; `None` is the folder itself.
    failing: BTreeSet<Option<Arc<str>>>,
    /// Reasons name steps and errors of the system, so there are few.
    said: BTreeSet<String>,
}

impl Health {
    /// Returns true if that is to be said.
    pub(super) fn fails(&mut self, pool: Option<&Arc<str>>, reason: &str) -> bool {
        self.failing.insert(pool.cloned());
        self.said.insert(reason.to_owned())
    }

    /// A file was written, so the folder can be. Returns true if everything works again, which is to be said.
    pub(super) fn works(&mut self, pool: &Arc<str>) -> bool {
        let failed = !self.failing.is_empty();
        self.failing.remove(&Some(Arc::clone(pool)));
        self.failing.remove(&None);
        let mended = failed && self.failing.is_empty();
        if mended {
            self.said.clear();
        }
        mended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_said_once_and_the_end_of_all_of_them_too() {
        let mut health = Health::default();
        let (web, mail): (Arc<str>, Arc<str>) = ("web".into(), "mail".into());
        assert!(!health.works(&web), "nothing was wrong");
        assert!(health.fails(None, "read-only"));
        assert!(!health.fails(Some(&web), "read-only") && !health.fails(Some(&mail), "read-only"));
        assert!(health.fails(Some(&mail), "full"), "another reason is news");
        assert!(!health.works(&web), "another still fails");
        assert!(health.works(&mail) && !health.works(&mail));
        assert!(health.fails(Some(&web), "full"), "it begins again");
    }
}
