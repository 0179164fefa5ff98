//! Both ends of a session in one hand: the scenario is the client, and it is the backend.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Instant, timeout};

use super::{PATIENCE, Proxy};

/// What kind of socket a backend listens on, and what its sessions have behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Unix,
    /// TCP, and a session is handed over when so much has gone through it both ways that both directions splice.
    Spliced,
}

/// A connected socket of either kind.
#[derive(Debug)]
pub enum Peer {
    Tcp(TcpStream),
    Unix(UnixStream),
}

enum Listening {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _folder: TempDir },
}

/// A proxy whose one backend is the scenario itself.
pub struct Pair {
    pub proxy: Proxy,
    backend: Listening,
    kind: Kind,
    /// What went to the backend and to the client before the session was handed over.
    warm_up_bytes: Cell<(u64, u64)>,
}

/// Waits for what must happen; panics where it does not within [`PATIENCE`].
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

impl Pair {
    /// A pool of one backend of that kind; `pool` are further settings: `idle_timeout: 1s`.
    pub async fn new(kind: Kind, pool: &str) -> Self {
        let (backend, address) = match kind {
            Kind::Tcp | Kind::Spliced => {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                let address = listener.local_addr().expect("bound").to_string();
                (Listening::Tcp(listener), address)
            }
            Kind::Unix => {
                let folder = TempDir::new().expect("a folder");
                let path = folder.path().join("backend.sock");
                let listener = UnixListener::bind(&path).expect("a free path");
                (Listening::Unix { listener, _folder: folder }, format!("unix:{}", path.display()))
            }
        };
        let separator = if pool.is_empty() { "" } else { ", " };
        let proxy = Proxy::web("", &format!("backends: {{\"{address}\": 1}}{separator}{pool}"));
        Self { proxy, backend, kind, warm_up_bytes: Cell::default() }
    }

    /// The next connection that the backend gets.
    pub async fn accept(&self) -> Peer {
        soon("the backend gets the session", async {
            match &self.backend {
                Listening::Tcp(listener) => Peer::Tcp(listener.accept().await.expect("a connection").0),
                Listening::Unix { listener, .. } => {
                    Peer::Unix(listener.accept().await.expect("a connection").0)
                }
            }
        })
        .await
    }

    /// A new session: its client and its backend.
    pub async fn session(&self) -> (Peer, Peer) {
        let mut client = Peer::connect(self.proxy.address()).await;
        let mut backend = self.accept().await;
        if self.kind == Kind::Spliced {
            let to_backend = splices(&mut client, &mut backend).await;
            let to_client = splices(&mut backend, &mut client).await;
            self.warm_up_bytes.set((to_backend, to_client));
        }
        (client, backend)
    }

    /// The backend's port, or 0.
    pub fn backend_port(&self) -> u16 {
        match &self.backend {
            Listening::Tcp(listener) => listener.local_addr().expect("bound").port(),
            Listening::Unix { .. } => 0,
        }
    }

    /// The session line of the only session, once it has ended. It counts the bytes since [`Pair::session`].
    pub async fn line(&self) -> serde_json::Value {
        super::eventually("the session is logged", || async { self.proxy.access_lines().len() == 1 }).await;
        let mut line = self.proxy.access_lines().remove(0);
        let (to_backend, to_client) = self.warm_up_bytes.get();
        for (name, before) in [("bytes_in", to_backend), ("bytes_out", to_client)] {
            line[name] = (line[name].as_u64().expect("a number") - before).into();
        }
        line
    }
}

/// Sends until a pipe of the proxy in this process holds some of it, then lets all through. Returns how many bytes that
/// were. With other tests in the same process (nextest runs each in its own) the pipe may be one of theirs.
async fn splices(writer: &mut Peer, reader: &mut Peer) -> u64 {
    let pattern = Pattern::new(0);
    let (read, sent) = writer.stuff_a_pipe(reader, &pattern, std::process::id()).await;
    pattern.expect_between(reader, read, sent).await;
    sent
}

