//! Free ports for programs that cannot take port 0.
//!
//! A port that the kernel gave for port 0 and that was closed again may go to another test, or to an outgoing connection,
//! before the program has bound it. These ports cannot: they lie below the range that the kernel gives away, and each is
//! reserved among all test processes by an abstract unix socket, which the kernel drops when the process ends.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Mutex;

/// Below 32768, where Linux begins to give ports away, and 10,000 above it are free for the bus of a cluster's node.
const PORTS: std::ops::Range<u16> = 12_000..22_000;
const TRIES: usize = 1_000;

/// Kept to the end of this process.
static RESERVED: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port of 127.0.0.1 that is free, and that no other test is given while this process lives.
pub fn free_port() -> u16 {
    for _ in 0..TRIES {
        let port = fastrand::u16(PORTS);
        let name = SocketAddr::from_abstract_name(format!("statera-test-port-{port}")).expect("a short name");
        let Ok(reservation) = UnixListener::bind_addr(&name) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            RESERVED.lock().expect("no test panics with the lock").push(reservation);
            return port;
        }
    }
    panic!("no port of {PORTS:?} is free: {TRIES} were tried");
}
