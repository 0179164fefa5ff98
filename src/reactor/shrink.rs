//! Gives back the memory of tables whose places are numbered, after a peak.
//!
//! A place that is taken keeps its number, so only free places at a table's end can go. From then on the lowest free one is taken
//! first, so that the end becomes free as those who are there leave.

use super::with;

/// Tables of so many places stay as they are: they have a few dozen kilobytes at most.
const KEPT_PLACES: usize = 1024;
/// A table shrinks once it has so many places for each one that is taken, and then keeps half of them: one that grows and shrinks a
/// little does neither.
const PLACES_A_TAKEN_ONE: usize = 4;

/// True where [`shrink_table`] would have something to do.
#[must_use]
pub fn is_mostly_free(places: usize, free: usize) -> bool {
    places > KEPT_PLACES && places / PLACES_A_TAKEN_ONE >= places - free
}

/// Removes what is free at the end of `places`, and lets the lowest of the other `free` ones be the next that is popped, if most are
/// free. Costs up to a few milliseconds for 100,000 places, so it is for once in a while.
pub fn shrink_table<T>(places: &mut Vec<T>, free: &mut Vec<u32>) {
    if !is_mostly_free(places.len(), free.len()) {
        return;
    }
    let kept = (2 * (places.len() - free.len())).max(KEPT_PLACES);
    free.sort_unstable();
    while places.len() > kept && free.last().is_some_and(|last| *last as usize == places.len() - 1) {
        places.pop();
        free.pop();
    }
    free.reverse();
    places.shrink_to(kept);
    free.shrink_to(kept);
}

/// Gives back what this thread's tables of sockets and tasks do not need any more.
pub fn shrink() {
    with(|reactor| {
        reactor.places.borrow_mut().shrink();
        reactor.tasks.shrink();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shrinks_after_a_peak_as_far_as_its_last_place_that_is_taken() {
        let mut places: Vec<u32> = (0..100_000).collect();
        let mut free: Vec<u32> = (0..100_000).filter(|place| *place != 40_000 && *place != 7).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut free);
        shrink_table(&mut places, &mut free);
        assert_eq!((places.len(), free.len()), (40_001, 39_999));
        assert!(places.capacity() < 50_000 && free.capacity() < 50_000);
        assert_eq!(free.pop(), Some(0), "the lowest is taken first");
        free.push(40_000);
        shrink_table(&mut places, &mut free);
        assert_eq!((places.len(), free.len()), (KEPT_PLACES, KEPT_PLACES - 2));
        assert!(places.capacity() <= 2 * KEPT_PLACES && free.capacity() <= 2 * KEPT_PLACES);
    }

    #[test]
    fn a_table_that_is_small_or_in_use_stays_as_it_is() {
        for (length, free_places) in [(KEPT_PLACES, KEPT_PLACES), (100_000, 70_000)] {
            let mut places = vec![0; length];
            let mut free: Vec<u32> = (0..).take(free_places).collect();
            let before = (places.len(), places.capacity(), free.clone());
            shrink_table(&mut places, &mut free);
            assert_eq!((places.len(), places.capacity(), free), before);
        }
    }
}
