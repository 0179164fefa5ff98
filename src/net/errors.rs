//! What the errors of socket calls mean, and what the operator can do about them.

use std::io;

/// Returns the text of an error of `bind`, with what to do about it.
#[must_use]
pub fn explain(error: &io::Error) -> String {
    let cure = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program listens there (`ss -ltnp` names it): stop it, or bind elsewhere"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need CAP_NET_BIND_SERVICE: run as root, grant it, or bind to a higher port"
        }
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this machine has that address (`ip address` lists them)"
        }
        _ if exhausted(error) => "the process has no descriptor left: raise `ulimit -n` (LimitNOFILE)",
        _ => return error.to_string(),
    };
    format!("{error}: {cure}")
}

/// True for errors that mean "no descriptor", "no memory" or "no more epoll watches" (ENOSPC). Such a
/// shortage is local and may pass; the peer is not at fault.
#[must_use]
pub fn exhausted(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::NOSPC)
    )
}
