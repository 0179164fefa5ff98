//! The hash tag of a weights key, and the names of its companion keys: `{servers}:version` beside
//! `servers`.
//!
//! In a Redis Cluster the slot of a key is that of its hash tag, the part in the first braces. Companions
//! share the slot of their key, so one script may touch them all. A key with single braces (`a}b`) has no
//! companions in its slot.

/// Returns the text that the companions' names begin with: `statera:{web}` for `statera:{web}:weights`,
/// `{servers}` for `servers`.
#[must_use]
pub fn companion_stem(weights_key: &str) -> String {
    if hash_tag(weights_key).is_some() {
        weights_key.strip_suffix(":weights").unwrap_or(weights_key).to_owned()
    } else {
        format!("{{{weights_key}}}")
    }
}

/// Returns the hash tag by Redis's rule: the text between the first `{` and the first `}` after it. `None` if
/// there is no such text or it is empty.
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
            // No hash tag: the braces are empty, or never closed.
            ("a{}b", "{a{}b}"),
            ("a{b", "{a{b}"),
        ] {
            assert_eq!(companion_stem(key), stem, "{key}");
        }
    }
}
