//! `redis.url`: `redis://[user[:password]@]host[:port][/db]`, or `rediss://…` for TLS, or
//! `unix:///path[?db=N]`.
//!
//! The URL may contain a password, so messages show only the part that [`shown`] returns.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::balance::Address;
use crate::config::decode::escaped;
use crate::config::{RedisAddress, Secret};

const PORT: u16 = 6379;
/// `sun_path` has 108 bytes, and the last one is the terminating zero.
const UNIX_PATH_MAX_BYTES: usize = 107;
const SHOWN_MAX_CHARS: usize = 60;

#[derive(Debug, PartialEq)]
pub(super) struct RedisUrl {
    pub(super) address: RedisAddress,
    pub(super) database: u32,
    pub(super) username: Option<String>,
    pub(super) password: Option<Secret>,
}

/// Parses a URL. The error is the cure, without the value.
pub(super) fn parse(url: &str) -> Result<RedisUrl, &'static str> {
    if let Some(rest) = url.strip_prefix("unix://") {
        return parse_unix(rest);
    }
    let secure = url.strip_prefix("rediss://");
    let Some(rest) = secure.or_else(|| url.strip_prefix("redis://")) else {
        return Err("write it like redis://127.0.0.1:6379/0, rediss://… for TLS, or unix:///run/redis.sock");
    };
    if rest.contains(['?', '#']) {
        return Err("nothing may follow the database: options are keys beside url");
    }
    // Searched from the right, since a password that is not percent-encoded may contain an @.
    let (credentials, rest) =
        rest.rsplit_once('@').map_or((None, rest), |(before, after)| (Some(before), after));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (username, password) = match credentials.map(|text| text.split_once(':').unwrap_or((text, ""))) {
        Some((username, password)) => (decoded(username)?, decoded(password)?),
        None => (String::new(), String::new()),
    };
    Ok(RedisUrl {
        address: parse_authority(authority, secure.is_some())?,
        database: parse_database(database)?,
        username: Some(username).filter(|text| !text.is_empty()),
        password: Some(password).filter(|text| !text.is_empty()).map(Secret::new),
    })
}

fn parse_unix(rest: &str) -> Result<RedisUrl, &'static str> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, "db="));
    if !path.starts_with('/') || path.len() > UNIX_PATH_MAX_BYTES || path.chars().any(char::is_control) {
        return Err("the socket needs an absolute path of at most 107 bytes, like unix:///run/redis.sock");
    }
    let database = query.strip_prefix("db=").ok_or("only ?db=N may follow the path")?;
    let address = RedisAddress::Unix(PathBuf::from(path));
    Ok(RedisUrl { address, database: parse_database(database)?, username: None, password: None })
}

fn parse_authority(authority: &str, secure: bool) -> Result<RedisAddress, &'static str> {
    let cure = if has_impossible_port(authority) {
        "the port is out of range: write one from 1 to 65535"
    } else {
        "the host is missing or wrong: write it like redis://127.0.0.1:6379/0 or redis://[::1]:6379/0"
    };
    host_and_port(authority, PORT).map(|(host, port)| address(host, port, secure)).ok_or(cure)
}

/// Returns true if the number after the last colon is out of the range of ports. IPv6 addresses without
/// brackets have no port.
fn has_impossible_port(authority: &str) -> bool {
    let Some((host, port)) = authority.rsplit_once(':') else { return false };
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let is_bracketed = host.ends_with(']') || !host.contains(':');
    is_number && is_bracketed && !port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// The address of a server that speaks TLS (`secure`) or plain TCP.
pub(super) fn address(host: String, port: u16, secure: bool) -> RedisAddress {
    if secure { RedisAddress::Tls { host, port } } else { RedisAddress::Tcp { host, port } }
}

/// Parses a host and a port by the rules for backends, but the port may be left out.
pub(super) fn host_and_port(authority: &str, default_port: u16) -> Option<(String, u16)> {
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
    let with_port = if has_port { authority.to_owned() } else { format!("{authority}:{default_port}") };
    match with_port.parse::<Address>() {
        Ok(Address::Socket(address)) => Some((address.ip().to_string(), address.port())),
        Ok(Address::Name { host, port }) => Some((host.to_string(), port)),
        Ok(Address::Unix(_)) | Err(_) => None,
    }
}

fn parse_database(text: &str) -> Result<u32, &'static str> {
    if text.is_empty() {
        return Ok(0);
    }
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or("the database after the last / is a number, like /0")
}

fn decoded(text: &str) -> Result<String, &'static str> {
    let cure = "a % in user or password is written %25, an @ %40, a : %3A, a / %2F";
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else { return Err(cure) };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| cure)?);
    }
    String::from_utf8(bytes).map_err(|_| cure)
}

/// The message for a URL that [`parse`] refused with `cure`.
pub(super) fn refusal(url: &str, cure: &str) -> String {
    if url.contains("://") || url.is_empty() {
        return format!("{}: {cure}", shown(url));
    }
    // An IP address or localhost may be shown, since it is no password.
    let (server, database) = url.split_once('/').unwrap_or((url, ""));
    let is_server = host_and_port(server, PORT)
        .is_some_and(|(host, _)| host == "localhost" || host.parse::<IpAddr>().is_ok());
    if is_server && parse_database(database).is_ok() {
        let url = escaped(url, SHOWN_MAX_CHARS);
        format!("{url}: the scheme is missing: write redis://{url}")
    } else {
        format!("the scheme is missing (the value is not shown, since it may be a password): {cure}")
    }
}

