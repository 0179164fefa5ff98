//! Which keyspace events a server sends, read from its `notify-keyspace-events`.

/// What a table's life can show: K (keyspace channels) and the classes z (sorted sets), g (del, expire,
/// rename, move, copy, restore), $ s l (a SET, SUNIONSTORE or SORT … STORE over the key), x and e (expired,
/// evicted).
const NEEDED: &str = "Kgz$lsxe";
/// What `A` stands for, as far as it is needed.
const ALL_CLASSES: &str = "gz$lsxe";

/// The flags that `set` lacks; empty if none.
pub(in crate::redis) fn missing(set: &str) -> String {
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
