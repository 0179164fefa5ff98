//! A flood of clients that connect and reset at once, beside steady sessions that the proxy must go on
//! serving.
//!
//! The flood is a thread of its own, as fast as one can be. The sessions are an open loop, as in `load.rs`:
//! each counts from the moment when it was due.

use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_linger, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use tokio::time::Instant;

use super::backend::ECHO;
use super::load::SMALL_BYTES;
use super::meter::Meter;
use super::poll::{Poll, READ, Taken, WRITE, dial, discard, give};

/// Where the listener's queue is full the kernel would try again after a second.
const CONNECT_LIMIT: Duration = Duration::from_millis(100);
/// Sessions under way at once; a proxy that lets more of them wait has no result.
const SESSIONS_MAX: usize = 8_192;
/// Between two looks at the clock, at most.
const STEP: Duration = Duration::from_millis(20);

/// What became of the load.
#[derive(Debug)]
pub struct Flooded {
    /// How long each session took from the moment it was due. One that was not answered counts with the time
    /// it has waited.
    pub latencies: Vec<Duration>,
    /// Sessions that were served while it was measured.
    pub sessions: u64,
    /// Sessions that were refused or reset, from the first to the last.
    pub lost: u64,
    /// Clients of the flood while it was measured.
    pub clients: u64,
    /// Sessions that were begun, from the first to the last.
    pub all_sessions: u64,
    /// Clients of the flood, from the first to the last.
    pub all_clients: u64,
}

#[derive(Default)]
struct Flood {
    clients: AtomicU64,
    is_over: AtomicBool,
}

impl Flood {
    /// Connects and resets, one after the other.
    fn run(&self, to: SocketAddrV4) -> Result<()> {
        while !self.is_over.load(Relaxed) {
            let fd = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            set_socket_linger(&fd, Some(Duration::ZERO))?;
            set_socket_timeout(&fd, Timeout::Send, Some(CONNECT_LIMIT))?;
            match connect(&fd, &to) {
                Ok(()) => {
                    drop(fd);
                    self.clients.fetch_add(1, Relaxed);
                }
                // The queue is full.
                Err(Errno::INPROGRESS) => {}
                Err(error) => return Err(error).context("the flood cannot connect"),
            }
        }
        Ok(())
    }
}

/// Begins `rate` sessions a second (connect, 64 bytes there and back, close) beside a flood, until the meter
/// is over.
pub fn beside_a_flood(to: SocketAddrV4, rate: u32, meter: &mut Meter) -> Result<Flooded> {
    let flood = Flood::default();
    thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(to));
        let served = Sessions::new(to, rate).and_then(|sessions| sessions.run(&flood, meter));
        flood.is_over.store(true, Relaxed);
        flooding.join().expect("the flood does not panic")?;
        let all_clients = flood.clients.load(Relaxed);
        served.map(|flooded| Flooded { all_clients, ..flooded })
    })
}

/// One session that is under way.
struct Session {
    fd: OwnedFd,
    due: Instant,
    sent: bool,
    received: usize,
}

struct Sessions {
    to: SocketAddrV4,
    interval: Duration,
    poll: Poll,
    open: Vec<Option<Session>>,
    free: Vec<usize>,
    begun: u64,
    lost: u64,
}

impl Sessions {
    fn new(to: SocketAddrV4, rate: u32) -> Result<Self> {
        let (open, free) = (Vec::new(), Vec::new());
        let interval = Duration::from_secs(1) / rate;
        Ok(Self { to, interval, poll: Poll::new()?, open, free, begun: 0, lost: 0 })
    }

    fn run(mut self, flood: &Flood, meter: &mut Meter) -> Result<Flooded> {
        // The kernel would let this thread sleep 50 µs longer than asked.
        std::fs::write("/proc/thread-self/timerslack_ns", "1").ok();
        let mut due = Instant::now();
        let measured_from = due + meter.warm_up();
        let (mut latencies, mut done) = (Vec::new(), 0);
        let mut before = None;
        while !meter.over(done + flood.clients.load(Relaxed)) {
            let now = Instant::now();
            if now >= measured_from {
                before.get_or_insert((done, flood.clients.load(Relaxed)));
            }
            while due <= now {
                self.begin(due)?;
                due += self.interval;
            }
            let pause = due.saturating_duration_since(Instant::now()).min(STEP);
            for event in 0..self.poll.wait(pause)? {
                let index = self.poll.event(event).0 as usize;
                match self.goes_on(index) {
                    Ok(None) => {}
                    Ok(Some(due)) => {
                        done += 1;
                        if due >= measured_from {
                            latencies.push(due.elapsed());
                        }
                    }
                    // In a flood that is a result, too.
                    Err(_) => {
                        self.lost += 1;
                        self.open[index] = None;
                        self.free.push(index);
                    }
                }
            }
        }
        let now = Instant::now();
        let waiting = self.open.iter().flatten().filter(|session| session.due >= measured_from);
        latencies.extend(waiting.map(|session| now.saturating_duration_since(session.due)));
        let (sessions, clients) = before.unwrap_or_default();
        Ok(Flooded {
            latencies,
            sessions: done - sessions,
            clients: flood.clients.load(Relaxed) - clients,
            lost: self.lost,
            all_sessions: self.begun,
            all_clients: 0,
        })
    }

    fn begin(&mut self, due: Instant) -> Result<()> {
        let (fd, connected) = dial(self.to).context("cannot connect")?;
        self.begun += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.open.push(None);
            self.open.len() - 1
        });
        ensure!(index < SESSIONS_MAX, "{SESSIONS_MAX} sessions wait");
        let sent = connected && give(&fd, &[ECHO; SMALL_BYTES])? == SMALL_BYTES;
        self.poll.add(&fd, index as u64, if sent { READ } else { WRITE })?;
        self.open[index] = Some(Session { fd, due, sent, received: 0 });
        Ok(())
    }

    /// When the session was due, if it has ended.
    fn goes_on(&mut self, index: usize) -> Result<Option<Instant>> {
        let Some(session) = self.open[index].as_mut() else { return Ok(None) };
        if !session.sent {
            let sent = give(&session.fd, &[ECHO; SMALL_BYTES]).context("a session was not connected")?;
            ensure!(sent == SMALL_BYTES, "a new socket does not take 64 bytes");
            session.sent = true;
            self.poll.change(&session.fd, index as u64, READ)?;
            return Ok(None);
        }
        match discard(&session.fd, &mut [0; SMALL_BYTES]).context("a session was reset")? {
            Taken::Bytes(bytes) => session.received += bytes,
            Taken::Nothing => {}
            Taken::End => bail!("a session ended after {} bytes of {SMALL_BYTES}", session.received),
        }
        if session.received < SMALL_BYTES {
            return Ok(None);
        }
        self.free.push(index);
        Ok(self.open[index].take().map(|session| session.due))
    }
}
