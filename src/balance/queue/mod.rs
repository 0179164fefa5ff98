//! The line of a pool whose backends are all full: who waits for a place, and whose turn it is.
//!
//! Slots are not handed over, only turns: whose turn it is picks like everybody else, by the pool's balance, from the newest
//! snapshot. That a place became free is said by whoever gives it back (`places.rs`), that there may be any number of them by
//! a new snapshot (`cell.rs`).
//!
//! Nobody overtakes: while somebody is in the line, those who come get in behind (`pool.rs`). The lock is touched only then:
//! where nobody waits, giving back a place costs one look at an atomic. What must hold for no turn to be lost is said at
//! `Waiters`; who waits, and what he watches meanwhile, is `session/queue.rs`'s.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

#[cfg(test)]
mod tests;

/// One pool's line, shared by all workers.
#[derive(Debug, Default)]
pub struct Queue {
    size: u32,
    /// How many are in the line. Written under the lock. In one order with the backends' counts (`SeqCst` there and here):
    /// either who gives back a place sees who waits, or who waits sees the place.
    waiting: AtomicU32,
    line: Mutex<Waiters>,
}

/// Those who wait, the first one first.
///
/// At each moment, as far as places at backends are concerned that became free while somebody waited, one of these holds, so that
/// none stays free while somebody waits who could take it:
/// - as many are called as places are free;
/// - `more` is set, and somebody is called: he is followed by the next one, if he finds a place;
/// - `more` is set, and all who are in the line have found nothing (they had tried those backends): who comes next is called;
/// - somebody is called who has not seen all `changes`: he looks again before he believes that all is full.
#[derive(Debug, Default)]
struct Waiters {
    entries: VecDeque<Entry>,
    /// How many of them are called.
    called: usize,
    /// Of the one who comes next.
    number: u64,
    /// Counts whatever may have made places free.
    changes: u64,
    /// There may be places for which nobody was called.
    more: bool,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    /// It is his turn.
    called: bool,
    waker: Option<Waker>,
}

impl Waiters {
    /// Where the one with this number stands. He is there until he leaves.
    fn at(&self, number: u64) -> usize {
        self.entries.binary_search_by_key(&number, |entry| entry.number).expect("it leaves by itself alone")
    }

    /// Calls the first one from `start` on who is not called yet; where there is none, the next one who can be is to be.
    fn call_from(&mut self, start: usize) -> Option<Waker> {
        let Some(entry) = self.entries.range_mut(start..).find(|entry| !entry.called) else {
            self.more = true;
            return None;
        };
        entry.called = true;
        self.called += 1;
        entry.waker.take()
    }

    /// A place became free, or many. Where nobody knows how many are, one is called after the other, so that the first in line
    /// picks first; else as many as there are places, at once.
    fn changed(&mut self) -> Option<Waker> {
        self.changes += 1;
        if self.more && self.called > 0 { None } else { self.call_from(0) }
    }
}

impl Queue {
    /// A queue without waiters, for at most `size` of them.
    #[must_use]
    pub fn new(size: u32) -> Self {
        Self { size, ..Self::default() }
    }

    /// How many wait now.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting.load(SeqCst)
    }

    /// A place becomes free by `give_back`: the first who waits has his turn.
    #[inline]
    pub(in crate::balance) fn free(&self, give_back: impl FnOnce()) {
        if self.waiting() > 0 {
            self.free_in_line(give_back);
            return;
        }
        give_back();
        // Somebody may have got in line meanwhile, and found the place or not.
        self.renewed();
    }

    /// In one step for those in the line: were the place there before its turn, who has a turn for other reasons would take it, and
    /// two would be called for the next one.
    #[cold]
    fn free_in_line(&self, give_back: impl FnOnce()) {
        let mut line = self.lock();
        give_back();
        let waker = line.changed();
        wake(line, waker);
    }

    /// Any number of places may have become free: those who wait have their turns one after the other, as long as there are
    /// some.
    pub(in crate::balance) fn renewed(&self) {
        if self.waiting() > 0 {
            self.change();
        }
    }

    #[cold]
    fn change(&self) {
        let mut line = self.lock();
        line.more = true;
        let waker = line.changed();
        wake(line, waker);
    }

    /// Gets in line. `None`: it is as long as it may be.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Option<Ticket> {
        let mut line = self.lock();
        let waiting = u32::try_from(line.entries.len()).unwrap_or(u32::MAX);
        if waiting >= self.size {
            return None;
        }
        // What became free before the line began was told to nobody.
        line.more |= waiting == 0;
        let number = line.number;
        line.number += 1;
        let called = line.more && line.called == 0;
        line.called += usize::from(called);
        line.entries.push_back(Entry { number, called, waker: None });
        self.waiting.store(waiting + 1, SeqCst);
        drop(line);
        Some(Ticket { queue: Arc::clone(self), number, seen: 0, served: false })
    }

    fn leave(&self, number: u64, served: bool) {
        let mut line = self.lock();
        let place = line.at(number);
        let entry = line.entries.remove(place);
        let called = entry.as_ref().is_some_and(|entry| entry.called);
        line.called -= usize::from(called);
        self.waiting.store(u32::try_from(line.entries.len()).unwrap_or(u32::MAX), SeqCst);
        // Who was served has used up his turn; who leaves without gives it on.
        let next = called && (line.more || !served);
        let waker = if next { line.call_from(0) } else { None };
        wake(line, waker);
        // Its waker too: the last of a task's drops the task, and with it whatever gives back a place.
        drop(entry);
    }

    fn lock(&self) -> MutexGuard<'_, Waiters> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// After the lock is given back: who is woken on another thread would wait for it first.
fn wake(line: MutexGuard<'_, Waiters>, waker: Option<Waker>) {
    drop(line);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A session's place in the line; it leaves when dropped.
#[derive(Debug)]
pub struct Ticket {
    queue: Arc<Queue>,
    number: u64,
    /// The line's changes when the turn began.
    seen: u64,
    served: bool,
}

impl Ticket {
    /// Ready once it is this session's turn to pick. Then either [`Ticket::found_none`] or the drop follows.
    pub fn poll_woken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut line = self.queue.lock();
        let place = line.at(self.number);
        if line.entries[place].called {
            self.seen = line.changes;
            return Poll::Ready(());
        }
        let waker = &mut line.entries[place].waker;
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// All was full. `has_tried`: at least for this session, which leaves out what it has tried; those behind may find a place.
    pub fn found_none(&mut self, has_tried: bool) {
        let mut line = self.queue.lock();
        if line.changes != self.seen {
            // Something became free behind the back of the pick: it is still this session's turn.
            return;
        }
        let place = line.at(self.number);
        line.entries[place].called = false;
        line.called -= 1;
        let waker = if has_tried {
            line.call_from(place + 1)
        } else {
            line.more = false;
            None
        };
        wake(line, waker);
    }

    /// It has a place at a backend.
    pub fn served(mut self) {
        self.served = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.leave(self.number, self.served);
    }
}
