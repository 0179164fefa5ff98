//! The keys that stand beside a weights key: its version, its history, who has applied it, and which of its
//! backends are not to be used.
//!
//! They share its slot (`config/weights_key.rs`), so that one script may touch them all in a Redis Cluster.
//! Where braces make that impossible, a Cluster refuses them, and `weights.rs` says so.

use crate::config::companion_stem;

/// The companions of one weights key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::redis) struct Companions {
    /// A number that each command raises by one.
    pub(in crate::redis) version: String,
    /// A stream, newest last.
    pub(in crate::redis) history: String,
    /// The table as the history knows it: what differs from it was changed by other hands.
    pub(in crate::redis) known: String,
    /// A hash: which proxy has applied what.
    pub(in crate::redis) applied: String,
    /// A hash: which backend is in drain or maint.
    pub(in crate::redis) states: String,
}

impl Companions {
    /// `statera:{web}:weights` → `statera:{web}:version`; `servers` → `{servers}:version`.
    pub(in crate::redis) fn of(weights_key: &str) -> Self {
        let stem = companion_stem(weights_key);
        let companion = |name: &str| format!("{stem}:{name}");
        Self {
            version: companion("version"),
            history: companion("history"),
            known: companion("known"),
            applied: companion("applied"),
            states: companion("states"),
        }
    }

    /// What an ACL user needs beside the weights key itself, as a key pattern.
    pub(in crate::redis) fn pattern(&self) -> String {
        format!("~{}*", self.version.trim_end_matches("version"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_stand_beside_their_key() {
        assert_eq!(Companions::of("statera:{web}:weights").version, "statera:{web}:version");
        assert_eq!(Companions::of("servers").pattern(), "~{servers}:*");
    }
}
