//! The one backend behind every peer: a thread with epoll. The first byte of a connection says what it does
//! with it.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, bind, listen, socket_with, sockopt};
use tokio::time::Instant;

use super::poll::{CHUNK_BYTES, Poll, READ, Taken, WRITE, discard, give, take};

/// Sends back what comes, the first byte included.
pub const ECHO: u8 = b'e';
/// Sends without end.
pub const SOURCE: u8 = b's';
/// Takes everything, and counts it.
pub const SINK: u8 = b'k';
/// Sends without end, and takes everything.
pub const BOTH: u8 = b'b';

const LISTENER: u64 = u64::MAX;
const BACKLOG: i32 = 4096;

#[derive(Default)]
struct Shared {
    accepted: AtomicU64,
    open: AtomicU64,
    sunk: AtomicU64,
    stop: AtomicBool,
}

/// Stops when dropped.
pub struct Backend {
    address: SocketAddrV4,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    pub fn start(address: SocketAddrV4) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        sockopt::set_socket_reuseaddr(&listener, true)?;
        // Accepted sockets inherit it.
        sockopt::set_tcp_nodelay(&listener, true)?;
        bind(&listener, &address)?;
        listen(&listener, BACKLOG)?;
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("backend".into()).spawn(move || {
            Serving::new(listener, seen).and_then(Serving::run).expect("the backend's own sockets work");
        })?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Connections since the start.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Relaxed)
    }

    /// Bytes that [`SINK`] and [`BOTH`] took since the start.
    pub fn sunk(&self) -> u64 {
        self.shared.sunk.load(Relaxed)
    }

    /// Waits until no connection is open, so that the end of one measurement does not burden the next; gives
    /// up in time.
    pub fn wait_until_idle(&self, limit: Duration) {
        let begun = Instant::now();
        while self.shared.open.load(Relaxed) > 0 && begun.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A free port below those that the kernel hands out (see `namespace.rs`), so that no session can sit on it.
pub fn free_port() -> io::Result<SocketAddrV4> {
    static NEXT: AtomicU64 = AtomicU64::new(7_100);
    loop {
        let port = NEXT.fetch_add(1, Relaxed);
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port as u16);
        match std::net::TcpListener::bind(address) {
            Ok(_) => return Ok(address),
            Err(error) if port > 9_900 => return Err(error),
            Err(_) => {}
        }
    }
}

struct Connection {
    fd: OwnedFd,
    /// 0 until the first byte came.
    mode: u8,
    /// What the socket did not take, in [`ECHO`]; nothing is read until it is gone.
    pending: Vec<u8>,
}

struct Serving {
    poll: Poll,
    listener: OwnedFd,
    /// By descriptor.
    connections: Vec<Option<Connection>>,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
    zeros: Vec<u8>,
}

impl Serving {
    fn new(listener: OwnedFd, shared: Arc<Shared>) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(&listener, LISTENER, READ)?;
        let (buffer, zeros) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
        Ok(Self { poll, listener, connections: Vec::new(), shared, buffer, zeros })
    }

    fn run(mut self) -> io::Result<()> {
        while !self.shared.stop.load(Relaxed) {
            for index in 0..self.poll.wait(Duration::from_millis(50))? {
                let (token, flags) = self.poll.event(index);
                if token == LISTENER {
                    self.accept()?;
                } else if !self.serve(token, flags).unwrap_or(false) {
                    // An event may come for a descriptor that an earlier one of the same batch closed.
                    if self.connections[token as usize].take().is_some() {
                        self.shared.open.fetch_sub(1, Relaxed);
                    }
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let fd = match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(fd) => fd,
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let index = fd.as_raw_fd() as usize;
            if self.connections.len() <= index {
                self.connections.resize_with(index + 1, || None);
            }
            self.poll.add(&fd, index as u64, READ)?;
            self.connections[index] = Some(Connection { fd, mode: 0, pending: Vec::new() });
            self.shared.open.fetch_add(1, Relaxed);
            self.shared.accepted.fetch_add(1, Relaxed);
        }
    }

    /// Whether the connection stays.
    fn serve(&mut self, token: u64, flags: EventFlags) -> io::Result<bool> {
        let Some(connection) = self.connections[token as usize].as_mut() else { return Ok(true) };
        if flags.contains(WRITE) {
            if connection.mode != ECHO {
                give(&connection.fd, &self.zeros)?;
            } else {
                let sent = give(&connection.fd, &connection.pending)?;
                connection.pending.drain(..sent);
                if connection.pending.is_empty() {
                    connection.pending = Vec::new();
                    self.poll.change(&connection.fd, token, READ)?;
                }
            }
        }
        if !flags.intersects(READ | EventFlags::HUP | EventFlags::ERR) {
            return Ok(true);
        }
        let taken = match connection.mode {
            SINK | BOTH | SOURCE => discard(&connection.fd, &mut self.buffer)?,
            _ => take(&connection.fd, &mut self.buffer)?,
        };
        let bytes = match taken {
            Taken::Bytes(bytes) => bytes,
            Taken::Nothing => return Ok(true),
            Taken::End => return Ok(false),
        };
        if connection.mode == 0 {
            connection.mode = self.buffer[0];
            if matches!(connection.mode, SOURCE | BOTH) {
                self.poll.change(&connection.fd, token, READ | WRITE)?;
            }
        }
        match connection.mode {
            ECHO => {
                let sent = give(&connection.fd, &self.buffer[..bytes])?;
                if sent < bytes {
                    connection.pending.extend_from_slice(&self.buffer[sent..bytes]);
                    self.poll.change(&connection.fd, token, WRITE)?;
                }
            }
            SINK | BOTH => {
                self.shared.sunk.fetch_add(bytes as u64, Relaxed);
            }
            _ => {}
        }
        Ok(true)
    }
}
