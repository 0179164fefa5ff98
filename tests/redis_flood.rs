//! A server that sends without end: the proxy closes the connection and takes no more memory than one reply
//! may have.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::support::{Backend, Program, eventually, greeting};

/// The size of one reply that the proxy accepts.
const LARGEST_REPLY: u64 = 16 << 20;
/// The most that the kernel may buffer between the server and the proxy.
const BUFFERS: u64 = 40 << 20;

/// A server that answers HELLO as Redis does, and any other command by an endless reply.
struct Flood {
    port: u16,
    connections: Arc<AtomicUsize>,
    /// The bytes that one connection took, of the connection that took the most.
    most_taken: Arc<AtomicU64>,
}

impl Flood {
    async fn start(first: &'static [u8], piece: Vec<u8>) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        // Accepted sockets inherit the buffer size.
        socket.set_send_buffer_size(64 << 10).expect("a size");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let listener: TcpListener = socket.listen(64).expect("a socket");
        let port = listener.local_addr().expect("bound").port();
        let (connections, most_taken) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let (counted, most) = (Arc::clone(&connections), Arc::clone(&most_taken));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (counted, most, piece) = (Arc::clone(&counted), Arc::clone(&most), piece.clone());
                tokio::spawn(async move {
                    let taken = flood(client, first, &piece, &most).await;
                    counted.fetch_add(usize::from(taken > 0), Relaxed);
                });
            }
        });
        Self { port, connections, most_taken }
    }
}

/// Serves one connection. Returns how many bytes the client took after the greeting.
async fn flood(mut client: TcpStream, first: &[u8], piece: &[u8], most: &AtomicU64) -> u64 {
    let mut asked = vec![0; 64 << 10];
    loop {
        let Ok(count @ 1..) = client.read(&mut asked).await else { return 0 };
        let words = String::from_utf8_lossy(&asked[..count]).to_ascii_uppercase();
        if !words.contains("HELLO") {
            break;
        }
        let commands = asked[..count].iter().filter(|byte| **byte == b'*').count();
        let greeting = b"%2\r\n+version\r\n+7.0.15\r\n+role\r\n+master\r\n".as_slice();
        let greeting = [greeting, &b"+OK\r\n".repeat(commands - 1)].concat();
        if client.write_all(&greeting).await.is_err() {
            return 0;
        }
    }
    let mut taken = 0;
    let mut next = first;
    while let Ok(count @ 1..) = client.write(next).await {
        taken += count as u64;
        most.fetch_max(taken, Relaxed);
        next = &next[count..];
        if next.is_empty() {
            next = piece;
        }
    }
    taken
}

/// The peak resident memory of the program, in bytes.
fn most_memory(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it is there");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[tokio::test]
async fn a_server_that_sends_without_end_is_disconnected_within_16_mib_whatever_it_sends() {
    let letters = vec![b'x'; 32 << 10];
    for (first, piece) in [
        (b"=-1\r\n".as_slice(), letters.clone()),
        (b"!-1\r\n", letters.clone()),
        (b"+OK\n", b"x\n".repeat(16 << 10)),
        (b"x", letters.clone()),
        (b"+", letters.clone()),
        (b"+OK\r\n", b"+OK\r\n".repeat(4 << 10)),
        (b"*1\r\n", b"*1\r\n".repeat(4 << 10)),
        (b"*400000\r\n", b"$16\r\n0123456789abcdef\r\n".repeat(1 << 10)),
    ] {
        let (server, configured) = (Flood::start(first, piece).await, Backend::named("configured").await);
        let program = Program::run(&format!(
            "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
             pools: {{web: {{weights_key: servers, backends: {{\"{}\": 1}}}}}}\nlua_pick: {{enabled: false}}\n\
             redis: {{url: \"redis://127.0.0.1:{}/0\", connect_timeout: 10s, response_timeout: 10s}}\n",
            configured.address, server.port
        ));
        let shown = first.escape_ascii().to_string();
        eventually(&format!("{shown}: two connections end"), || async {
            let taken = server.most_taken.load(Relaxed);
            assert!(taken <= LARGEST_REPLY + BUFFERS, "{shown}: {taken} bytes are taken");
            server.connections.load(Relaxed) >= 2
        })
        .await;
        let memory = most_memory(&program);
        assert!(memory < 160 << 20, "{shown}: {} MiB", memory >> 20);
        let address = program.address().await;
        assert_eq!(greeting(address).await.expect("an answer"), "configured", "{shown}");
    }
}
