//! A socket that this thread's reactor watches, and its readiness.
//!
//! epoll is used edge-triggered: it reports each change once. So readiness is remembered until a system
//! call shows that it is over: by EAGAIN, or by a read or write of fewer bytes than asked for. The caller
//! then clears it ([`Watched::clear`]), and the next event sets it again. While readiness is known, no
//! system call is needed to find it out. A caller that clears readiness too early, with bytes or room left,
//! is never woken for them.
//!
//! Each socket has an entry in a table, and epoll returns the entry's *token*: its index and its generation.
//! Entries are reused. Closing a socket removes it from epoll unless another process has the same descriptor,
//! and events may be pending already; the generation tells such late events from those of the entry's new
//! socket.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::ops::BitOr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::{is_mostly_free, shrink_table, with};

/// A set of the things that a socket is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready(u8);

impl Ready {
    /// A read would not block: there are bytes, or the end, or an error.
    pub const READ: Self = Self(1);
    /// A write would not block: there is room, or an error.
    pub const WRITE: Self = Self(2);
    /// An urgent byte (MSG_OOB) has arrived.
    pub const URGENT: Self = Self(4);
    /// The peer has ended its half, or the connection is broken. No event will follow for bytes that are
    /// still unread.
    pub const ENDED: Self = Self(8);
    /// The connection is broken, or could not be made.
    pub const BROKEN: Self = Self(16);

    /// True if the set has any of `other`.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Ready {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl From<EventFlags> for Ready {
    fn from(flags: EventFlags) -> Self {
        let broken = EventFlags::ERR | EventFlags::HUP;
        let ended = broken | EventFlags::RDHUP;
        [
            (EventFlags::IN | EventFlags::PRI | ended, Self::READ),
            (EventFlags::OUT | broken, Self::WRITE),
            // Also set if the same event reports the end: a short read may have stopped before the urgent
            // byte, with more bytes behind it.
            (EventFlags::PRI, Self::URGENT),
            (ended, Self::ENDED),
            (broken, Self::BROKEN),
        ]
        .into_iter()
        .filter(|(any, _)| flags.intersects(*any))
        .fold(Self::default(), |ready, (_, this)| ready | this)
    }
}

/// The watched sockets of one thread.
#[derive(Debug, Default)]
pub(super) struct Registrations {
    entries: Vec<Registration>,
    free: Vec<u32>,
    /// The generation of the next entry that is added. After the table was shrunk it is higher than those of
    /// all removed entries.
    first_generation: u32,
}

/// The entry of one socket. An idle session has two, so its size (24 bytes) matters.
#[derive(Debug, Default)]
struct Registration {
    /// The task that waits for `wanted`.
    waker: Option<Waker>,
    /// Counts the sockets that had this entry. Events with another generation are dropped.
    generation: u32,
    ready: Ready,
    wanted: Ready,
}

impl Registrations {
    /// Takes a free entry, or adds one.
    fn allocate(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.entries.push(Registration { generation: self.first_generation, ..Registration::default() });
            u32::try_from(self.entries.len() - 1).expect("descriptors are fewer")
        })
    }

    /// Frees an entry. Returns the waker for the caller to drop once no borrow of the table is left: the
    /// last waker of a task may drop the task, and with it other sockets.
    fn release(&mut self, index: u32) -> Option<Waker> {
        let generation = self.entry(index).generation.wrapping_add(1);
        self.free.push(index);
        mem::replace(self.entry(index), Registration { generation, ..Registration::default() }).waker
    }

    /// Gives memory back after a peak.
    pub(super) fn shrink(&mut self) {
        if is_mostly_free(self.entries.len(), self.free.len()) {
            let newest = self.entries.iter().map(|entry| entry.generation).max().unwrap_or_default();
            self.first_generation = newest.wrapping_add(1);
            shrink_table(&mut self.entries, &mut self.free);
        }
    }

    fn entry(&mut self, index: u32) -> &mut Registration {
        &mut self.entries[index as usize]
    }

    /// What epoll returns with each event of the entry's socket.
    fn token(&mut self, index: u32) -> u64 {
        u64::from(self.entry(index).generation) << 32 | u64::from(index)
    }

    /// Records that the socket of `token` is ready for `flags`, and wakes its task if the task waits for
    /// one of them.
    pub(super) fn on_event(&mut self, token: u64, flags: EventFlags) {
        // The entry may have been removed by `shrink`.
        let Some(entry) = self.entries.get_mut(token as u32 as usize) else { return };
        if u64::from(entry.generation) != token >> 32 {
            return;
        }
        let ready = Ready::from(flags);
        entry.ready = entry.ready | ready;
        if entry.wanted.has(ready) {
            entry.wanted = Ready::default();
            if let Some(waker) = &entry.waker {
                waker.wake_by_ref();
            }
        }
    }
}

