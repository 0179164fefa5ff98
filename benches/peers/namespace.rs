//! A network of its own for the whole run: other programs cannot take its ports, and the system's settings
//! stay as they are.
//!
//! Where that is not allowed the run goes on in the network that is there, and says so.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

const MARK: &str = "STATERA_BENCH_NAMESPACE";

/// In here, closed connections must not use up the ports: 55,000 of them, and beyond 4,096 waiting ones
/// (TIME_WAIT) the kernel forgets the next at once. The same for all peers.
const SETTINGS: [(&str, &str); 2] =
    [("net/ipv4/ip_local_port_range", "10000 65535"), ("net/ipv4/tcp_max_tw_buckets", "4096")];

/// Starts this program again in a network namespace, or prepares the one it is in.
pub fn enter(congestion: Option<&str>) {
    match std::env::var(MARK).as_deref() {
        Ok("inside") => prepare(congestion),
        Ok(_) => {}
        Err(_) => {
            for options in [&["--net"][..], &["--net", "--user", "--map-root-user"]] {
                let allowed = Command::new("unshare")
                    .args(options)
                    .args(["ip", "link", "set", "lo", "up"])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .is_ok_and(|status| status.success());
                if allowed && let Ok(program) = std::env::current_exe() {
                    let error = Command::new("unshare")
                        .args(options)
                        .arg(program)
                        .args(std::env::args_os().skip(1))
                        .env(MARK, "inside")
                        .exec();
                    println!("cannot start again in a network of its own: {error}");
                }
            }
            println!(
                "no network of its own (root or user namespaces, and `ip` and `unshare`): ports may run out"
            );
        }
    }
}

fn prepare(congestion: Option<&str>) {
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        println!("cannot set up loopback");
    }
    let congestion = congestion.map(|name| ("net/ipv4/tcp_congestion_control", name));
    for (name, value) in SETTINGS.into_iter().chain(congestion) {
        if let Err(error) = fs::write(format!("/proc/sys/{name}"), value) {
            println!("cannot set {name} to {value}: {error}");
        }
    }
}

pub fn is_own() -> bool {
    std::env::var(MARK).is_ok_and(|mark| mark == "inside")
}
