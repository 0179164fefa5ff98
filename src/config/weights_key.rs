//! A weights key's hash tag, and what its companions are called: `{servers}:version` beside `servers`.
//!
//! They share its slot, so that one script may touch them all in a Redis Cluster, where the slot of a key is that of
//! its hash tag, the part in the first braces. A key with braces in other places (`a}b`) has no companions in its slot.

/// What the names of a key's companions begin with: `statera:{web}:weights` → `statera:{web}`, `servers` → `{servers}`.
#[must_use]
pub fn companion_stem(weights_key: &str) -> String {
    if hash_tag(weights_key).is_some() {
        weights_key.strip_suffix(":weights").unwrap_or(weights_key).to_owned()
    } else {
        format!("{{{weights_key}}}")
    }
}

/// Redis's own rule: what stands between the first `{` and the first `}` after it, unless that is nothing.
#[must_use]
pub fn hash_tag(key: &str) -> Option<&str> {
    let (_, rest) = key.split_once('{')?;
    rest.split_once('}').map(|(tag, _)| tag).filter(|tag| !tag.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_share_the_slot_of_their_key() {
        for (key, stem) in [
            ("servers", "{servers}"),
            ("statera:{web}:weights", "statera:{web}"),
            ("{web}", "{web}"),
            ("a:{web}:b", "a:{web}:b"),
            ("prod:weights", "{prod:weights}"),
            // No hash tag: nothing is in it, or it is never closed.
            ("a{}b", "{a{}b}"),
            ("a{b", "{a{b}"),
        ] {
            assert_eq!(companion_stem(key), stem, "{key}");
        }
    }
}
