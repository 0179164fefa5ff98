//! Queries the kernel for the state of one TCP connection, over a netlink socket (`sock_diag(7)`).
//!
//! `getsockopt(TCP_INFO)` would give the same state, but no safe Rust call for it exists. A query costs four
//! system calls and a hash lookup in the kernel, some 5 µs. So it is made for sessions that look silent, not
//! for each move of bytes.
//!
//! This file writes requests and reads answers. What the state means for a session is decided in `wire.rs`.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};
use socket2::Socket;

use super::wire::Wire;

const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// The attribute that holds a `struct tcp_info`.
const INET_DIAG_INFO: u16 = 2;
const IPPROTO_TCP: u8 = 6;
const NLMSG_HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = NLMSG_HEADER_BYTES + 56;
const INET_DIAG_MSG_BYTES: usize = 72;
/// The offset of a connection's state in a `struct inet_diag_msg`, and the state of a listening socket.
const IDIAG_STATE_OFFSET: usize = 1;
const TCP_LISTEN: u8 = 10;
const IDIAG_WQUEUE_OFFSET: usize = 60;
/// The alignment of netlink attributes.
const ALIGNMENT: usize = 4;
/// An answer has some 500 bytes. A longer one is cut off behind the attributes that are used here.
const ANSWER_MAX_BYTES: usize = 2048;
/// The most answers to earlier queries that are skipped. Each query reads its answer, so there is none in
/// practice.
const STALE_ANSWERS_MAX: usize = 8;

/// A worker's netlink socket to the kernel's socket diagnostics.
#[derive(Debug)]
pub(super) struct SockDiag {
    netlink: OwnedFd,
    /// The number of the last query. The kernel repeats it in the answer.
    sequence: Cell<u32>,
}

impl SockDiag {
    /// Opens the netlink socket and makes one query, so that the kernel loads its module.
    ///
    /// # Errors
    /// The kernel has no diagnostics for TCP, or the process may not use netlink (`RestrictAddressFamilies=`
    /// of systemd, a seccomp filter).
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let netlink = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
        let diag = Self { netlink, sequence: Cell::new(0) };
        // No connection has port 0, so a kernel with diagnostics answers "no such socket".
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        match diag.query(nowhere, nowhere) {
            Ok(_) | Err(Errno::NOENT) => Ok(diag),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the state of a TCP connection. `None` if the query fails, or if the kernel does not know the
    /// connection: it is gone, or belongs to another network namespace.
    pub(super) fn wire(&self, socket: &Socket) -> Option<Wire> {
        let local = socket.local_addr().ok()?.as_socket()?;
        let peer = socket.peer_addr().ok()?.as_socket()?;
        self.query(local, peer).ok()
    }

    fn query(&self, local: SocketAddr, peer: SocketAddr) -> rustix::io::Result<Wire> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        send(&self.netlink, &request(sequence, local, peer), SendFlags::empty())?;
        // The kernel answers before `send` returns.
        let mut answer = [0; ANSWER_MAX_BYTES];
        for _ in 0..=STALE_ANSWERS_MAX {
            let (length, _) = recv(&self.netlink, &mut answer, RecvFlags::DONTWAIT)?;
            if let Some(result) = parse(sequence, &answer[..length.min(ANSWER_MAX_BYTES)]) {
                return result;
            }
        }
        Err(Errno::PROTO)
    }
}

