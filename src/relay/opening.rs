//! What the kernel may hold back at the beginning of a connection that we opened.
//!
//! Each switch is a system call, and each packet some microseconds at both ends, so both are done without where they make no
//! difference.

use std::task::Context;

use rustix::net::sockopt::set_tcp_quickack;
use socket2::Socket;

use crate::reactor;

/// What fits into one packet on every path that TCP is used on (536 bytes are the least that IPv4 hosts take).
const ONE_PACKET_BYTES: usize = 512;
/// Turns of a busy worker until a handshake is ended without bytes.
const MAX_WAITS_HELD: u8 = 3;

/// What a TCP connection that we opened may still hold back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The last packet of the handshake, which the first bytes then carry; since this turn of the worker. The backend has no
    /// connection before it.
    Handshake(u8),
    /// Nothing, since nothing was written yet.
    Unused,
    /// A small packet, until an earlier one is acknowledged (Nagle's algorithm), which a relay must never want. Nothing is held
    /// back while nothing is under way, so one small request does without the call that switches it off.
    Coalescing,
    /// Nothing.
    Over,
}

impl Opening {
    /// For a TCP socket that is about to connect.
    ///
    /// Where clients wait to be accepted, their first bytes are there by then: a packet less costs 3 % less a session. A worker that
    /// keeps up with them would pay for the switch and gain nothing.
    #[must_use]
    pub fn before_connect(socket: &Socket) -> Self {
        if reactor::is_busy() { Self::hold_handshake(socket) } else { Self::Unused }
    }

    /// Where the kernel will not, there is one packet more. It holds the handshake for 200 ms at most.
    fn hold_handshake(socket: &Socket) -> Self {
        set_tcp_quickack(socket, false).map_or(Self::Unused, |()| Self::Handshake(reactor::wait_count()))
    }

    /// Nothing is there to be written: the backend may be one who speaks first, and does not wait for longer than a few turns.
    pub(super) fn release_if_late(&mut self, socket: &Socket, cx: &Context<'_>) {
        let Self::Handshake(since) = *self else { return };
        if reactor::wait_count().wrapping_sub(since) < MAX_WAITS_HELD {
            cx.waker().wake_by_ref();
        } else {
            // A socket that takes no option is dead already, and the next read says so.
            let _ = set_tcp_quickack(socket, true);
            *self = Self::Unused;
        }
    }

    /// So many bytes are about to be written.
    pub(super) fn before_write(&mut self, socket: &Socket, bytes: usize) {
        *self = match self {
            Self::Over => return,
            Self::Handshake(_) | Self::Unused if bytes <= ONE_PACKET_BYTES => Self::Coalescing,
            Self::Handshake(_) | Self::Unused | Self::Coalescing => {
                // A socket that takes no option is dead already, and the write says so.
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

    /// A connection whose handshake is held, and where it goes.
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
    fn the_first_bytes_end_the_handshake() {
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

    /// Though nothing but time passes: a backend that speaks first must not wait for a client who waits for it.
    #[test]
    fn without_bytes_it_ends_after_a_few_turns() {
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
