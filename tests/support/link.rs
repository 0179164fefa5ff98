//! A TCP proxy in front of a server, which a scenario makes slow or silent, or lets reset connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::sleep;

use super::thread_server::ThreadServer;

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

/// A proxy to one server, on a free port. Dropping it ends it.
pub struct Link {
    pub port: u16,
    target: Arc<AtomicU16>,
    server: ThreadServer<Passing>,
}

impl Link {
    /// Starts a link to `port` of this machine.
    pub fn to(port: u16) -> Self {
        let target = Arc::new(AtomicU16::new(port));
        let targets = Arc::clone(&target);
        let server = ThreadServer::start(Passing::All, move |client, passing| {
            carry(client, targets.load(Relaxed), passing)
        });
        Self { port: server.port, target, server }
    }

    /// Leads new connections to another port.
    pub fn lead_to(&self, port: u16) {
        self.target.store(port, Relaxed);
    }

    pub fn pass(&self, passing: Passing) {
        self.server.set(passing);
    }

    /// The `url` for the `redis` section of a config.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
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
