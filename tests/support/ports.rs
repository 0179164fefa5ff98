//! Free ports for programs that cannot take port 0.
//!
//! A port that the kernel chose for port 0 and that was closed again can go to another test, or to an
//! outgoing connection, before the program binds it. The ports of this file cannot: they are below the range
//! that the kernel chooses from, and an abstract unix socket reserves each among all test processes. The
//! kernel drops that socket when the process ends.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Mutex;

/// Linux chooses ports from 32,768 on. The bus of a cluster's node uses the port 10,000 above its own.
const PORTS: std::ops::Range<u16> = 12_000..22_000;
const TRIES: usize = 1_000;

/// The reservations of this process, held until it ends.
static RESERVED: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A free port of 127.0.0.1, which no other test gets while this process runs.
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
