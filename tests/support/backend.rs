//! Backends whose behaviour a scenario scripts.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

/// A TCP server in this process, by default on a free port of 127.0.0.1. Dropping it closes its listener.
pub struct Backend {
    pub address: SocketAddr,
    accepted: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Backend {
    /// Starts a server that runs `script` for each connection.
    pub async fn start<F>(script: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), script).await
    }

    /// [`Backend::start`] at a given address.
    pub async fn start_at<F>(address: SocketAddr, script: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let accepted = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Relaxed);
                tokio::spawn(script(stream));
            }
        });
        Self { address, accepted, task }
    }

    /// Sends back the bytes it gets, until the client ends its half of the connection.
    pub async fn echo() -> Self {
        Self::echo_at("127.0.0.1:0".parse().expect("an address")).await
    }

    /// [`Backend::echo`] at a given address.
    pub async fn echo_at(address: SocketAddr) -> Self {
        Self::start_at(address, |mut stream| async move {
            let (mut reader, mut writer) = stream.split();
            // A scenario may reset the client, which fails the copy.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        })
        .await
    }

    /// Sends `name` to each client and closes.
    pub async fn named(name: &'static str) -> Self {
        Self::named_at("127.0.0.1:0".parse().expect("an address"), name).await
    }

    /// [`Backend::named`] at a given address.
    pub async fn named_at(address: SocketAddr, name: &'static str) -> Self {
        Self::start_at(address, move |mut stream| async move {
            let _ = stream.write_all(name.as_bytes()).await;
        })
        .await
    }

    /// How many connections it has accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Relaxed)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The setting `backends` of a pool, with each address at weight 1.
pub fn backends(addresses: &[SocketAddr]) -> String {
    let members: Vec<_> = addresses.iter().map(|address| format!("\"{address}\": 1")).collect();
    format!("backends: {{{}}}", members.join(", "))
}

/// An address of this machine where nothing listens. No other program gets the port while the socket is
/// open.
pub fn dead_address() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a descriptor");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
    let address = socket.local_addr().expect("bound");
    (socket, address)
}

/// The address of a server that does not answer handshakes: its accept queue is full, and stays full until
/// the guard is dropped.
pub async fn silent_address() -> (impl Sized, SocketAddr) {
    silent_at("127.0.0.1:0".parse().expect("an address")).await
}

/// [`silent_address`] at a given address.
pub async fn silent_at(address: SocketAddr) -> (impl Sized, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a descriptor");
    socket.bind(address).expect("a free port");
    let listener = socket.listen(1).expect("listens");
    let address = listener.local_addr().expect("bound");
    let mut queued = Vec::new();
    while let Ok(connected) =
        tokio::time::timeout(std::time::Duration::from_millis(300), TcpStream::connect(address)).await
    {
        queued.push(connected.expect("it listens"));
        assert!(queued.len() < 100, "the accept queue never fills");
    }
    ((listener, queued), address)
}