impl Peer {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = soon("the client connects", TcpStream::connect(address)).await.expect("it listens");
        stream.set_nodelay(true).expect("tcp");
        Self::Tcp(stream)
    }

    pub async fn say(&mut self, bytes: &[u8]) {
        soon("bytes are taken", self.write_all(bytes)).await.expect("connected");
    }

    /// Sends a pattern until nobody takes any more, at most `most` bytes. Returns how many were taken. That the writer is
    /// held back for good is not certain after a pause of its progress, only likely.
    pub async fn stuff(&mut self, pattern: &Pattern, most: u64) -> u64 {
        self.stuff_from(pattern, 0, most).await
    }

    /// Sends a pattern until a pipe of the process `pid` holds bytes of it, now. Returns how many were read and how many taken.
    /// Nobody reads, unless that comes to a stop without a pipe; see [`Peer::stall_in_a_pipe`].
    pub async fn stuff_a_pipe(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        pattern: &Pattern,
        pid: u32,
    ) -> (u64, u64) {
        // By then it is bulk: two full reads were made.
        const LEAST_BYTES: u64 = 1024 * 1024;
        const STOP: Duration = Duration::from_millis(300);
        let (mut read, mut sent) = (0, 0);
        let deadline = Instant::now() + PATIENCE;
        let mut progress = Instant::now();
        while sent < LEAST_BYTES || super::piped_bytes(pid).is_empty() {
            assert!(Instant::now() < deadline, "{sent} bytes are not spliced");
            // Held back, it looks again whether that is by a pipe.
            let write = timeout(Duration::from_millis(10), self.write(pattern.from(sent, u64::MAX))).await;
            if let Ok(written) = write {
                sent += written.expect("connected") as u64;
                progress = Instant::now();
            } else if progress.elapsed() > STOP {
                pattern.expect_between(reader, read, sent).await;
                read = sent;
            }
        }
        (read, sent)
    }

    /// Sends a pattern from `start` on that nobody reads, until it is held back while a pipe of the process `pid` holds some of
    /// it. Returns the places that were read and sent up to.
    ///
    /// A sender that happened to be slow just before is no bulk, and held back without a pipe: then all of it is read, and it
    /// begins anew.
    pub async fn stall_in_a_pipe(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        pattern: &Pattern,
        start: u64,
        pid: u32,
    ) -> (u64, u64) {
        const MOST_BYTES: u64 = 96 * 1024 * 1024;
        let mut read = start;
        for _ in 0..20 {
            let sent = self.stuff_from(pattern, read, read + MOST_BYTES).await;
            assert!(sent < read + MOST_BYTES, "{sent} bytes were taken that nobody reads");
            if !super::piped_bytes(pid).is_empty() {
                return (read, sent);
            }
            pattern.expect_between(reader, read, sent).await;
            read = sent;
        }
        panic!("{read} bytes are not spliced");
    }

    /// The same as [`Peer::stuff`], from one place to another. Returns the place that it got to.
    pub async fn stuff_from(&mut self, pattern: &Pattern, start: u64, end: u64) -> u64 {
        let mut place = start;
        while place < end {
            let write = self.write(pattern.from(place, end - place));
            match timeout(Duration::from_millis(500), write).await {
                Ok(written) => place += written.expect("connected") as u64,
                Err(_) => break,
            }
        }
        place
    }

    /// The next bytes are these.
    pub async fn hears(&mut self, bytes: &[u8]) {
        let mut heard = vec![0; bytes.len()];
        soon("bytes arrive", self.read_exact(&mut heard)).await.expect("connected");
        assert_eq!(String::from_utf8_lossy(&heard), String::from_utf8_lossy(bytes));
    }

    /// Ends the half that it writes.
    pub async fn end(&mut self) {
        self.shutdown().await.expect("connected");
    }

    /// Nothing more comes, and that is said cleanly.
    pub async fn hears_the_end(&mut self) {
        let (bytes, result) = self.rest().await;
        assert_eq!((String::from_utf8_lossy(&bytes), result.expect("a clean end")), ("".into(), ()));
    }

    /// Nothing more comes, since the connection was reset.
    pub async fn hears_a_reset(&mut self) {
        let (bytes, result) = self.rest().await;
        let error = result.expect_err("a reset, not a clean end");
        assert_eq!((bytes.len(), error.kind()), (0, io::ErrorKind::ConnectionReset));
    }

    /// All that still comes, and how that ends.
    pub async fn rest(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut bytes = Vec::new();
        let result = soon("the other side ends", self.read_to_end(&mut bytes)).await.map(drop);
        (bytes, result)
    }

    /// TCP: resets the connection, whatever it holds. Unix sockets know a reset only as what the kernel says when one
    /// is closed over unread bytes, so the other side must have sent some.
    pub fn reset(self) {
        if let Self::Tcp(stream) = &self {
            SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("tcp");
        }
    }

    /// TCP, before any byte: lets hardly more be under way than the 64 KiB that every connection begins with. The kernel
    /// would drop what it has granted room for if that were less.
    pub fn shrink_buffers(&self) {
        if let Self::Tcp(stream) = self {
            SockRef::from(stream).set_recv_buffer_size(65_536).expect("tcp");
            SockRef::from(stream).set_send_buffer_size(4_096).expect("tcp");
        }
    }

    /// The next bytes and the end of this half leave in one packet.
    pub async fn say_and_end(&mut self, bytes: &[u8]) {
        if let Self::Tcp(stream) = self {
            SockRef::from(&*stream).set_tcp_cork(true).expect("tcp");
        }
        self.say(bytes).await;
        self.end().await;
    }
}

