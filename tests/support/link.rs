//! A TCP proxy in front of a server, which a scenario makes slow or silent, or lets reset connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

/// What the link does with the bytes it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// Everything passes.
    All,
    /// Nothing passes: open connections stay open, new ones are accepted and get no byte.
    Nothing,
    /// Nothing passes on connections that have ever sent SUBSCRIBE: the one by which Statera watches its
    /// keys.
    AllButTheWatch,
    /// Answers are delayed by this time.
    Late(Duration),
    /// Every connection is reset, also each new one.
    Resets,
}

/// A proxy to one server, on a free port. It runs in its own thread, since a proxy that starts blocks the
/// scenario's thread. Dropping it ends it.
pub struct Link {
    pub port: u16,
    target: Arc<AtomicU16>,
    passing: watch::Sender<Passing>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Starts a link to `port` of this machine.
    pub fn to(port: u16) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let own_port = listener.local_addr().expect("bound").port();
        let (passing, mut passings) = watch::channel(Passing::All);
        let target = Arc::new(AtomicU16::new(port));
        let targets = Arc::clone(&target);
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                listener.set_nonblocking(true).expect("a socket");
                let listener = TcpListener::from_std(listener).expect("a socket");
                let connections = passings.clone();
                let accepting = async {
                    while let Ok((client, _)) = listener.accept().await {
                        tokio::spawn(carry(client, targets.load(Relaxed), connections.clone()));
                    }
                };
                tokio::select! {
                    () = accepting => {}
                    // The wait fails when the link is dropped.
                    _ = passings.wait_for(|_| false) => {}
                }
            });
        });
        Self { port: own_port, target, passing, thread: Some(thread) }
    }

    /// Leads new connections to another port.
    pub fn lead_to(&self, port: u16) {
        self.target.store(port, Relaxed);
    }

    pub fn pass(&self, passing: Passing) {
        self.passing.send_replace(passing);
    }

    /// The `url` for the `redis` section of a config.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.passing = watch::channel(Passing::Nothing).0;
        if let Some(thread) = self.thread.take() {
            // If the thread panicked, it has printed why.
            let _ = thread.join();
        }
    }
}

async fn carry(mut client: TcpStream, port: u16, passing: watch::Receiver<Passing>) {
    let mut resets = passing.clone();
    let is_watch = AtomicBool::new(false);
    let relay = async {
        let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
        let (client_reads, client_writes) = client.split();
        let (server_reads, server_writes) = server.split();
        // The first end of either side ends both: the protocols that pass here have no half-close.
        tokio::select! {
            () = pump(client_reads, server_writes, passing.clone(), &is_watch, true) => {}
            () = pump(server_reads, client_writes, passing.clone(), &is_watch, false) => {}
        }
    };
    let reset = tokio::select! {
        () = relay => false,
        _ = resets.wait_for(|passing| *passing == Passing::Resets) => true,
    };
    if reset {
        client.set_zero_linger().expect("a socket");
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut passing: watch::Receiver<Passing>,
    is_watch: &AtomicBool,
    from_client: bool,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let bytes = &buffer[..count];
        if from_client && bytes.windows(9).any(|word| word.eq_ignore_ascii_case(b"SUBSCRIBE")) {
            is_watch.store(true, Relaxed);
        }
        let holds = |passing: &Passing| match passing {
            Passing::Nothing => true,
            Passing::AllButTheWatch => is_watch.load(Relaxed),
            Passing::All | Passing::Late(_) | Passing::Resets => false,
        };
        let Ok(now) = passing.wait_for(|passing| !holds(passing)).await.map(|passing| *passing) else {
            return;
        };
        if let (Passing::Late(by), false) = (now, from_client) {
            sleep(by).await;
        }
        if to.write_all(bytes).await.is_err() {
            return;
        }
    }
}
