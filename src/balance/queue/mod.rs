//! A pool's queue: the sessions that wait for a slot while all backends are full.
//!
//! The queue does not hand over slots. It wakes a waiter, which then picks like any other session: by the
//! pool's balance, from the newest snapshot. `backend/active.rs` reports a slot that became free;
//! `pool/cell.rs` reports a new snapshot, which may have freed any number of slots.
//!
//! The order is first in, first out: while sessions wait, a new session goes to the end of the queue
//! (`pool/pool.rs`). Without waiters, freeing a slot takes no lock and costs two atomic loads. `Waiters`
//! explains why no wake-up is lost. `session/queue.rs` has the session's side: the timeout, and a client
//! that leaves.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

#[cfg(test)]
mod tests;

/// The queue of one pool, shared by all workers.
#[derive(Debug, Default)]
pub struct Queue {
    size: u32,
    /// The number of waiters, written under the lock. `SeqCst` here and on the slot counts puts both in one
    /// order: either the session that frees a slot sees the waiter, or the waiter sees the free slot.
    waiting: AtomicU32,
    waiters: Mutex<Waiters>,
}

/// The waiters, the oldest first.
///
/// No slot stays free while a session waits that could take it. To ensure this, at least one of these holds
/// at each moment, for the slots that became free while sessions waited:
/// - As many waiters are woken as slots are free.
/// - `more` is set and a waiter is woken. If it finds a slot, the next one is woken after it.
/// - `more` is set and each waiter has found nothing, since it had tried the free backends already. The next
///   session that enters is woken.
/// - A woken waiter has not seen all `changes`. It picks again before it accepts that all backends are full.
#[derive(Debug, Default)]
struct Waiters {
    entries: VecDeque<Entry>,
    /// How many entries are woken.
    woken: usize,
    /// The number of the next session that enters.
    next_number: u64,
    /// Counts the events that may have freed slots.
    changes: u64,
    /// Slots may be free for which no waiter was woken.
    more: bool,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    /// This waiter may pick now.
    woken: bool,
    waker: Option<Waker>,
}

impl Waiters {
    /// The position of the entry with this number.
    fn position(&self, number: u64) -> usize {
        self.entries.binary_search_by_key(&number, |entry| entry.number).expect("only its ticket removes it")
    }

    /// Marks the first waiter at or behind `start` that is not woken yet as woken, and returns its waker.
    /// Without such a waiter, sets `more`, so that the next session that enters picks at once.
    fn wake_from(&mut self, start: usize) -> Option<Waker> {
        let Some(entry) = self.entries.range_mut(start..).find(|entry| !entry.woken) else {
            self.more = true;
            return None;
        };
        entry.woken = true;
        self.woken += 1;
        entry.waker.take()
    }

    /// Notes that slots may have become free, and returns the waker of the waiter to wake. While `more` is
    /// set, the number of free slots is unknown, so waiters are woken one after the other and the oldest
    /// picks first. Otherwise each call is for one slot and one waiter.
    fn changed(&mut self) -> Option<Waker> {
        self.changes += 1;
        if self.more && self.woken > 0 { None } else { self.wake_from(0) }
    }
}

impl Queue {
    /// A queue without waiters, for at most `size` of them.
    #[must_use]
    pub fn new(size: u32) -> Self {
        Self { size, ..Self::default() }
    }