/// The part of a URL that may be shown: nothing before an @, and nothing after a ?. A text without a
/// scheme may be a password under the wrong key, and is not shown.
pub(super) fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "…".to_owned() };
    let rest = rest.split_once('?').map_or(rest, |(before, _)| before);
    let shown = match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}"),
        None => format!("{scheme}://{rest}"),
    };
    // A ? in a password that is not percent-encoded has removed the @, too.
    let hides_credentials = url.contains('@') && !shown.contains('@');
    escaped(if hides_credentials { "…" } else { &shown }, SHOWN_MAX_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> RedisAddress {
        RedisAddress::Tcp { host: host.into(), port }
    }

    #[test]
    fn urls_say_where_redis_is() {
        for (url, address, database) in [
            ("redis://127.0.0.1:6379/0", tcp("127.0.0.1", 6379), 0),
            ("redis://cache.internal", tcp("cache.internal", 6379), 0),
            ("redis://[::1]:7000/15", tcp("::1", 7000), 15),
            ("redis://[::1]/2", tcp("::1", 6379), 2),
            ("redis://h:1/", tcp("h", 1), 0),
            ("rediss://[::1]:7000/15", RedisAddress::Tls { host: "::1".into(), port: 7000 }, 15),
            ("rediss://h", RedisAddress::Tls { host: "h".into(), port: 6379 }, 0),
            ("unix:///run/redis.sock", RedisAddress::Unix("/run/redis.sock".into()), 0),
            ("unix:///run/redis.sock?db=3", RedisAddress::Unix("/run/redis.sock".into()), 3),
        ] {
            let expected = RedisUrl { address, database, username: None, password: None };
            assert_eq!(parse(url), Ok(expected), "{url}");
        }
    }

    #[test]
    fn urls_may_hold_user_and_password() {
        for (url, username, password) in [
            ("redis://u:p@h", Some("u"), Some("p")),
            ("redis://:p@h", None, Some("p")),
            ("redis://u@h", Some("u"), None),
            ("redis://u:p%40%3a%25@h", Some("u"), Some("p@:%")),
            ("redis://u:p@q@h", Some("u"), Some("p@q")),
        ] {
            let parsed = parse(url).unwrap();
            let found = (parsed.username.as_deref(), parsed.password.as_ref().map(Secret::expose));
            assert_eq!(found, (username, password), "{url}");
            assert_eq!(parsed.address, tcp("h", 6379));
        }
    }

    #[test]
    fn what_is_no_redis_url_is_refused_and_shown_without_its_password() {
        for (url, expected) in [
            ("", "…"),
            ("geheim", "…"),
            ("http://h", "http://h"),
            ("redis://", "redis://"),
            ("redis://u:geheim@", "redis://…@"),
            ("redis://u:geheim@h:0", "redis://…@h:0"),
            ("redis://u:geheim%@h", "redis://…@h"),
            ("redis://u:geheim?@h", "…"),
            ("redis://h/-1", "redis://h/-1"),
            ("redis://h/4294967296", "redis://h/4294967296"),
            ("redis://h/0?password=geheim", "redis://h/0"),
            ("unix://relative", "unix://relative"),
            ("unix:///a?password=geheim", "unix:///a"),
            ("rediss://u:geheim@h:x", "rediss://…@h:x"),
        ] {
            assert!(parse(url).is_err(), "{url} was taken");
            assert_eq!(shown(url), expected, "{url}");
        }
    }

    #[test]
    fn a_url_without_scheme_is_shown_only_where_it_is_surely_no_password() {
        for (url, expected) in [
            ("127.0.0.1:6379", "127.0.0.1:6379: the scheme is missing: write redis://127.0.0.1:6379"),
            ("[::1]:6379/2", "[::1]:6379/2: the scheme is missing: write redis://[::1]:6379/2"),
            ("localhost", "localhost: the scheme is missing: write redis://localhost"),
            ("geheim", "the scheme is missing (the value is not shown, since it may be a password): CURE"),
            (
                "geheim:123",
                "the scheme is missing (the value is not shown, since it may be a password): CURE",
            ),
            (
                ":geheim@127.0.0.1",
                "the scheme is missing (the value is not shown, since it may be a password): CURE",
            ),
            ("http://h", "http://h: CURE"),
        ] {
            assert!(parse(url).is_err(), "{url} was taken");
            assert_eq!(refusal(url, "CURE"), expected);
        }
    }

    #[test]
    fn a_port_that_cannot_be_is_not_taken_for_a_wrong_host() {
        for url in ["redis://127.0.0.1:99999", "redis://u:p@h:65536/0", "rediss://[::1]:0"] {
            assert_eq!(parse(url), Err("the port is out of range: write one from 1 to 65535"), "{url}");
        }
        for url in ["redis://h:", "redis://h:x", "redis://:1", "redis://fe80::99999"] {
            assert!(parse(url).is_err_and(|cure| cure.contains("host")), "{url}");
        }
    }

    proptest! {
        #[test]
        fn no_url_makes_the_reader_panic(url in "(rediss?|unix)://[a-z0-9:@/?%\\[\\]é]{0,40}|.{0,40}") {
            let _ = parse(&url);
            prop_assert!(!shown(&url).chars().any(char::is_control));
        }
    }
}
