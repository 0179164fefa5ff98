//! Reads the redirections (MOVED, ASK) of a cluster's nodes, and the addresses that a node gives for other
//! nodes.

use redis::ServerErrorKind;

use crate::config::RedisAddress;
use crate::redis::wire::error::RedisError;

/// The node that a MOVED or ASK reply names for a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Redirect {
    pub(super) to: RedisAddress,
    /// True for ASK, false for MOVED.
    pub(super) is_ask: bool,
}

impl Redirect {
    /// Reads the redirection in an `error` of `node`. Returns `None` if there is none, or none with a
    /// usable address.
    pub(super) fn of(error: &RedisError, node: &RedisAddress) -> Option<Self> {
        let (address, _) = error.redirect_node()?;
        // The last colon, because an IPv6 address comes without brackets.
        let (host, port) = address.rsplit_once(':')?;
        let to = address_beside(node, Some(host), port.parse().ok()?)?;
        Some(Self { to, is_ask: error.server_kind() == Some(ServerErrorKind::Ask) })
    }
}

/// Returns the address that `node` gives for another node. Without a `host` it is the host at which `node`
/// itself was reached. Returns `None` for the host `?`: that node should have a name and has none.
pub(super) fn address_beside(node: &RedisAddress, host: Option<&str>, port: u16) -> Option<RedisAddress> {
    let named = match host {
        Some("?") => return None,
        Some("") | None => None,
        Some(host) => Some(host.to_owned()),
    };
    match node {
        RedisAddress::Tcp { host, .. } => {
            Some(RedisAddress::Tcp { host: named.unwrap_or_else(|| host.clone()), port })
        }
        RedisAddress::Tls { host, .. } => {
            Some(RedisAddress::Tls { host: named.unwrap_or_else(|| host.clone()), port })
        }
        RedisAddress::Unix(_) | RedisAddress::Sentinel(_) | RedisAddress::Cluster(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> RedisAddress {
        RedisAddress::Tcp { host: host.into(), port }
    }

    fn redirect(answer: &[u8]) -> Option<Redirect> {
        let value = redis::parse_redis_value(answer).expect("an answer");
        Redirect::of(&value.extract_error().expect_err("an error").into(), &tcp("10.0.0.1", 7000))
    }

    #[test]
    fn a_redirection_names_a_node_or_is_none() {
        let moved = |to| Some(Redirect { to, is_ask: false });
        assert_eq!(redirect(b"-MOVED 3999 10.0.0.2:6381\r\n"), moved(tcp("10.0.0.2", 6381)));
        assert_eq!(redirect(b"-MOVED 1 ::1:7001\r\n"), moved(tcp("::1", 7001)));
        // A node that names no host is reached by the host that the asked node was reached by.
        assert_eq!(redirect(b"-MOVED 1 :7001\r\n"), moved(tcp("10.0.0.1", 7001)));
        let ask = Redirect { to: tcp("b", 7002), is_ask: true };
        assert_eq!(redirect(b"-ASK 2 b:7002\r\n"), Some(ask));
        for nowhere in ["-MOVED 1 ?:7001", "-MOVED 1", "-MOVED 1 a:b", "-ERR 1 a:7000", "-ASK x a:1"] {
            assert_eq!(redirect(format!("{nowhere}\r\n").as_bytes()), None, "{nowhere}");
        }
    }
}