impl AsyncRead for Peer {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Peer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Bytes that tell their place: a random block whose length is a prime, over and over. What is lost, doubled or out of
/// order does not compare equal.
pub struct Pattern {
    /// Twice the block, so that any window of one block's length can be borrowed.
    blocks: Vec<u8>,
}

const BLOCK_BYTES: usize = 262_139;

impl Pattern {
    pub fn new(seed: u64) -> Self {
        let mut blocks = vec![0; BLOCK_BYTES];
        fastrand::Rng::with_seed(seed).fill(&mut blocks);
        blocks.extend_from_within(..);
        Self { blocks }
    }

    /// At most `length` bytes of it from `place` on; at least one.
    pub fn from(&self, place: u64, length: u64) -> &[u8] {
        let start = usize::try_from(place % BLOCK_BYTES as u64).expect("small");
        let length = usize::try_from(length.min(BLOCK_BYTES as u64)).expect("small");
        &self.blocks[start..start + length]
    }

    /// Writes its first `total` bytes. Each piece of progress has [`PATIENCE`].
    pub async fn send(&self, writer: &mut (impl AsyncWrite + Unpin), total: u64) {
        self.send_between(writer, 0, total).await;
    }

    pub async fn send_between(&self, writer: &mut (impl AsyncWrite + Unpin), start: u64, end: u64) {
        let mut place = start;
        while place < end {
            let write = writer.write(self.from(place, end - place));
            place += soon("a writer gets on", write).await.expect("connected") as u64;
        }
    }

    /// Reads `total` bytes and compares each.
    pub async fn expect(&self, reader: &mut (impl AsyncRead + Unpin), total: u64) {
        self.expect_between(reader, 0, total).await;
    }

    pub async fn expect_between(&self, reader: &mut (impl AsyncRead + Unpin), start: u64, end: u64) {
        let mut buffer = vec![0; BLOCK_BYTES];
        let mut place = start;
        while place < end {
            let room = self.from(place, end - place).len();
            let count = soon("bytes arrive", reader.read(&mut buffer[..room])).await.expect("connected");
            assert!(count > 0, "it ended after {place} of {end} bytes");
            assert!(
                buffer[..count] == *self.from(place, count as u64),
                "wrong bytes between {place} and +{count}"
            );
            place += count as u64;
        }
    }
}
