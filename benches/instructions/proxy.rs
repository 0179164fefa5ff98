//! Statera under valgrind. Client and backend are this thread, outside of valgrind, one step after the
//! other.
//!
//! Nothing happens at the same time, so that the proxy sees the same events in the same order in each run.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::time::Instant;

use super::valgrind::{Counted, Counts, Valgrind};

const SMALL_BYTES: usize = 64;
/// For each step. A session takes some milliseconds under valgrind.
const STEP_LIMIT: Duration = Duration::from_secs(10);
const START_LIMIT: Duration = Duration::from_secs(30);

/// The running proxy, with its client and its backend.
pub struct Proxy {
    counted: Counted,
    address: SocketAddr,
    backend: TcpListener,
    /// Holds the config.
    _folder: TempDir,
}

impl Proxy {
    /// Starts it with one worker, and waits until a session has gone through.
    pub fn start(valgrind: &Valgrind, statera: &Path, name: &str, logged: bool) -> Result<Self> {
        let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        SockRef::from(&backend).set_read_timeout(Some(STEP_LIMIT))?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let folder = TempDir::with_prefix("statera-instructions-")?;
        let config = folder.path().join("statera.yaml");
        std::fs::write(&config, yaml(address, backend.local_addr()?, logged))?;
        let config = config.display().to_string();
        let mut counted = valgrind.start(name, statera, &["run", "-c", &config])?;

        let begun = Instant::now();
        let client = loop {
            // While no socket listens there, the kernel may choose that very port for our end and connect us
            // to ourselves.
            if let Ok(client) = TcpStream::connect_timeout(&address, STEP_LIMIT)
                && client.local_addr()? != address
            {
                break client;
            }
            counted.check()?;
            ensure!(begun.elapsed() < START_LIMIT, "statera does not accept after {START_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(10));
        };
        let mut proxy = Self { counted, address, backend, _folder: folder };
        proxy.serve(client, 1)?;
        Ok(proxy)
    }

    /// Connect, 64 bytes there and back, close.
    pub fn session(&mut self) -> Result<()> {
        self.requests(1)
    }

    /// So many times 64 bytes there and back on one connection.
    pub fn requests(&mut self, count: u64) -> Result<()> {
        let client = TcpStream::connect_timeout(&self.address, STEP_LIMIT).context("cannot connect")?;
        self.serve(client, count)
    }

    fn serve(&mut self, mut client: TcpStream, count: u64) -> Result<()> {
        self.counted.settle()?;
        let (mut backend, _) = self.backend.accept().context("no connection arrived at the backend")?;
        for socket in [&client, &backend] {
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(STEP_LIMIT))?;
        }
        for _ in 0..count {
            self.pass(&mut client, &mut backend)?;
            self.pass(&mut backend, &mut client)?;
        }
        client.shutdown(Shutdown::Write)?;
        self.counted.settle()?;
        expect_end(&mut backend)?;
        drop(backend);
        self.counted.settle()?;
        expect_end(&mut client)
    }

    /// 64 bytes from one end to the other.
    fn pass(&mut self, from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
        from.write_all(&[7; SMALL_BYTES])?;
        self.counted.settle()?;
        let mut bytes = [0; SMALL_BYTES];
        to.read_exact(&mut bytes).context("64 bytes did not get through")
    }

    /// Ends the proxy, and returns all that it took.
    pub fn stop(self) -> Result<Counts> {
        self.counted.terminate()
    }
}

fn expect_end(socket: &mut TcpStream) -> Result<()> {
    match socket.read(&mut [0]).context("a session did not end")? {
        0 => Ok(()),
        _ => bail!("more bytes arrived than were sent"),
    }
}

fn yaml(listen: SocketAddr, backend: SocketAddr, logged: bool) -> String {
    format!(
        "workers: 1\n\
         listeners:\n  bench: {{bind: \"{listen}\", pool: backend}}\n\
         pools:\n  backend:\n    backends: {{\"{backend}\": 100}}\n    connect: {{attempts: 1}}\n\
         log: {{access: {logged}}}\n\
         # Its end is not measured.\n\
         shutdown: {{timeout: 0s}}\n"
    )
}
