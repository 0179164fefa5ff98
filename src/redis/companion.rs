//! The keys that stand beside a weights key: its version, its history, who has applied it.
//!
//! They share its slot, so that one script may touch them all in a Redis Cluster, where the slot of a key is that of
//! its hash tag, the part in the first braces. A key with braces in other places (`a}b`) has no companions in its slot:
//! a Cluster refuses them, and `weights.rs` says so.

/// The companions of one weights key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Companions {
    /// A number that each command raises by one.
    pub(super) version: String,
    /// A stream, newest last.
    pub(super) history: String,
    /// The table as the history knows it: what differs from it was changed by other hands.
    pub(super) known: String,
    /// A hash: which proxy has applied what.
    pub(super) applied: String,
}

impl Companions {
    /// `statera:{web}:weights` → `statera:{web}:version`; `servers` → `{servers}:version`.
    pub(super) fn of(weights_key: &str) -> Self {
        let stem = if has_hash_tag(weights_key) {
            weights_key.strip_suffix(":weights").unwrap_or(weights_key).to_owned()
        } else {
            format!("{{{weights_key}}}")
        };
        let companion = |name: &str| format!("{stem}:{name}");
        Self {
            version: companion("version"),
            history: companion("history"),
            known: companion("known"),
            applied: companion("applied"),
        }
    }

    /// What an ACL user needs beside the weights key itself, as a key pattern.
    pub(super) fn pattern(&self) -> String {
        format!("~{}*", self.version.trim_end_matches("version"))
    }
}

/// Redis's own rule: what stands between the first `{` and the first `}` after it, unless that is nothing.
fn has_hash_tag(key: &str) -> bool {
    key.split_once('{').and_then(|(_, rest)| rest.find('}')).is_some_and(|length| length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_share_the_slot_of_their_key() {
        for (key, version) in [
            ("servers", "{servers}:version"),
            ("statera:{web}:weights", "statera:{web}:version"),
            ("{web}", "{web}:version"),
            ("a:{web}:b", "a:{web}:b:version"),
            ("prod:weights", "{prod:weights}:version"),
            // No hash tag: nothing is in it, or it is never closed.
            ("a{}b", "{a{}b}:version"),
            ("a{b", "{a{b}:version"),
        ] {
            assert_eq!(Companions::of(key).version, version, "{key}");
        }
        assert_eq!(Companions::of("servers").pattern(), "~{servers}:*");
    }
}
