//! Lets one scenario play both ends of a session, the client and the backend.

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

/// The kind of socket a backend listens on, and whether its sessions splice when a scenario gets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Unix,
    /// TCP. A session is handed over when enough bytes have passed in both directions that both splice.
    Spliced,
}

/// A connected socket of either kind.
#[derive(Debug)]
pub enum Peer {
    Tcp(TcpStream),
    Unix(UnixStream),
}

enum BackendListener {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _folder: TempDir },
}

/// A proxy whose only backend is the scenario itself.
pub struct Pair {
    pub proxy: Proxy,
    backend: BackendListener,
    kind: Kind,
    /// The bytes that went to the backend and to the client before the session was handed over.
    warm_up_bytes: Cell<(u64, u64)>,
}

/// Waits for `future`; panics with `what` when it does not end within [`PATIENCE`].
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

impl Pair {
    /// Starts a proxy with one pool of one backend. `pool` has more settings, such as `idle_timeout: 1s`.
    pub async fn new(kind: Kind, pool: &str) -> Self {
        let (backend, address) = match kind {
            Kind::Tcp | Kind::Spliced => {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                let address = listener.local_addr().expect("bound").to_string();
                (BackendListener::Tcp(listener), address)
            }
            Kind::Unix => {
                let folder = TempDir::new().expect("a folder");
                let path = folder.path().join("backend.sock");
                let listener = UnixListener::bind(&path).expect("a free path");
                (BackendListener::Unix { listener, _folder: folder }, format!("unix:{}", path.display()))
            }
        };
        let separator = if pool.is_empty() { "" } else { ", " };
        let proxy = Proxy::web("", &format!("backends: {{\"{address}\": 1}}{separator}{pool}"));
        Self { proxy, backend, kind, warm_up_bytes: Cell::default() }
    }

    /// Accepts the next connection to the backend.
    pub async fn accept(&self) -> Peer {
        soon("the backend gets the session", async {
            match &self.backend {
                BackendListener::Tcp(listener) => Peer::Tcp(listener.accept().await.expect("a connection").0),
                BackendListener::Unix { listener, .. } => {
                    Peer::Unix(listener.accept().await.expect("a connection").0)
                }
            }
        })
        .await
    }

