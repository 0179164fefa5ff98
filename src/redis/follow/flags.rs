//! Which keyspace events a server sends, by its `notify-keyspace-events`.

/// The flags for all events of a weights key. K sends events to keyspace channels. The others are classes of
/// events: z (sorted sets), g (del, expire, rename, move, copy, restore), $ s l (a SET, SUNIONSTORE or
/// SORT … STORE that overwrites the key), x (expired) and e (evicted).
const NEEDED: &str = "Kgz$lsxe";
/// The classes of [`NEEDED`] that the flag `A` includes.
const ALL_CLASSES: &str = "gz$lsxe";

/// Returns the flags that `set` lacks.
pub(super) fn missing(set: &str) -> String {
    let has = |flag: char| set.contains(flag) || (set.contains('A') && ALL_CLASSES.contains(flag));
    NEEDED.chars().filter(|flag| !has(*flag)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_flags_are_enough() {
        for complete in ["KA", "AKE", "Kgz$lsxe", "KEg$lszxetd"] {
            assert_eq!(missing(complete), "", "{complete}");
        }
        assert_eq!(missing(""), "Kgz$lsxe");
        assert_eq!(missing("KEz"), "g$lsxe");
        assert_eq!(missing("AE"), "K");
        assert_eq!(missing("Ex"), "Kgz$lse");
    }
}
