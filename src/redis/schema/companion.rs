//! The companion keys of a weights key: version, history, known table, reports and admin states.
//!
//! The companion keys are in the hash slot of the weights key (`config/weights_key.rs`), so that one script
//! may use all of them in a Redis Cluster. If braces in the weights key make that impossible, the cluster
//! refuses the script, and `weights/refusal.rs` says why.

use crate::config::companion_stem;

/// The companions of one weights key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::redis) struct Companions {
    /// A number that each command raises by one.
    pub(in crate::redis) version: String,
    /// A stream of entries, the newest last.
    pub(in crate::redis) history: String,
    /// The table as of the newest entry: what differs from it was changed by other programs.
    pub(in crate::redis) known: String,
    /// A hash of the proxies' reports, which say what each has applied.
    pub(in crate::redis) applied: String,
    /// A hash of the backends that are in drain or maint.
    pub(in crate::redis) states: String,
}

impl Companions {
    /// Returns the companions of a weights key. For example, the version of `statera:{web}:weights` is
    /// `statera:{web}:version`, and that of `servers` is `{servers}:version`.
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

    /// Returns the key pattern of all companions, which an ACL user needs beside the weights key itself.
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
