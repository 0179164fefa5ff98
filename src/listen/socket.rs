//! Listening sockets: one for each worker and address, sharing the address by SO_REUSEPORT.
//!
//! The kernel spreads connections over them by a hash of the addresses, evenly; a single socket watched by all workers
//! was measured to give nearly everything to one of them.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, TcpKeepalive, Type};

use crate::config::Keepalive;

/// Asks for the longest queue: the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 65_535;

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listeners.{listener}.bind: {address}: {reason}")]
pub struct BindError {
    /// The listener's name.
    pub listener: String,
    /// Where it was to listen.
    pub address: SocketAddr,
    /// What the kernel said, and what to do about it.
    reason: String,
}

/// Binds `count` sockets to `address`. Port 0 takes a free port, the same for all.
///
/// Accepted connections inherit nodelay and keepalive from the socket, which saves five system calls a session.
///
/// # Errors
/// Says why and what to do.
pub fn bind(
    listener: &str,
    address: SocketAddr,
    keepalive: Keepalive,
    count: usize,
) -> Result<Vec<TcpListener>, BindError> {
    bind_all(address, keepalive, count).map_err(|error| BindError {
        listener: listener.to_owned(),
        address,
        reason: explain(&error),
    })
}

fn bind_all(address: SocketAddr, keepalive: Keepalive, count: usize) -> io::Result<Vec<TcpListener>> {
    let mut sockets = Vec::with_capacity(count);
    let mut bound = address;
    if address.port() != 0 {
        // SO_REUSEPORT would let a second Statera share the port in silence: a socket without it finds that out.
        let probe = open(address, keepalive)?;
        probe.bind(&SockAddr::from(address))?;
    }
    for _ in 0..count {
        let socket = open(address, keepalive)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SockAddr::from(bound))?;
        if bound.port() == 0 {
            bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        }
        sockets.push(socket);
    }
    // Only now, when nothing can fail for want of the address any more, does the kernel take connections.
    sockets
        .into_iter()
        .map(|socket| {
            socket.listen(BACKLOG)?;
            Ok(TcpListener::from(socket))
        })
        .collect()
}

fn open(address: SocketAddr, keepalive: Keepalive) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `[::]:80` and `0.0.0.0:80` are two listeners, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&tcp_keepalive(keepalive))?;
    Ok(socket)
}

/// In the socket library's terms.
#[must_use]
pub fn tcp_keepalive(keepalive: Keepalive) -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(keepalive.idle)
        .with_interval(keepalive.interval)
        .with_retries(keepalive.probes.get())
}

/// What the kernel said to a bind, and what to do about it.
#[must_use]
pub fn explain(error: &io::Error) -> String {
    let cure = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program listens there (`ss -ltnp` names it): stop it, or bind elsewhere"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need CAP_NET_BIND_SERVICE: run as root, grant it, or bind to a higher port"
        }
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this machine has that address (`ip address` lists them)"
        }
        _ if exhausted(error) => "the process has no descriptor left: raise `ulimit -n` (LimitNOFILE)",
        _ => return error.to_string(),
    };
    format!("{error}: {cure}")
}

/// True for errors that say "no descriptor, no memory": ours, and they may pass.
#[must_use]
pub fn exhausted(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// Makes the kernel ignore new handshakes on this socket, as if their packets were lost, while those under way
/// complete. Whoever was ignored asks again after a second, and then finds the port closed or another server there.
///
/// Without it, closing would reset every connection that completes its handshake between the last accept and the close.
///
/// # Errors
/// What the kernel says; the socket then goes on as before.
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

    fn any_port() -> SocketAddr {
        "127.0.0.1:0".parse().expect("an address")
    }

    #[test]
    fn all_sockets_of_an_address_share_one_port_and_accepted_ones_inherit_their_options() {
        let sockets = bind("web", any_port(), KEEPALIVE, 3).expect("a free port");
        let address = sockets[0].local_addr().expect("bound");
        assert!(sockets.iter().all(|socket| socket.local_addr().expect("bound") == address));
        drop(sockets);

        let sockets = bind("web", address, KEEPALIVE, 1).expect("the port is free again");
        let _client = TcpStream::connect(address).expect("it listens");
        sockets[0].set_nonblocking(false).expect("a socket");
        let (accepted, _) = sockets[0].accept().expect("a client");
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().expect("tcp") && accepted.keepalive().expect("tcp"));
        assert_eq!(accepted.tcp_keepalive_time().expect("tcp"), KEEPALIVE.idle);
        assert_eq!(accepted.tcp_keepalive_interval().expect("tcp"), KEEPALIVE.interval);
        assert_eq!(accepted.tcp_keepalive_retries().expect("tcp"), KEEPALIVE.probes.get());
    }

    #[test]
    fn a_port_in_use_is_refused_even_if_its_owner_would_share_it() {
        let first = bind("web", any_port(), KEEPALIVE, 1).expect("a free port");
        let address = first[0].local_addr().expect("bound");
        let error = bind("web", address, KEEPALIVE, 1).expect_err("the port is taken").to_string();
        assert!(error.starts_with(&format!("listeners.web.bind: {address}: ")), "{error}");
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_refused_with_its_reason() {
        let address = "192.0.2.1:8080".parse().expect("an address");
        let error = bind("web", address, KEEPALIVE, 1).expect_err("not ours").to_string();
        assert!(error.contains("no interface of this machine has that address"), "{error}");
    }

    #[test]
    fn handshakes_under_way_complete_and_new_ones_are_ignored() {
        let sockets = bind("web", any_port(), KEEPALIVE, 1).expect("a free port");
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