    /// The number of waiters.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting.load(SeqCst)
    }

    /// Frees one slot by calling `give_back`, and wakes the oldest waiter that is not woken yet.
    #[inline]
    pub(in crate::balance) fn free(&self, give_back: impl FnOnce()) {
        if self.waiting() > 0 {
            self.free_for_waiters(give_back);
            return;
        }
        give_back();
        // A session may have entered since the check, before or after the slot was free.
        self.renewed();
    }

    /// Frees the slot and chooses the waiter to wake under one lock. Otherwise a waiter that is woken
    /// already could take the slot in between, and the wake-up would be for a slot that is taken.
    #[cold]
    fn free_for_waiters(&self, give_back: impl FnOnce()) {
        let mut waiters = self.lock();
        give_back();
        let waker = waiters.changed();
        wake(waiters, waker);
    }

    /// Wakes the waiters one after the other until one finds no slot, since any number of slots may have
    /// become free.
    pub(in crate::balance) fn renewed(&self) {
        if self.waiting() > 0 {
            self.change();
        }
    }

    #[cold]
    fn change(&self) {
        let mut waiters = self.lock();
        waiters.more = true;
        let waker = waiters.changed();
        wake(waiters, waker);
    }

    /// Enters the queue. `None`: the queue is full.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Option<Ticket> {
        let mut waiters = self.lock();
        let waiting = u32::try_from(waiters.entries.len()).unwrap_or(u32::MAX);
        if waiting >= self.size {
            return None;
        }
        // Slots that became free while the queue was empty woke no waiter.
        waiters.more |= waiting == 0;
        let number = waiters.next_number;
        waiters.next_number += 1;
        let woken = waiters.more && waiters.woken == 0;
        waiters.woken += usize::from(woken);
        waiters.entries.push_back(Entry { number, woken, waker: None });
        self.waiting.store(waiting + 1, SeqCst);
        drop(waiters);
        Some(Ticket { queue: Arc::clone(self), number, seen: 0, served: false })
    }

    fn leave(&self, number: u64, served: bool) {
        let mut waiters = self.lock();
        let position = waiters.position(number);
        let entry = waiters.entries.remove(position);
        let woken = entry.as_ref().is_some_and(|entry| entry.woken);
        waiters.woken -= usize::from(woken);
        self.waiting.store(u32::try_from(waiters.entries.len()).unwrap_or(u32::MAX), SeqCst);
        // A woken waiter passes its wake-up to the next one if it leaves without a slot, or if more slots
        // may be free.
        let next = woken && (waiters.more || !served);
        let waker = if next { waiters.wake_from(0) } else { None };
        wake(waiters, waker);
        // After the lock is released: dropping the last waker of a task drops the task, which may free a
        // slot and lock the queue.
        drop(entry);
    }

    fn lock(&self) -> MutexGuard<'_, Waiters> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes after the lock is released: a task that is woken on another thread would wait for the lock first.
fn wake(waiters: MutexGuard<'_, Waiters>, waker: Option<Waker>) {
    drop(waiters);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A session's ticket in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Ticket {
    queue: Arc<Queue>,
    number: u64,
    /// The queue's `changes` when this session was woken.
    seen: u64,
    served: bool,
}

impl Ticket {
    /// Ready once the queue has woken this session to pick. The caller then picks, and calls
    /// [`Ticket::found_none`] or [`Ticket::served`], or drops the ticket.
    pub fn poll_woken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut waiters = self.queue.lock();
        let position = waiters.position(self.number);
        if waiters.entries[position].woken {
            self.seen = waiters.changes;
            return Poll::Ready(());
        }
        let waker = &mut waiters.entries[position].waker;
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Reports that the session was woken and found no slot. With `has_tried`, its pick left out the
    /// backends that it had tried, so the waiters behind it may still find a slot.
    pub fn found_none(&mut self, has_tried: bool) {
        let mut waiters = self.queue.lock();
        if waiters.changes != self.seen {
            // A slot may have become free after the pick: the session stays woken and picks again.
            return;
        }
        let position = waiters.position(self.number);
        waiters.entries[position].woken = false;
        waiters.woken -= 1;
        let waker = if has_tried {
            waiters.wake_from(position + 1)
        } else {
            waiters.more = false;
            None
        };
        wake(waiters, waker);
    }

    /// Leaves the queue with a slot. The next waiter is woken only if more slots may be free.
    pub fn served(mut self) {
        self.served = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.leave(self.number, self.served);
    }
}
