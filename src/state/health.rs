//! What was said of failing writes: each reason once when it begins, and once that everything works again.
//!
//! Many pools share one disk, and each tries again and again: none of that is news.

use std::collections::BTreeSet;

/// Which files fail, and why.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Places of pools; `None` is the folder itself.
    failing: BTreeSet<Option<usize>>,
    /// Reasons name steps and errors of the system, so there are few.
    said: BTreeSet<String>,
}

impl Health {
    /// Returns true if that is to be said.
    pub(super) fn fails(&mut self, place: Option<usize>, reason: &str) -> bool {
        self.failing.insert(place);
        self.said.insert(reason.to_owned())
    }

    /// A file was written, so the folder can be. Returns true if everything works again, which is to be said.
    pub(super) fn works(&mut self, place: usize) -> bool {
        let failed = !self.failing.is_empty();
        self.failing.remove(&Some(place));
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
        assert!(!health.works(0), "nothing was wrong");
        assert!(health.fails(None, "read-only"));
        assert!(!health.fails(Some(0), "read-only") && !health.fails(Some(1), "read-only"));
        assert!(health.fails(Some(1), "full"), "another reason is news");
        assert!(!health.works(0), "another still fails");
        assert!(health.works(1) && !health.works(1));
        assert!(health.fails(Some(0), "full"), "it begins again");
    }
}
