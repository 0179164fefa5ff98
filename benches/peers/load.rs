//! The clients: each load is one thread with one epoll, until its meter is over.
//!
//! All sockets are TCP_NODELAY. A load fails on the first connection that is lost: a peer that loses sessions
//! has no result. Next: `measure.rs` says which loads there are, `backend.rs` is the other end.

use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::epoll::EventFlags;
use rustix::net::sockopt;
use tokio::time::Instant;

use super::backend::{BOTH, Backend, ECHO, SINK, SOURCE};
use super::meter::Meter;
use super::poll::{CHUNK_BYTES, Poll, READ, Taken, WRITE, dial, discard, give};

pub const SMALL_BYTES: usize = 64;
const STEP: Duration = Duration::from_millis(20);
/// For whatever is not measured: connecting, draining.
const PATIENCE: Duration = Duration::from_secs(20);
/// For 10 GB, half of it in each direction; nginx took more than 20 s where other programs had half of the
/// machine.
const ECHO_LIMIT: Duration = Duration::from_secs(120);
/// How many sessions may be opening at once while many are opened: below every peer's backlog.
const OPENING_MAX: usize = 128;

/// Connect, 64 bytes there and back, close; `at_once` of these at all times.
pub fn sessions(to: SocketAddrV4, at_once: usize, meter: &mut Meter) -> Result<()> {
    let mut poll = Poll::new()?;
    let mut scratch = vec![0; SMALL_BYTES];
    let message = [ECHO; SMALL_BYTES];
    let limit = meter.limit();
    let (mut opened, mut done) = (0, 0);
    // The descriptor, whether the message was sent, and how much of the answer came.
    let mut slots: Vec<Option<(OwnedFd, bool, usize)>> = Vec::new();
    slots.resize_with(at_once, || None);
    let open = |poll: &Poll, slot: usize| -> Result<(OwnedFd, bool, usize)> {
        let (fd, connected) = dial(to).context("cannot connect")?;
        if connected {
            ensure!(give(&fd, &message)? == SMALL_BYTES, "a new socket does not take 64 bytes");
        }
        poll.add(&fd, slot as u64, if connected { READ } else { WRITE })?;
        Ok((fd, connected, 0))
    };
    for (index, slot) in slots.iter_mut().enumerate() {
        if opened < limit {
            *slot = Some(open(&poll, index)?);
            opened += 1;
        }
    }
    while !meter.over(done) {
        for event in 0..poll.wait(STEP)? {
            let (token, _) = poll.event(event);
            let slot = token as usize;
            let Some((fd, sent, received)) = slots[slot].as_mut() else { continue };
            if !*sent {
                *sent = give(fd, &message).context("a session was not connected")? == SMALL_BYTES;
                ensure!(*sent, "a new socket does not take 64 bytes");
                poll.change(fd, token, READ)?;
                continue;
            }
            match discard(fd, &mut scratch).context("a session was reset")? {
                Taken::Bytes(bytes) => *received += bytes,
                Taken::Nothing => {}
                Taken::End => bail!("a session ended after {received} bytes of {SMALL_BYTES}"),
            }
            if *received == SMALL_BYTES {
                done += 1;
                slots[slot] = None;
                if opened < limit {
                    slots[slot] = Some(open(&poll, slot)?);
                    opened += 1;
                }
            }
        }
    }
    Ok(())
}

/// Established connections, whose tokens are their indices.
pub struct Connections {
    poll: Poll,
    fds: Vec<OwnedFd>,
}

impl Connections {
    /// Opens `count`, and waits until each has arrived at the backend.
    pub fn open(to: SocketAddrV4, count: usize, backend: &Backend) -> Result<Self> {
        let (mut poll, begun, before) = (Poll::new()?, Instant::now(), backend.accepted());
        let mut fds = Vec::with_capacity(count);
        let mut connected = 0;
        while (backend.accepted() - before) < count as u64 {
            let arrived = (backend.accepted() - before) as usize;
            ensure!(begun.elapsed() < PATIENCE, "only {arrived} of {count} sessions got through");
            while fds.len() < count && fds.len() - arrived.min(connected) < OPENING_MAX {
                let (fd, already) = dial(to).context("cannot connect")?;
                let interest = if already { EventFlags::empty() } else { WRITE };
                poll.add(&fd, fds.len() as u64, interest)?;
                connected += usize::from(already);
                fds.push(fd);
            }
            for event in 0..poll.wait(Duration::from_millis(1))? {
                let (token, flags) = poll.event(event);
                ensure!(
                    !flags.intersects(EventFlags::ERR | EventFlags::HUP),
                    "a connection was refused or reset"
                );
                poll.change(&fds[token as usize], token, EventFlags::empty())?;
                connected += 1;
            }
        }
        Ok(Self { poll, fds })
    }