    /// Opens a new session. Returns its client and its backend.
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
            BackendListener::Tcp(listener) => listener.local_addr().expect("bound").port(),
            BackendListener::Unix { .. } => 0,
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

/// Sends until a pipe of the proxy in this process holds bytes, then reads all of them. Returns how many
/// bytes were sent. When other tests run in the same process (nextest gives each its own), the pipe may
/// belong to one of them.
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
        soon("the socket takes the bytes", self.write_all(bytes)).await.expect("connected");
    }

    /// Sends a pattern until the socket takes no more, at most `most` bytes. Returns how many bytes it took.
    /// If the socket takes nothing for 500 ms, the writer counts as held back, which is likely but not
    /// certain.
    pub async fn stuff(&mut self, pattern: &Pattern, most: u64) -> u64 {
        self.stuff_from(pattern, 0, most).await
    }

    /// Sends a pattern until a pipe of the process `pid` holds bytes of it. Returns how many bytes were read
    /// and how many were sent. The reader reads only when the writer is held back and no pipe holds bytes:
    /// see [`Peer::stall_in_a_pipe`].
    pub async fn stuff_a_pipe(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        pattern: &Pattern,
        pid: u32,
    ) -> (u64, u64) {
        // After so many bytes the flow is bulk: the proxy has made two full reads.
        const LEAST_BYTES: u64 = 1024 * 1024;
        const STOP: Duration = Duration::from_millis(300);
        let (mut read, mut sent) = (0, 0);
        let deadline = Instant::now() + PATIENCE;
        let mut progress = Instant::now();
        while sent < LEAST_BYTES || super::piped_bytes(pid).is_empty() {
            assert!(Instant::now() < deadline, "{sent} bytes are not spliced");
            // While the writer is held back, the loop looks again whether a pipe holds bytes.
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

    /// Sends a pattern from `start` on without reading it, until the writer is held back while a pipe of the
    /// process `pid` holds bytes of it. Returns the positions up to which bytes were read and sent.
    ///
    /// If the writer was slow at the beginning, the proxy does not splice, and the writer is held back
    /// without a pipe. Then the reader reads all bytes, and the writer begins again.
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
            assert!(sent < read + MOST_BYTES, "{sent} bytes were taken, and no reader reads them");
            if !super::piped_bytes(pid).is_empty() {
                return (read, sent);
            }
            pattern.expect_between(reader, read, sent).await;
            read = sent;
        }
        panic!("{read} bytes are not spliced");
    }

    /// [`Peer::stuff`] from position `start` to `end` of the pattern. Returns the position it got to.
    pub async fn stuff_from(&mut self, pattern: &Pattern, start: u64, end: u64) -> u64 {
        let mut position = start;
        while position < end {
            let write = self.write(pattern.from(position, end - position));
            match timeout(Duration::from_millis(500), write).await {
                Ok(written) => position += written.expect("connected") as u64,
                Err(_) => break,
            }
        }
        position
    }

    /// Reads and checks the next bytes.
    pub async fn hears(&mut self, bytes: &[u8]) {
        let mut heard = vec![0; bytes.len()];
        soon("bytes arrive", self.read_exact(&mut heard)).await.expect("connected");
        assert_eq!(String::from_utf8_lossy(&heard), String::from_utf8_lossy(bytes));
    }

    /// Ends its half of the connection: it sends nothing more.
    pub async fn end(&mut self) {
        self.shutdown().await.expect("connected");
    }

    /// Checks that nothing more comes and that the other side ended cleanly.
    pub async fn hears_the_end(&mut self) {
        let (bytes, result) = self.rest().await;
        assert_eq!((String::from_utf8_lossy(&bytes), result.expect("a clean end")), ("".into(), ()));
    }

    /// Checks that nothing more comes and that the connection was reset.
    pub async fn hears_a_reset(&mut self) {
        let (bytes, result) = self.rest().await;
        let error = result.expect_err("a reset, not a clean end");
        assert_eq!((bytes.len(), error.kind()), (0, io::ErrorKind::ConnectionReset));
    }

    /// Reads all bytes that still come. Returns them, and how the connection ended.
    pub async fn rest(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut bytes = Vec::new();
        let result = soon("the other side ends", self.read_to_end(&mut bytes)).await.map(drop);
        (bytes, result)
    }

    /// Resets the connection. For TCP that always works. A unix socket is reset only when it is closed with
    /// unread bytes, so the other side must have sent some.
    pub fn reset(self) {
        if let Self::Tcp(stream) = &self {
            SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("tcp");
        }
    }

    /// Limits the bytes under way to little more than 64 KiB, with which every connection begins. For TCP;
    /// call it before any byte is sent. With a smaller receive buffer the kernel would drop bytes for which
    /// it has announced room.
    pub fn shrink_buffers(&self) {
        if let Self::Tcp(stream) = self {
            SockRef::from(stream).set_recv_buffer_size(65_536).expect("tcp");
            SockRef::from(stream).set_send_buffer_size(4_096).expect("tcp");
        }
    }

    /// Sends bytes and the end of its half in one packet.
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

/// A byte stream in which lost, doubled and reordered bytes are noticed: a random block whose length is a
/// prime, repeated.
pub struct Pattern {
    /// The block twice, so that a slice of a block's length can begin at any of its bytes.
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

    /// The bytes from `position` on: at most `length`, at least one.
    pub fn from(&self, position: u64, length: u64) -> &[u8] {
        let start = usize::try_from(position % BLOCK_BYTES as u64).expect("small");
        let length = usize::try_from(length.min(BLOCK_BYTES as u64)).expect("small");
        &self.blocks[start..start + length]
    }

    /// Writes its first `total` bytes. Each write may take up to [`PATIENCE`].
    pub async fn send(&self, writer: &mut (impl AsyncWrite + Unpin), total: u64) {
        self.send_between(writer, 0, total).await;
    }

    pub async fn send_between(&self, writer: &mut (impl AsyncWrite + Unpin), start: u64, end: u64) {
        let mut position = start;
        while position < end {
            let write = writer.write(self.from(position, end - position));
            position += soon("the writer makes progress", write).await.expect("connected") as u64;
        }
    }

    /// Reads `total` bytes and compares each with the pattern.
    pub async fn expect(&self, reader: &mut (impl AsyncRead + Unpin), total: u64) {
        self.expect_between(reader, 0, total).await;
    }

    pub async fn expect_between(&self, reader: &mut (impl AsyncRead + Unpin), start: u64, end: u64) {
        let mut buffer = vec![0; BLOCK_BYTES];
        let mut position = start;
        while position < end {
            let room = self.from(position, end - position).len();
            let count = soon("bytes arrive", reader.read(&mut buffer[..room])).await.expect("connected");
            assert!(count > 0, "the stream ended after {position} of {end} bytes");
            assert!(
                buffer[..count] == *self.from(position, count as u64),
                "wrong bytes between {position} and +{count}"
            );
            position += count as u64;
        }
    }
}
