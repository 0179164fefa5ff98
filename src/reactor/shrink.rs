//! Gives back the memory of tables whose entries are numbered, after a peak.
//!
//! A place that is taken keeps its number, so only free entries at a table's end can go. From then on the lowest free one is taken
//! first, so that the end becomes free as those who are there leave.

use super::with;

/// Tables of so many entries stay as they are: they have a few dozen kilobytes at most.
const KEPT_ENTRIES: usize = 1024;
/// A table shrinks once it has so many entries for each one that is taken, and then keeps half of them: one that grows and shrinks a
/// little does neither.
const ENTRIES_PER_USED_ONE: usize = 4;

/// True where [`shrink_table`] would have something to do.
#[must_use]
pub fn is_mostly_free(entries: usize, free: usize) -> bool {
    entries > KEPT_ENTRIES && entries / ENTRIES_PER_USED_ONE >= entries - free
}

/// Removes what is free at the end of `entries`, and lets the lowest of the other `free` ones be the next that is popped, if most are
/// free. Costs up to a few milliseconds for 100,000 entries, so it is for once in a while.
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

/// Gives back what this thread's tables of sockets and tasks do not need any more.
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
    fn a_table_shrinks_after_a_peak_as_far_as_its_last_place_that_is_taken() {
        let mut entries: Vec<u32> = (0..100_000).collect();
        let mut free: Vec<u32> = (0..100_000).filter(|index| *index != 40_000 && *index != 7).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut free);
        shrink_table(&mut entries, &mut free);
        assert_eq!((entries.len(), free.len()), (40_001, 39_999));
        assert!(entries.capacity() < 50_000 && free.capacity() < 50_000);
        assert_eq!(free.pop(), Some(0), "the lowest is taken first");
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