/// A `struct nlmsghdr` followed by a `struct inet_diag_req_v2`.
fn request(sequence: u32, local: SocketAddr, peer: SocketAddr) -> [u8; REQUEST_BYTES] {
    /// `INET_DIAG_NOCOOKIE`.
    const ANY_COOKIE: [u8; 8] = [0xff; 8];
    const ALL_STATES: u32 = u32::MAX;
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let interface = if let SocketAddr::V6(peer) = peer { peer.scope_id() } else { 0 };
    let mut request = [0; REQUEST_BYTES];
    let mut fields = request.as_mut_slice();
    let mut put = |bytes: &[u8]| {
        let (field, rest) = std::mem::take(&mut fields).split_at_mut(bytes.len());
        field.copy_from_slice(bytes);
        fields = rest;
    };
    put(&(REQUEST_BYTES as u32).to_ne_bytes());
    put(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&NLM_F_REQUEST.to_ne_bytes());
    put(&sequence.to_ne_bytes());
    put(&[0; 4]);
    put(&[family.as_raw() as u8, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    put(&ALL_STATES.to_ne_bytes());
    put(&local.port().to_be_bytes());
    put(&peer.port().to_be_bytes());
    put(&address_bytes(local.ip()));
    put(&address_bytes(peer.ip()));
    put(&interface.to_ne_bytes());
    put(&ANY_COOKIE);
    request
}

fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            bytes
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// Reads an answer. `None` if it belongs to another query.
fn parse(sequence: u32, answer: &[u8]) -> Option<rustix::io::Result<Wire>> {
    if u32_at(answer, 8)? != sequence {
        return None;
    }
    let body = answer.get(NLMSG_HEADER_BYTES..)?;
    match u16_at(answer, 4)? {
        SOCK_DIAG_BY_FAMILY => Some(state(body).ok_or(Errno::PROTO)),
        NLMSG_ERROR => {
            let error = u32_at(body, 0)?.cast_signed().checked_neg()?;
            Some(Err(Errno::from_raw_os_error(error)))
        }
        _ => None,
    }
}

/// Reads a `struct inet_diag_msg` and the attributes behind it.
fn state(body: &[u8]) -> Option<Wire> {
    // If the connection is gone, the kernel answers with the listening socket of its port.
    if *body.get(IDIAG_STATE_OFFSET)? == TCP_LISTEN {
        return None;
    }
    let unacknowledged_bytes = u32_at(body, IDIAG_WQUEUE_OFFSET)?;
    let mut attributes = body.get(INET_DIAG_MSG_BYTES..)?;
    loop {
        let (length, kind) = (usize::from(u16_at(attributes, 0)?), u16_at(attributes, 2)?);
        if kind == INET_DIAG_INFO {
            return tcp_info(unacknowledged_bytes, attributes.get(4..length)?);
        }
        attributes = attributes.get(length.max(4).next_multiple_of(ALIGNMENT)..)?;
    }
}

/// Reads the beginning of a `struct tcp_info`, which is the same in all kernels.
fn tcp_info(unacknowledged_bytes: u32, info: &[u8]) -> Option<Wire> {
    let milliseconds = |offset| Some(Duration::from_millis(u32_at(info, offset)?.into()));
    Some(Wire {
        unacknowledged_bytes,
        retransmits: *info.get(2)?,
        probes: *info.get(3)?,
        backoff: *info.get(4)?,
        packets_in_flight: u32_at(info, 24)?,
        last_data_sent: milliseconds(44)?,
        last_data_received: milliseconds(52)?,
        last_ack: milliseconds(56)?,
    })
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};
    use tokio::time::Instant;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn connection(address: &str) -> Option<(Socket, TcpStream)> {
        let listener = TcpListener::bind(address).ok()?;
        let peer = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (socket, _) = listener.accept().expect("a connection");
        Some((socket.into(), peer))
    }

    #[test]
    fn the_kernel_reports_how_many_bytes_are_not_acknowledged() {
        let diag = SockDiag::open().expect("the kernel has socket diagnostics");
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // The machine may have no IPv6.
            let Some((socket, mut peer)) = connection(address) else { continue };
            let wire = diag.wire(&socket).expect("it is connected");
            assert_eq!((wire.unacknowledged_bytes, wire.packets_in_flight), (0, 0), "{address}: {wire:?}");

            socket.set_nonblocking(true).expect("a socket");
            let mut sent = 0;
            while let Ok(count) = socket.send(&[7; 65_536]) {
                sent += count;
            }
            let wire = diag.wire(&socket).expect("it is connected");
            let left = wire.unacknowledged_bytes as usize;
            assert!(left > 0 && left < sent, "{address}: {left} of {sent}: {wire:?}");

            peer.set_read_timeout(Some(PATIENCE)).expect("a socket");
            peer.read_exact(&mut vec![0; sent]).expect("it comes");
            // The last acknowledgement may be under way.
            let deadline = Instant::now() + PATIENCE;
            while diag.wire(&socket).expect("it is connected").unacknowledged_bytes > 0 {
                assert!(Instant::now() < deadline, "{address}: the peer has all bytes");
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn the_kernel_does_not_know_a_connection_that_is_gone() {
        let diag = SockDiag::open().expect("the kernel has socket diagnostics");
        let (socket, peer) = connection("127.0.0.1:0").expect("a free port");
        let (local, remote) = (peer.local_addr().expect("bound"), peer.peer_addr().expect("connected"));
        assert!(diag.query(local, remote).is_ok());
        drop(socket);
        socket2::SockRef::from(&peer).set_linger(Some(Duration::ZERO)).expect("tcp");
        drop(peer);
        assert_eq!(diag.query(local, remote), Err(Errno::NOENT));
    }

    /// A worker must survive any answer, although the kernel is trusted.
    #[test]
    fn answers_that_are_cut_or_random_are_refused() {
        let mut random = fastrand::Rng::with_seed(13);
        let mut whole = vec![0; NLMSG_HEADER_BYTES + INET_DIAG_MSG_BYTES];
        whole[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        whole[8..12].copy_from_slice(&1u32.to_ne_bytes());
        whole.extend_from_slice(&64u16.to_ne_bytes());
        whole.extend_from_slice(&INET_DIAG_INFO.to_ne_bytes());
        whole.extend_from_slice(&[0; 60]);
        assert!(parse(1, &whole).expect("its answer").is_ok());
        assert!(parse(2, &whole).is_none(), "it answers another query");
        for length in 0..whole.len() {
            assert!(parse(1, &whole[..length]).is_none_or(|wire| wire.is_err()), "{length} bytes");
        }
        for _ in 0..10_000 {
            let mut answer = whole.clone();
            random.fill(&mut answer[NLMSG_HEADER_BYTES + INET_DIAG_MSG_BYTES..]);
            let _ = parse(1, &answer);
            random.fill(&mut answer);
            let _ = parse(u32_at(&answer, 8).expect("long enough"), &answer);
        }
    }
}
