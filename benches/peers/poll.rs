//! Sockets and epoll, as thin as they go: what drives the load shares two cores with what is measured.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with, sockopt,
};

/// What one `recv` takes, and one `send` gives.
pub const CHUNK_BYTES: usize = 128 * 1024;
const EVENTS_MAX: usize = 1024;

pub const READ: EventFlags = EventFlags::IN;
pub const WRITE: EventFlags = EventFlags::OUT;

/// Level-triggered epoll whose events carry a number.
pub struct Poll {
    epoll: OwnedFd,
    events: Vec<Event>,
}

impl Poll {
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, events: Vec::with_capacity(EVENTS_MAX) })
    }

    pub fn add(&self, fd: &OwnedFd, token: u64, interest: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), interest)?)
    }

    pub fn change(&self, fd: &OwnedFd, token: u64, interest: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token), interest)?)
    }

    /// Waits at most `limit` (to the nanosecond); the events are then in [`Poll::event`].
    pub fn wait(&mut self, limit: Duration) -> io::Result<usize> {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        self.events.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => Ok(self.events.len()),
            Err(error) => Err(error.into()),
        }
    }

    /// The token and the flags of an event of the last wait.
    pub fn event(&self, index: usize) -> (u64, EventFlags) {
        let event = self.events[index];
        (event.data.u64(), event.flags)
    }
}

/// Starts to connect; whether it already is connected (on loopback it mostly is).
pub fn dial(to: SocketAddrV4) -> io::Result<(OwnedFd, bool)> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&fd, true)?;
    match connect(&fd, &to) {
        Ok(()) => Ok((fd, true)),
        Err(Errno::INPROGRESS) => Ok((fd, false)),
        Err(error) => Err(error.into()),
    }
}

/// Sends what the socket takes now; 0 if nothing.
pub fn give(fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    match send(fd, bytes, SendFlags::NOSIGNAL) {
        Ok(sent) => Ok(sent),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// What a read brought.
pub enum Taken {
    Bytes(usize),
    Nothing,
    End,
}

pub fn take(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Taken> {
    take_by(fd, buffer, RecvFlags::empty())
}

/// As [`take`], but the kernel throws the bytes away instead of copying them: cheaper than any real client.
pub fn discard(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Taken> {
    take_by(fd, buffer, RecvFlags::TRUNC)
}

fn take_by(fd: &OwnedFd, buffer: &mut [u8], flags: RecvFlags) -> io::Result<Taken> {
    match recv(fd, buffer, flags) {
        Ok((_, 0)) => Ok(Taken::End),
        Ok((_, bytes)) => Ok(Taken::Bytes(bytes)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Taken::Nothing),
        Err(error) => Err(error.into()),
    }
}