    fn interest_all(&self, interest: EventFlags) -> Result<()> {
        for (index, fd) in self.fds.iter().enumerate() {
            self.poll.change(fd, index as u64, interest)?;
        }
        Ok(())
    }

    /// Every connection sends `bytes`, waits until they are back, and begins again: all of them at all times.
    /// Stops after `rounds` each, or when the meter is over.
    fn echo(&mut self, bytes: usize, rounds: u64, mut over: impl FnMut(u64) -> bool) -> Result<()> {
        let message = vec![ECHO; bytes.min(CHUNK_BYTES)];
        let mut scratch = vec![0; CHUNK_BYTES];
        let mut done = 0;
        // How much was sent, how much came back, and how many rounds are finished.
        let mut states = vec![(0_usize, 0_usize, 0_u64); self.fds.len()];
        let advance =
            |poll: &Poll, fd: &OwnedFd, token: usize, sent: &mut usize, writing: bool| -> Result<()> {
                let part = (bytes - *sent).min(message.len());
                *sent += give(fd, &message[..part]).context("a connection was reset")?;
                match (writing, *sent < bytes) {
                    (false, true) => poll.change(fd, token as u64, READ | WRITE)?,
                    (true, false) => poll.change(fd, token as u64, READ)?,
                    _ => {}
                }
                Ok(())
            };
        self.interest_all(READ)?;
        for (index, fd) in self.fds.iter().enumerate() {
            advance(&self.poll, fd, index, &mut states[index].0, false)?;
        }
        while !over(done) && done < rounds.saturating_mul(self.fds.len() as u64) {
            for event in 0..self.poll.wait(STEP)? {
                let (token, flags) = self.poll.event(event);
                let index = token as usize;
                let (fd, (sent, received, finished)) = (&self.fds[index], &mut states[index]);
                if flags.contains(WRITE) && *sent < bytes {
                    advance(&self.poll, fd, index, sent, true)?;
                }
                match discard(fd, &mut scratch).context("a connection was reset")? {
                    Taken::Bytes(bytes) => *received += bytes,
                    Taken::Nothing => {}
                    Taken::End => bail!("a connection was closed in the middle"),
                }
                if *received == bytes {
                    done += 1;
                    *finished += 1;
                    if *finished < rounds {
                        (*sent, *received) = (0, 0);
                        advance(&self.poll, fd, index, sent, false)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Ping-pong of `bytes` on all of them.
    pub fn ping_pong(&mut self, bytes: usize, meter: &mut Meter) -> Result<()> {
        self.echo(bytes, u64::MAX, |done| meter.over(done))
    }

    /// Each of them sends `bytes` and takes them back, all at once; fails after a minute.
    pub fn echo_once(&mut self, bytes: usize) -> Result<()> {
        let begun = Instant::now();
        let mut late = false;
        self.echo(bytes, 1, |_| {
            late = begun.elapsed() > ECHO_LIMIT;
            late
        })?;
        ensure!(!late, "{} sessions did not echo {bytes} bytes each in {ECHO_LIMIT:?}", self.fds.len());
        Ok(())
    }

    /// As much as goes through; units are bytes, of both directions together.
    pub fn bulk(&mut self, direction: Direction, backend: &Backend, meter: &mut Meter) -> Result<()> {
        let (command, interest) = match direction {
            Direction::ToClient => (SOURCE, READ),
            Direction::ToBackend => (SINK, READ | WRITE),
            Direction::Both => (BOTH, READ | WRITE),
        };
        let chunk = vec![command; CHUNK_BYTES];
        let mut scratch = vec![0; CHUNK_BYTES];
        let before = backend.sunk();
        let mut received = 0;
        for fd in &self.fds {
            ensure!(give(fd, &chunk[..1])? == 1, "a new socket does not take a byte");
        }
        self.interest_all(interest)?;
        while !meter.over(received + backend.sunk() - before) {
            for event in 0..self.poll.wait(STEP)? {
                let (token, flags) = self.poll.event(event);
                let fd = &self.fds[token as usize];
                if flags.contains(WRITE) {
                    give(fd, &chunk).context("a connection was reset")?;
                }
                if flags.intersects(READ | EventFlags::HUP | EventFlags::ERR) {
                    match discard(fd, &mut scratch).context("a connection was reset")? {
                        Taken::Bytes(bytes) => received += bytes as u64,
                        Taken::Nothing => {}
                        Taken::End => bail!("a connection was closed in the middle"),
                    }
                }
            }
        }
        Ok(())
    }

    /// Sends a request of 64 bytes `rate` times a second, whether or not earlier ones were answered, on one
    /// connection after the other. The result is how long each took *from the moment it was due*, so a proxy
    /// (or a client) that stalls is charged for all that should have been sent meanwhile: nothing is
    /// coordinated, so nothing is omitted.
    pub fn open_loop(&mut self, rate: u32, meter: &mut Meter) -> Result<Vec<Duration>> {
        // The kernel would let this thread sleep 50 µs longer than asked.
        std::fs::write("/proc/thread-self/timerslack_ns", "1").ok();
        let message = [ECHO; SMALL_BYTES];
        let mut scratch = vec![0; CHUNK_BYTES];
        let interval = Duration::from_secs(1) / rate;
        let outstanding_max = rate as usize * 2;
        let mut latencies =
            Vec::with_capacity((meter.length().as_secs_f64() * f64::from(rate) * 1.2) as usize);
        // When the unanswered requests were due, and how many bytes of the first one's answer are here.
        let mut due_at: Vec<(VecDeque<Instant>, usize)> = vec![(VecDeque::new(), 0); self.fds.len()];
        let (mut due, mut turn, mut outstanding, mut done) = (Instant::now(), 0, 0, 0);
        let measured_from = due + meter.warm_up();
        self.interest_all(READ)?;
        while !meter.over(done) {
            let now = Instant::now();
            while due <= now {
                ensure!(
                    outstanding < outstanding_max,
                    "{rate} requests a second are too many: {outstanding} wait"
                );
                let sent = give(&self.fds[turn], &message).context("a connection was reset")?;
                ensure!(sent == SMALL_BYTES, "a socket is full at {rate} requests a second");
                due_at[turn].0.push_back(due);
                due += interval;
                turn = (turn + 1) % self.fds.len();
                outstanding += 1;
            }
            for event in 0..self.poll.wait(due.saturating_duration_since(Instant::now()).min(STEP))? {
                let index = self.poll.event(event).0 as usize;
                let (queue, part) = &mut due_at[index];
                match discard(&self.fds[index], &mut scratch).context("a connection was reset")? {
                    Taken::Bytes(bytes) => *part += bytes,
                    Taken::Nothing => {}
                    Taken::End => bail!("a connection was closed in the middle"),
                }
                let now = Instant::now();
                while *part >= SMALL_BYTES {
                    *part -= SMALL_BYTES;
                    outstanding -= 1;
                    done += 1;
                    let asked = queue.pop_front().context("more answers than requests")?;
                    if asked >= measured_from {
                        latencies.push(now - asked);
                    }
                }
            }
        }
        // What was not answered until the end counts with the time that it has waited so far.
        let now = Instant::now();
        latencies.extend(
            due_at.iter().flat_map(|(queue, _)| queue).map(|due| now.saturating_duration_since(*due)),
        );
        Ok(latencies)
    }

    /// Cuts all of them by a reset, so that no half-closed rest occupies the next measurement.
    pub fn cut(self) {
        for fd in &self.fds {
            let _ = sockopt::set_socket_linger(fd, Some(Duration::ZERO));
        }
    }
}

/// The direction of bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToClient,
    ToBackend,
    Both,
}