/// A socket that this thread's reactor watches. It is closed when dropped. Only one task may wait for it at
/// a time.
#[derive(Debug)]
pub struct Watched<S> {
    socket: S,
    index: u32,
    /// Makes it `!Send`: the index is valid for this thread's table alone.
    of_this_thread: PhantomData<Rc<()>>,
}

impl<S: AsFd> Watched<S> {
    /// Starts to watch `socket`, which must be non-blocking, for `flags`.
    ///
    /// # Errors
    /// The kernel can watch no more sockets (ENOSPC, ENOMEM). Returns the socket, so that the caller decides
    /// how to close it.
    ///
    /// # Panics
    /// On a thread without a reactor.
    pub fn new(socket: S, flags: EventFlags) -> Result<Self, (S, io::Error)> {
        let added = with(|reactor| {
            let mut registrations = reactor.registrations.borrow_mut();
            let index = registrations.allocate();
            let token = EventData::new_u64(registrations.token(index));
            let added = epoll::add(&reactor.handles().epoll, &socket, token, flags | EventFlags::ET);
            added.map(|()| index).inspect_err(|_| drop(registrations.release(index)))
        });
        match added.expect("sockets are watched on the threads of workers") {
            Ok(index) => Ok(Self { socket, index, of_this_thread: PhantomData }),
            Err(error) => Err((socket, error.into())),
        }
    }
}

impl<S> Watched<S> {
    /// The socket itself, for its options and system calls.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// Ready if the socket is ready for any of `wanted`; returns all that it is ready for.
    pub fn poll_ready(&self, cx: &mut Context<'_>, wanted: Ready) -> Poll<Ready> {
        let waits = self.with_registration(|entry| {
            if entry.ready.has(wanted) {
                return Err(entry.ready);
            }
            entry.wanted = entry.wanted | wanted;
            let known = entry.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            // The old waker is returned, so that it is dropped after the borrow: see `release`.
            Ok(if known { None } else { entry.waker.replace(cx.waker().clone()) })
        });
        match waits {
            Some(Err(ready)) => Poll::Ready(ready),
            Some(Ok(_)) | None => Poll::Pending,
        }
    }

    /// All that the socket is known to be ready for.
    #[must_use]
    pub fn ready(&self) -> Ready {
        self.with_registration(|entry| entry.ready).unwrap_or_default()
    }

    /// Forgets the readiness `found`, after a system call has shown that it is over. The next event sets it
    /// again.
    pub fn clear(&self, found: Ready) {
        self.with_registration(|entry| entry.ready = Ready(entry.ready.0 & !found.0));
    }

    /// Assumes readiness for `these` without an event, so that the next system call is tried.
    pub fn assume(&self, these: Ready) {
        self.with_registration(|entry| entry.ready = entry.ready | these);
    }

    /// Calls `f` with the socket's entry. Returns `None` while the thread ends, when no task is woken any
    /// more.
    fn with_registration<T>(&self, f: impl FnOnce(&mut Registration) -> T) -> Option<T> {
        with(|reactor| f(reactor.registrations.borrow_mut().entry(self.index)))
    }
}

impl<S> Drop for Watched<S> {
    fn drop(&mut self) {
        // Closing the socket removes it from epoll, which saves a system call. If another process has
        // inherited the descriptor, epoll keeps it and reports events with the old generation.
        let waker = with(|reactor| reactor.registrations.borrow_mut().release(self.index));
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_after_a_peak_of_sockets_and_late_events_are_dropped() {
        const PEAK: u32 = 10_000;
        let mut registrations = Registrations::default();
        let tokens: Vec<u64> = (0..PEAK)
            .map(|_| {
                let index = registrations.allocate();
                registrations.token(index)
            })
            .collect();
        (0..PEAK).for_each(|index| drop(registrations.release(index)));
        registrations.shrink();
        assert!(registrations.entries.capacity() <= 2048 && registrations.free.capacity() <= 2048);
        // After the next peak, the same indices belong to other sockets.
        for _ in 0..PEAK {
            registrations.allocate();
        }
        for token in tokens {
            registrations.on_event(token, EventFlags::IN);
        }
        assert!(registrations.entries.iter().all(|entry| entry.ready == Ready::default()));
    }
}
