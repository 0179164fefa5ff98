//! Packets that the kernel may hold back at the beginning of a connection to a backend.
//!
//! TCP_QUICKACK controls the last packet of the handshake, TCP_NODELAY controls small packets. Each switch
//! costs a system call, and each packet some microseconds at both ends. So a switch is set, and a packet is
//! sent, only where that makes a difference.

use std::task::Context;

use rustix::net::sockopt::set_tcp_quickack;
use socket2::Socket;

use crate::reactor;

/// Bytes that fit into one packet on every path: IPv4 hosts must accept a segment of 536 bytes.
const ONE_PACKET_BYTES: usize = 512;
/// The number of waits for events after which a held handshake is completed without bytes.
const MAX_WAITS_HELD: u8 = 3;

/// What the kernel may still hold back of a TCP connection to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The last packet of the handshake. The first bytes will carry it; until then the backend does not see
    /// the connection. Holds [`reactor::wait_count`] at the connect.
    Handshake(u8),
    /// Nothing, because nothing was written yet.
    Unused,
    /// The next small packet, until the one before is acknowledged (Nagle's algorithm). A relay must not
    /// wait for that. But the first packet is never held back, so a session with one small request needs no
    /// call to switch it off.
    Coalescing,
    /// Nothing any more.
    Over,
}

impl Opening {
    /// Prepares a TCP socket that is about to connect.
    ///
    /// A busy worker holds the handshake's last packet: its clients have waited in the accept queue, so
    /// their first bytes have probably arrived and can carry that packet. One packet less saves 3 % of a
    /// session's cost. A worker that is not busy would only pay for the system call.
    #[must_use]
    pub fn before_connect(socket: &Socket) -> Self {
        if reactor::is_busy() { Self::hold_handshake(socket) } else { Self::Unused }
    }

    /// Switches off TCP_QUICKACK. The kernel then delays the last packet of the handshake for up to 200 ms.
    /// If the call fails, the packet is sent at once.
    fn hold_handshake(socket: &Socket) -> Self {
        set_tcp_quickack(socket, false).map_or(Self::Unused, |()| Self::Handshake(reactor::wait_count()))
    }

    /// Completes a held handshake if no bytes came within [`MAX_WAITS_HELD`] waits: the backend may be the
    /// side that speaks first. Called while there is nothing to write.
    pub(super) fn release_if_late(&mut self, socket: &Socket, cx: &Context<'_>) {
        let Self::Handshake(since) = *self else { return };
        if reactor::wait_count().wrapping_sub(since) < MAX_WAITS_HELD {
            cx.waker().wake_by_ref();
        } else {
            // If the call fails, the connection is broken, and the next read reports it.
            let _ = set_tcp_quickack(socket, true);
            *self = Self::Unused;
        }
    }

    /// Called before `bytes` bytes are written: the first write ends a held handshake, the second one (or a
    /// large first one) switches off Nagle's algorithm.
    pub(super) fn before_write(&mut self, socket: &Socket, bytes: usize) {
        *self = match self {
            Self::Over => return,
            Self::Handshake(_) | Self::Unused if bytes <= ONE_PACKET_BYTES => Self::Coalescing,
            Self::Handshake(_) | Self::Unused | Self::Coalescing => {
                // If the call fails, the connection is broken, and the write reports it.
                let _ = socket.set_tcp_nodelay(true);
                Self::Over
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _};
    use std::net::TcpListener;
    use std::time::Duration;

    use socket2::{Domain, Type};
    use tokio::sync::oneshot;

    use super::*;
    use crate::reactor::{Runtime, sleep, spawn};
    use crate::relay::socket::StreamSocket;
    use crate::relay::stream::Stream;

    /// A connection whose handshake is held, and the listener that it goes to.
    async fn held() -> (Stream, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).expect("a descriptor");
        let opening = Opening::hold_handshake(&socket);
        assert!(matches!(opening, Opening::Handshake(_)), "{opening:?}");
        let address = listener.local_addr().expect("bound").into();
        let _ = socket.connect(&address).inspect_err(|error| assert_eq!(error.raw_os_error(), Some(115)));
        let socket = StreamSocket::tcp(socket).expect("a reactor");
        socket.connected().await.expect("it listens");
        let error = listener.accept().expect_err("we are connected, and the backend is not yet");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        (Stream::opened(socket, opening), listener)
    }

    #[test]
    fn the_first_bytes_complete_the_handshake() {
        Runtime::new().expect("descriptors").block_on(async {
            let (mut stream, listener) = held().await;
            let written = std::future::poll_fn(|cx| stream.poll_write(cx, b"hello")).await;
            assert_eq!(written.expect("room"), 5);
            let (mut peer, _) = listener.accept().expect("it came with the bytes");
            let mut bytes = [0; 5];
            peer.read_exact(&mut bytes).expect("they are there");
            assert_eq!((&bytes, stream.opening()), (b"hello", Opening::Coalescing));
        });
    }

    /// A backend that speaks first must not wait for a client that waits for it.
    #[test]
    fn without_bytes_the_handshake_completes_after_a_few_waits() {
        Runtime::new().expect("descriptors").block_on(async {
            let (mut stream, listener) = held().await;
            let (tell, waiting) = oneshot::channel();
            spawn(async move {
                let accepted = std::future::poll_fn(|cx| {
                    stream.poll_opening(cx);
                    if stream.opening() == Opening::Unused {
                        listener.accept().ok().into()
                    } else {
                        std::task::Poll::Pending
                    }
                });
                tell.send(accepted.await).expect("it is waited for");
            });
            let limit = async {
                sleep(Duration::from_secs(20)).await;
                None
            };
            let accepted = tokio::select! {
                accepted = waiting => accepted.expect("it ends"),
                late = limit => late,
            };
            assert!(accepted.is_some(), "the kernel alone would have ended it after 200 ms");
        });
    }
}
