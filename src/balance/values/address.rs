//! The address of a backend: `host:port`, `[v6]:port` or `unix:/path`, as written in Redis or in
//! config.yaml.
//!
//! Parsing refuses what cannot be connected to, and characters that must not reach a terminal or a log
//! unescaped. Names are resolved elsewhere (`names/resolve.rs`), never by the data plane.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// `sun_path` holds 108 bytes, the last of them the terminating zero.
const UNIX_PATH_MAX_BYTES: usize = 107;
/// RFC 1035, 2.3.4.
const NAME_MAX_BYTES: usize = 253;
const LABEL_MAX_BYTES: usize = 63;

/// A parsed backend address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// An IPv4 or IPv6 address and a port.
    Socket(SocketAddr),
    /// A DNS name and a port. The name is resolved again and again while the backend is in use.
    Name {
        /// The name as written.
        host: Arc<str>,
        /// 1 to 65535.
        port: u16,
    },
    /// A unix stream socket.
    Unix(PathBuf),
}

/// Why a text is not a backend address. The message says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// Nothing follows the host.
    #[error("it has no port: write host:port, [v6]:port or unix:/path")]
    NoPort,
    /// The port is not a number from 1 to 65535.
    #[error("its port is not a number from 1 to 65535")]
    BadPort,
    /// Neither an address nor a DNS name.
    #[error("its host is neither an IP address nor a DNS name")]
    BadHost,
    /// An IPv6 address without brackets is ambiguous.
    #[error("an IPv6 address needs brackets: write [v6]:port")]
    UnbracketedV6,
    /// A unix path that is relative, too long, or has characters that do not print as themselves.
    #[error(
        "its unix path must be absolute, at most 107 bytes, without spaces, quotes, backslashes and \
         characters that do not print"
    )]
    BadPath,
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        if let Some(path) = text.strip_prefix("unix:") {
            return parse_unix(path);
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (host, port) = rest.split_once("]:").ok_or(InvalidAddress::NoPort)?;
            let host: Ipv6Addr = host.parse().map_err(|_| InvalidAddress::BadHost)?;
            return Ok(Self::Socket(SocketAddr::new(IpAddr::V6(host), parse_port(port)?)));
        }
        let (host, port) = text.rsplit_once(':').ok_or(InvalidAddress::NoPort)?;
        if host.contains(':') {
            return Err(if text.parse::<Ipv6Addr>().is_ok() || host.parse::<Ipv6Addr>().is_ok() {
                InvalidAddress::UnbracketedV6
            } else {
                InvalidAddress::BadHost
            });
        }
        let port = parse_port(port)?;
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(Self::Socket(SocketAddr::new(ip, port)));
        }
        if !is_dns_name(host) {
            return Err(InvalidAddress::BadHost);
        }
        Ok(Self::Name { host: host.into(), port })
    }
}

fn parse_port(text: &str) -> Result<u16, InvalidAddress> {
    // `u16::from_str` accepts "+80", which other programs do not.
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(InvalidAddress::BadPort);
    }
    match text.parse() {
        Ok(0) | Err(_) => Err(InvalidAddress::BadPort),
        Ok(port) => Ok(port),
    }
}

fn parse_unix(path: &str) -> Result<Address, InvalidAddress> {
    let fits = path.len() <= UNIX_PATH_MAX_BYTES && Path::new(path).is_absolute();
    if !fits || !path.chars().all(reads_as_itself) {
        return Err(InvalidAddress::BadPath);
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

/// Addresses appear in log lines and metrics. A space would split a field there, and U+202E reverses the
/// rest of the line.
fn reads_as_itself(character: char) -> bool {
    !character.is_whitespace() && character.escape_debug().eq([character])
}

/// Underscores are outside RFC 1123, but container platforms give out such names. A name whose last label is
/// all digits is a mistyped IPv4 address (`10.0.0.256`), which a resolver would turn into a slow failure.
fn is_dns_name(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    let label_is_valid = |label: &str| {
        !label.is_empty()
            && label.len() <= LABEL_MAX_BYTES
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= NAME_MAX_BYTES
        && name.split('.').all(label_is_valid)
        && !last.bytes().all(|b| b.is_ascii_digit())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_as_people_write_them_are_parsed() {
        for text in [
            "10.0.0.1:80",
            "[::1]:5432",
            "[2001:db8::7]:443",
            "db.internal:5432",
            "localhost:1",
            "my_service:65535",
            "a.b.c.:80",
            "unix:/run/app.sock",
            "unix:/run/bücher@[1]~%.sock",
        ] {
            let address: Address = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn a_text_that_cannot_be_connected_to_is_refused_with_its_reason() {
        use InvalidAddress::*;
        let long_path = format!("unix:/{}", "x".repeat(107));
        let long_label = format!("{}:80", "x".repeat(64));
        for (text, expected) in [
            ("", NoPort),
            ("10.0.0.1", NoPort),
            ("[::1]", NoPort),
            ("[::1]80", NoPort),
            ("10.0.0.1:", BadPort),
            ("10.0.0.1:0", BadPort),
            ("10.0.0.1:65536", BadPort),
            ("10.0.0.1:+80", BadPort),
            ("10.0.0.1:80 ", BadPort),
            ("::1", UnbracketedV6),
            ("2001:db8::7:443", UnbracketedV6),
            ("a:b:80", BadHost),
            ("[nonsense]:80", BadHost),
            ("[fe80::1%eth0]:80", BadHost),
            (":80", BadHost),
            ("10.0.0.256:80", BadHost),
            ("-a.com:80", BadHost),
            ("a..b:80", BadHost),
            ("a\u{1b}[31m:80", BadHost),
            ("a\nb:80", BadHost),
            ("bücher.example:80", BadHost),
            (&long_label, BadHost),
            ("unix:", BadPath),
            ("unix:relative", BadPath),
            ("unix:/a\u{1b}b", BadPath),
            ("unix:/a b", BadPath),
            ("unix:/a\u{a0}b", BadPath),
            ("unix:/a\u{2028}b", BadPath),
            ("unix:/\u{202e}kcos.b", BadPath),
            ("unix:/a\u{200b}b", BadPath),
            ("unix:/\u{feff}", BadPath),
            ("unix:/a\"b", BadPath),
            ("unix:/a\\b", BadPath),
            (&long_path, BadPath),
        ] {
            assert_eq!(text.parse::<Address>(), Err(expected), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_an_accepted_text_prints_as_itself(
            text in ".{0,40}|unix:/\\PC{0,20}|[0-9.:\\[\\]]{0,40}"
        ) {
            if let Ok(address) = text.parse::<Address>() {
                let shown = address.to_string();
                prop_assert!(!shown.contains(char::is_whitespace));
                prop_assert_eq!(shown.escape_debug().to_string(), shown);
                prop_assert!(text.parse::<Address>().is_ok());
            }
        }
    }
}
