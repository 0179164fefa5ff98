//! A socket that this thread's reactor watches, and what it is known to be ready for.
//!
//! Events are edge-triggered: what a socket is ready for stays known until whoever uses it finds the opposite and says so
//! ([`Watched::clear`]), and only then is there a new event. So nobody asks the kernel for what is known, and nobody who says
//! it too early is ever woken again.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::ops::BitOr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::{is_mostly_free, shrink_table, with};

/// What a socket is ready for, as a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready(u8);

impl Ready {
    /// A read would not block: bytes, the end or an error.
    pub const READ: Self = Self(1);
    /// A write would not block: room or an error.
    pub const WRITE: Self = Self(2);
    /// An urgent byte (MSG_OOB) has come.
    pub const URGENT: Self = Self(4);
    /// No event will follow for what is still there to be read: the peer has ended, or the connection is broken.
    pub const ENDED: Self = Self(8);
    /// The connection is broken, or none came about.
    pub const BROKEN: Self = Self(16);

    /// True if any of `other` is among it.
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
            // A read that finds nothing must not be taken for one before an urgent byte, whose event came with the end's.
            (EventFlags::PRI, Self::URGENT),
            (ended, Self::ENDED),
            (broken, Self::BROKEN),
        ]
        .into_iter()
        .filter(|(any, _)| flags.intersects(*any))
        .fold(Self::default(), |ready, (_, this)| ready | this)
    }
}

/// The sockets of a thread.
#[derive(Debug, Default)]
pub(super) struct Registrations {
    entries: Vec<Registration>,
    free: Vec<u32>,
    /// Of a place that is made anew. A place that was there before, and was given up, had an older one.
    first_generation: u32,
}

/// One socket's. There are two for each idle session, so its size counts.
#[derive(Debug, Default)]
struct Registration {
    /// Who waits.
    waker: Option<Waker>,
    /// Which of the sockets that had this place one after the other: an event for an earlier one is nobody's.
    generation: u32,
    ready: Ready,
    wanted: Ready,
}

impl Registrations {
    fn allocate(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.entries.push(Registration { generation: self.first_generation, ..Registration::default() });
            u32::try_from(self.entries.len() - 1).expect("descriptors are fewer")
        })
    }

    /// Who waited is given to the caller: the last of a task's wakers may drop the task, and with it other sockets.
    fn release(&mut self, index: u32) -> Option<Waker> {
        let generation = self.entry(index).generation.wrapping_add(1);
        self.free.push(index);
        mem::replace(self.entry(index), Registration { generation, ..Registration::default() }).waker
    }

    /// Gives back what it does not need any more.
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

    fn token(&mut self, index: u32) -> u64 {
        u64::from(self.entry(index).generation) << 32 | u64::from(index)
    }

    pub(super) fn on_event(&mut self, token: u64, flags: EventFlags) {
        // A place that was given up after a peak has no events either.
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

/// A socket of this thread, closed when dropped. One task waits for it at a time.
#[derive(Debug)]
pub struct Watched<S> {
    socket: S,
    index: u32,
    /// A place is its thread's: elsewhere the same number is another socket's.
    of_this_thread: PhantomData<Rc<()>>,
}

impl<S: AsFd> Watched<S> {
    /// Begins to watch `socket`, which must not block, for `flags`.
    ///
    /// # Errors
    /// The kernel can watch no more sockets. The socket is given back: it is for the caller to close it as it should be.
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
    /// For its options.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// Ready once the socket is ready for any of `wanted`; with all that it is ready for.
    pub fn poll_ready(&self, cx: &mut Context<'_>, wanted: Ready) -> Poll<Ready> {
        let waits = self.with_registration(|entry| {
            if entry.ready.has(wanted) {
                return Err(entry.ready);
            }
            entry.wanted = entry.wanted | wanted;
            let known = entry.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            // The one before is dropped by the caller, as in `release`.
            Ok(if known { None } else { entry.waker.replace(cx.waker().clone()) })
        });
        match waits {
            Some(Err(ready)) => Poll::Ready(ready),
            Some(Ok(_)) | None => Poll::Pending,
        }
    }

    /// All that it is known to be ready for.
    #[must_use]
    pub fn ready(&self) -> Ready {
        self.with_registration(|entry| entry.ready).unwrap_or_default()
    }

    /// It was found not to be ready for any of `found`: wait for the next event.
    pub fn clear(&self, found: Ready) {
        self.with_registration(|entry| entry.ready = Ready(entry.ready.0 & !found.0));
    }

    /// It may be ready for `these`, though no event said so: the next use finds out.
    pub fn assume(&self, these: Ready) {
        self.with_registration(|entry| entry.ready = entry.ready | these);
    }

    /// `None` while the thread ends, when nobody will be woken any more.
    fn with_registration<T>(&self, f: impl FnOnce(&mut Registration) -> T) -> Option<T> {
        with(|reactor| f(reactor.registrations.borrow_mut().entry(self.index)))
    }
}

impl<S> Drop for Watched<S> {
    fn drop(&mut self) {
        // The close that follows takes it out of epoll. Where it does not, because another process was forked with the same
        // descriptor, events still come, for a generation that is over.
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
        // After the next peak, places of the same numbers are other sockets'.
        for _ in 0..PEAK {
            registrations.allocate();
        }
        for token in tokens {
            registrations.on_event(token, EventFlags::IN);
        }
        assert!(registrations.entries.iter().all(|entry| entry.ready == Ready::default()));
    }
}
