//! Binds listening sockets: one for each worker and address. The sockets of an address share it by
//! SO_REUSEPORT.
//!
//! The kernel spreads connections evenly over them, by a hash of the addresses. With a single socket that
//! all workers watch, one worker got nearly all connections when this was measured.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, Type};

use crate::config::{Congestion, Keepalive};
use crate::net::errors::explain;
use crate::net::options::tcp_keepalive;

/// The longest queue of connections that wait to be accepted; the kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 65_535;

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listeners.{listener}.bind: {address}: {reason}")]
pub struct BindError {
    /// The listener's name.
    pub listener: String,
    /// The address to bind.
    pub address: SocketAddr,
    /// The kernel's error, and what to do about it.
    reason: String,
}

/// Options that accepted connections inherit from the listening socket, which saves up to six system calls a
/// session.
#[derive(Clone, Debug)]
pub struct Options {
    /// When a silent peer is probed.
    pub keepalive: Keepalive,
    /// The congestion control; `None`: the system's.
    pub congestion: Option<Congestion>,
}

/// Binds `count` sockets to `address`. With port 0, all of them get the same free port.
///
/// # Errors
/// The address is taken, forbidden or not this machine's; the message says what to do.
pub fn bind(
    listener: &str,
    address: SocketAddr,
    options: &Options,
    count: usize,
) -> Result<Vec<TcpListener>, BindError> {
    bind_all(address, options, count).map_err(|error| BindError {
        listener: listener.to_owned(),
        address,
        reason: explain(&error),
    })
}

fn bind_all(address: SocketAddr, options: &Options, count: usize) -> io::Result<Vec<TcpListener>> {
    let mut sockets = Vec::with_capacity(count);
    let mut bound = address;
    if address.port() != 0 {
        // SO_REUSEPORT would let a second Statera of the same user share the port without an error. So a
        // socket without this option is bound first, which fails then.
        let probe = open(address, options)?;
        probe.bind(&SockAddr::from(address))?;
    }
    for _ in 0..count {
        let socket = open(address, options)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SockAddr::from(bound))?;
        if bound.port() == 0 {
            bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        }
        sockets.push(socket);
    }
    // From here on, the kernel accepts connections. All sockets were bound before, so a socket that cannot
    // be bound never makes the kernel reset accepted connections.
    sockets
        .into_iter()
        .map(|socket| {
            socket.listen(BACKLOG)?;
            Ok(TcpListener::from(socket))
        })
        .collect()
}

fn open(address: SocketAddr, options: &Options) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `[::]:80` never includes `0.0.0.0:80`, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    let Keepalive { idle, interval, probes } = options.keepalive;
    socket.set_tcp_keepalive(&tcp_keepalive(idle, interval, probes))?;
    if let Some(congestion) = &options.congestion {
        socket.set_tcp_congestion(congestion.name().as_bytes())?;
    }
    Ok(socket)
}

/// Checks that this process may use `congestion`.
///
/// # Errors
/// The kernel does not have it, or forbids it; the message says what to do.
pub fn check_congestion(congestion: &Congestion) -> Result<(), String> {
    let set = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_tcp_congestion(congestion.name().as_bytes())
    };
    set().map_err(|error: io::Error| {
        let sysctl =
            |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
        let name = congestion.name();
        let cure = match error.kind() {
            io::ErrorKind::NotFound => {
                let available = sysctl("tcp_available_congestion_control");
                format!("this kernel has {}: choose one of these, or `modprobe tcp_{name}`", available.trim())
            }
            io::ErrorKind::PermissionDenied => {
                let allowed = sysctl("tcp_allowed_congestion_control");
                format!(
                    "users without CAP_NET_ADMIN may use {}: choose one of these, or add it to \
                     net.ipv4.tcp_allowed_congestion_control",
                    allowed.trim()
                )
            }
            _ => return format!("{name}: {error}"),
        };
        format!("{name}: {error}: {cure}")
    })
}

