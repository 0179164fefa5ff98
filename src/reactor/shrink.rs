//! Gives back the memory of tables after a peak. Their entries are found by index, so they cannot be moved.
//!
//! Only free entries at a table's end can be removed. After that, the lowest free entry is used first, so
//! that the entries at the end become free in time.

use super::with;

/// Tables of up to this many entries keep their memory: a few dozen kilobytes.
const KEPT_ENTRIES: usize = 1024;
/// A table is shrunk when it has this many entries for each used one, and then keeps two for each. The gap
/// keeps a table that grows and shrinks a little from being reallocated each time.
const ENTRIES_PER_USED_ONE: usize = 4;

/// True if so many of a table's `entries` are `free` that [`shrink_table`] shrinks it.
#[must_use]
pub fn is_mostly_free(entries: usize, free: usize) -> bool {
    entries > KEPT_ENTRIES && entries / ENTRIES_PER_USED_ONE >= entries - free
}

/// Removes free entries from the end of `entries` if most entries are free, and sorts `free` so that the
/// lowest index is popped next. Takes up to a few milliseconds for 100,000 entries, so call it rarely.
pub fn shrink_table<T>(entries: &mut Vec<T>, free: &mut Vec<u32>) {
    if !is_mostly_free(entries.len(), free.len()) {
        return;
    }
    let kept = (2 * (entries.len() - free.len())).max(KEPT_ENTRIES);
    free.sort_unstable();
    while entries.len() > kept && free.last().is_some_and(|last| *last as usize == entries.len() - 1) {
        entries.pop();
        free.pop();
    }
    free.reverse();
    entries.shrink_to(kept);
    free.shrink_to(kept);
}

/// Gives back memory that this thread's tables of sockets and tasks do not need any more.
pub fn shrink() {
    with(|reactor| {
        reactor.registrations.borrow_mut().shrink();
        reactor.tasks.shrink();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shrinks_after_a_peak_down_to_its_last_used_entry() {
        let mut entries: Vec<u32> = (0..100_000).collect();
        let mut free: Vec<u32> = (0..100_000).filter(|index| *index != 40_000 && *index != 7).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut free);
        shrink_table(&mut entries, &mut free);
        assert_eq!((entries.len(), free.len()), (40_001, 39_999));
        assert!(entries.capacity() < 50_000 && free.capacity() < 50_000);
        assert_eq!(free.pop(), Some(0), "the lowest is used first");
        free.push(40_000);
        shrink_table(&mut entries, &mut free);
        assert_eq!((entries.len(), free.len()), (KEPT_ENTRIES, KEPT_ENTRIES - 2));
        assert!(entries.capacity() <= 2 * KEPT_ENTRIES && free.capacity() <= 2 * KEPT_ENTRIES);
    }

    #[test]
    fn a_table_that_is_small_or_in_use_stays_as_it_is() {
        for (length, free_entries) in [(KEPT_ENTRIES, KEPT_ENTRIES), (100_000, 70_000)] {
            let mut entries = vec![0; length];
            let mut free: Vec<u32> = (0..).take(free_entries).collect();
            let before = (entries.len(), entries.capacity(), free.clone());
            shrink_table(&mut entries, &mut free);
            assert_eq!((entries.len(), entries.capacity(), free), before);
        }
    }
}