/// Makes the kernel drop SYN packets to this socket, while handshakes under way complete. A client whose SYN
/// was dropped sends it again after a second, and then finds the port closed or another server there.
///
/// Without this, closing the socket would reset every connection whose handshake completes between the last
/// accept and the close.
///
/// # Errors
/// The kernel refuses the filter; the socket is unchanged then.
pub fn ignore_new_handshakes(listener: &impl std::os::fd::AsFd) -> io::Result<()> {
    const LOAD_BYTE_ABSOLUTE: u16 = 0x30;
    const JUMP_IF_ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const TCP_FLAGS_OFFSET: u32 = 13;
    const SYN: u32 = 0x02;
    SockRef::from(listener).attach_filter(&[
        SockFilter::new(LOAD_BYTE_ABSOLUTE, 0, 0, TCP_FLAGS_OFFSET),
        SockFilter::new(JUMP_IF_ANY_BIT, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;
    use std::num::NonZeroU32;
    use std::time::Duration;

    const KEEPALIVE: Keepalive = Keepalive {
        idle: Duration::from_secs(61),
        interval: Duration::from_secs(11),
        probes: NonZeroU32::new(7).expect("not zero"),
    };
    const OPTIONS: Options = Options { keepalive: KEEPALIVE, congestion: None };

    fn any_port() -> SocketAddr {
        "127.0.0.1:0".parse().expect("an address")
    }

    #[test]
    fn all_sockets_of_an_address_share_one_port_and_accepted_ones_inherit_their_options() {
        let sockets = bind("web", any_port(), &OPTIONS, 3).expect("a free port");
        let address = sockets[0].local_addr().expect("bound");
        assert!(sockets.iter().all(|socket| socket.local_addr().expect("bound") == address));
        drop(sockets);

        // Every kernel has "reno".
        let options = Options { congestion: "reno".parse().ok(), ..OPTIONS };
        let sockets = bind("web", address, &options, 1).expect("the port is free again");
        let _client = TcpStream::connect(address).expect("it listens");
        sockets[0].set_nonblocking(false).expect("a socket");
        let (accepted, _) = sockets[0].accept().expect("a client");
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().expect("tcp") && accepted.keepalive().expect("tcp"));
        assert_eq!(accepted.tcp_keepalive_time().expect("tcp"), KEEPALIVE.idle);
        assert_eq!(accepted.tcp_keepalive_interval().expect("tcp"), KEEPALIVE.interval);
        assert_eq!(accepted.tcp_keepalive_retries().expect("tcp"), KEEPALIVE.probes.get());
        assert!(accepted.tcp_congestion().expect("tcp").starts_with(b"reno"));
    }

    #[test]
    fn a_port_in_use_is_refused_even_if_its_socket_has_so_reuseport() {
        let first = bind("web", any_port(), &OPTIONS, 1).expect("a free port");
        let address = first[0].local_addr().expect("bound");
        let error = bind("web", address, &OPTIONS, 1).expect_err("the port is taken").to_string();
        assert!(error.starts_with(&format!("listeners.web.bind: {address}: ")), "{error}");
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn the_error_for_an_address_of_another_machine_says_so() {
        let address = "192.0.2.1:8080".parse().expect("an address");
        let error = bind("web", address, &OPTIONS, 1).expect_err("not ours").to_string();
        assert!(error.contains("no interface of this machine has that address"), "{error}");
    }

    #[test]
    fn handshakes_under_way_complete_and_new_ones_are_dropped() {
        let sockets = bind("web", any_port(), &OPTIONS, 1).expect("a free port");
        let address = sockets[0].local_addr().expect("bound");
        let mut before = TcpStream::connect(address).expect("it listens");
        ignore_new_handshakes(&sockets[0]).expect("filters are allowed");
        let after = TcpStream::connect_timeout(&address, Duration::from_millis(200));
        assert_eq!(after.expect_err("ignored").kind(), io::ErrorKind::TimedOut);

        sockets[0].set_nonblocking(false).expect("a socket");
        let (mut accepted, _) = sockets[0].accept().expect("the first client");
        before.write_all(b"ping").expect("connected");
        let mut four = [0; 4];
        accepted.read_exact(&mut four).expect("data still flows");
        assert_eq!(&four, b"ping");
    }
}
