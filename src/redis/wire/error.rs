//! What can be wrong with Redis, and what a person can do about it.
//!
//! The library's errors say what the server or the kernel said; [`Trouble`] is what only we know. Everything here travels as
//! a `RedisError`, so that callers have one kind to look at.

use std::error::Error as _;
use std::io;
use std::sync::Arc;

use redis::{ErrorKind, RedisError, ServerErrorKind};
use rustls::{AlertDescription, CertificateError};

use super::reply_limit::{LARGEST_REPLY_BYTES, MOST_VALUES};

/// What the library has no word for.
#[derive(Debug, thiserror::Error)]
pub(in crate::redis) enum Trouble {
    #[error("no answer in time")]
    Silent,
    #[error("no answer to the TLS handshake in time")]
    SilentHandshake,
    #[error("the TLS handshake failed: {0}")]
    Handshake(io::Error),
    #[error("its first answer is none of redis's")]
    NoRedis,
    #[error("the connection was closed before the first answer")]
    ClosedAtOnce,
    #[error("no sentinel names a primary that is up")]
    NoPrimary,
    #[error("the sentinels know no primary of that name")]
    UnknownMaster,
    #[error("it says that it is a {0}, and not the primary")]
    NotPrimary(String),
    #[error("another server is the primary now")]
    Moved,
    #[error("an answer of more than {} MiB or {MOST_VALUES} values, which is not taken in", LARGEST_REPLY_BYTES >> 20)]
    Oversized,
    #[error("the answer is not valid RESP")]
    Garbled,
    #[error("the connection is closed whenever the table is asked for")]
    CutOff,
    #[error("the table did not arrive in time, twice")]
    Late,
    #[error("{0} serves the key's slot now")]
    Elsewhere(String),
    #[error("no node serves the key's slot")]
    NoOwner,
    #[error("it is a server of its own, and no node of a cluster")]
    NoCluster,
}

impl From<Trouble> for RedisError {
    fn from(trouble: Trouble) -> Self {
        io::Error::other(trouble).into()
    }
}

/// True where the connection still works and only this command was refused.
pub(in crate::redis) fn is_refusal(error: &RedisError) -> bool {
    error.code().is_some() && !is_not_ready(error)
}

/// True where the user may not do what was asked.
pub(in crate::redis) fn is_of_rights(error: &RedisError) -> bool {
    error.code() == Some("NOPERM") || tells_of_rights(&error.to_string())
}

/// In the words of Redis 7 and 6.2, for what a script calls.
pub(in crate::redis) fn tells_of_rights(reason: &str) -> bool {
    ["NOPERM", "ACL failure", "can't run this command"].iter().any(|part| reason.contains(part))
}

/// True where the server will answer later: it loads its data, follows a primary that is down, belongs to a cluster that is
/// down, or has some of the keys while their slot moves. Not where nobody serves one key's slot: others can be read meanwhile.
pub(in crate::redis) fn is_not_ready(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, TryAgain};
    match error.kind() {
        ErrorKind::Server(BusyLoading | MasterDown | TryAgain) => true,
        ErrorKind::Server(ClusterDown) => {
            !error.detail().is_some_and(|text| text.contains("slot not served"))
        }
        _ => false,
    }
}

/// What a person can do about it, if anything is known.
pub(in crate::redis) fn cure(error: &RedisError) -> &'static str {
    if let Some(tls) = of_tls(error) {
        return cure_of_tls(tls);
    }
    match trouble(error) {
        Some(Trouble::SilentHandshake | Trouble::Handshake(_)) => return SPEAKS_NO_TLS,
        Some(Trouble::ClosedAtOnce) => {
            return "if that port speaks TLS, write rediss:// in redis.url, or set redis.tls beside redis.sentinel or \
                    redis.cluster; else redis's log may say why";
        }
        Some(Trouble::NoRedis | Trouble::Garbled) => return SPEAKS_NO_REDIS,
        Some(Trouble::UnknownMaster) => return "check redis.sentinel.master",
        Some(Trouble::Oversized) => {
            return "remove the members that are no addresses (`redis-cli ZRANGE KEY 0 -1 | cut -c1-300` shows them), or \
                    split the pool";
        }
        // Of a client that has subscribed: 32 MB by default.
        Some(Trouble::CutOff) => {
            return "redis's log says why; if it is the output buffer limit, remove the members that are no addresses \
                    (`redis-cli ZRANGE KEY 0 -1 | cut -c1-300` shows them)";
        }
        Some(Trouble::Late) => {
            return "raise redis.response_timeout; a table of that size may be better split in two";
        }
        Some(Trouble::NoCluster) => return "write its address as redis.url, or name a cluster's nodes",
        Some(Trouble::NoOwner) => return "see what CLUSTER NODES says, and give the slot to a node",
        Some(
            Trouble::NoPrimary
            | Trouble::NotPrimary(_)
            | Trouble::Moved
            | Trouble::Elsewhere(_)
            | Trouble::Silent,
        )
        | None => {}
    }
    match error.kind() {
        _ if is_no_database(error) => cure_of_database(error),
        _ if is_no_sentinel(error) => "it is no sentinel: check redis.sentinel.nodes",
        ErrorKind::AuthenticationFailed => "check redis.username and redis.password",
        ErrorKind::Server(ServerErrorKind::NoPerm) => "grant the ACL user what the message names",
        ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::Ask) => {
            "this is a Redis Cluster: write redis.cluster instead of redis.url"
        }
        ErrorKind::Server(ServerErrorKind::ClusterDown) => "see what CLUSTER INFO says: a part of it is down",
        ErrorKind::RESP3NotSupported => "redis 6 or newer is needed",
        ErrorKind::Parse => SPEAKS_NO_REDIS,
        _ if error.code() == Some("NOAUTH") => "set redis.password",
        _ if error.code() == Some("WRONGPASS") => "check redis.username and redis.password",
        _ if error.is_connection_refusal() => {
            "start redis, or check its address in the config's redis section"
        }
        _ => "it is tried again until it works",
    }
}

/// Redis 6 puts the command between other quotes.
fn is_no_sentinel(error: &RedisError) -> bool {
    let text = error.to_string();
    ["unknown command 'SENTINEL'", "unknown command `SENTINEL`"].iter().any(|words| text.contains(words))
}

/// The library puts it so, without Redis's own code.
fn is_no_database(error: &RedisError) -> bool {
    error.to_string().contains("refused to switch database")
}

fn cure_of_database(error: &RedisError) -> &'static str {
    let has = |part: &str| error.detail().is_some_and(|text| text.contains(part));
    if has("cluster mode") {
        "a Redis Cluster has database 0 alone: write redis.cluster instead of redis.url"
    } else if has("permission") {
        "grant the ACL user +select"
    } else {
        "check the database at the end of redis.url, or in redis.sentinel.database: the server has fewer"
    }
}

const SPEAKS_NO_REDIS: &str = "what answers there does not speak redis's protocol: check its address in the config's redis \
                               section; if it is TLS, write rediss:// in redis.url, or set redis.tls beside redis.sentinel \
                               or redis.cluster";
const SPEAKS_NO_TLS: &str = "if that port speaks plain redis, write redis:// in redis.url, or leave redis.tls out beside \
                             redis.sentinel or redis.cluster; else name the server's tls-port";

fn cure_of_tls(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidMessage(_) => SPEAKS_NO_TLS,
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "set redis.tls.ca_file to the certificate of the authority that signed the server's"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "renew the server's certificate, or set this machine's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "set this machine's clock, or wait until the server's certificate begins"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "reach the server by a name or address that its certificate is for, or have that added to it"
            }
            _ => {
                "have the server's certificate issued anew, for a server and by the authority in redis.tls.ca_file"
            }
        },
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server asks for a certificate: set redis.tls.cert_file and redis.tls.key_file"
        }
        rustls::Error::AlertReceived(_) => {
            "if the server asks for a certificate, set redis.tls.cert_file and key_file to one that it trusts"
        }
        _ => "check redis.tls and the server's certificate",
    }
}

/// True where the server is fine, and just not the one to follow any more.
pub(in crate::redis) fn is_move(error: &RedisError) -> bool {
    matches!(trouble(error), Some(Trouble::Moved))
}

/// True where an answer is too large for us, for Redis itself, or for the time that it has. The connection is of no use any
/// more, since the rest of the answer would have to be read.
pub(in crate::redis) fn is_too_large(error: &RedisError) -> bool {
    matches!(trouble(error), Some(Trouble::Oversized | Trouble::CutOff | Trouble::Late))
}

/// True where a node of a cluster answered that another one has the key.
pub(in crate::redis) fn is_elsewhere(error: &RedisError) -> bool {
    matches!(trouble(error), Some(Trouble::Elsewhere(_)))
}

/// True where an answer was no reply of the protocol at all.
pub(in crate::redis) fn is_garbled(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Parse || matches!(trouble(error), Some(Trouble::Garbled))
}

/// True where something answers that is no Redis.
pub(in crate::redis) fn is_no_redis(error: &RedisError) -> bool {
    matches!(trouble(error), Some(Trouble::NoRedis))
}

/// True where the config or the cluster itself has to be mended.
pub(in crate::redis) fn is_of_cluster(error: &RedisError) -> bool {
    matches!(trouble(error), Some(Trouble::NoCluster | Trouble::NoOwner))
}

fn trouble(error: &RedisError) -> Option<&Trouble> {
    of_io(error)?.get_ref()?.downcast_ref()
}

/// From the handshake, or from the first answer: in TLS 1.3 a server looks at our certificate after it.
fn of_tls(error: &RedisError) -> Option<&rustls::Error> {
    let io = match trouble(error) {
        Some(Trouble::Handshake(io)) => io,
        _ => of_io(error)?,
    };
    io.get_ref()?.downcast_ref()
}

fn of_io(error: &RedisError) -> Option<&io::Error> {
    // So the library keeps it; its own way there is private.
    let kept: &Arc<dyn std::error::Error + Send + Sync> = error.source()?.downcast_ref()?;
    kept.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_wrapped_is_found_again_and_has_its_cure() {
        let silent = RedisError::from(Trouble::SilentHandshake);
        assert_eq!(silent.to_string(), "no answer to the TLS handshake in time");
        assert_eq!(cure(&silent), SPEAKS_NO_TLS);
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let wrapped = RedisError::from(Trouble::Handshake(io::Error::other(unknown())));
        assert!(cure(&wrapped).contains("redis.tls.ca_file"), "{}", cure(&wrapped));
        let late = RedisError::from(io::Error::other(rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired,
        )));
        assert!(cure(&late).contains("redis.tls.cert_file"), "{}", cure(&late));
        let refused = RedisError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert!(cure(&refused).contains("start redis"));
    }

    /// Whoever is told to change `redis.url` may have sentinels or a cluster.
    #[test]
    fn what_can_be_wrong_everywhere_has_a_cure_for_everywhere() {
        let refused = RedisError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        let speaks_tls = || rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType);
        for error in [
            refused,
            RedisError::from((ErrorKind::Parse, "not redis")),
            Trouble::NoRedis.into(),
            Trouble::ClosedAtOnce.into(),
            Trouble::SilentHandshake.into(),
            Trouble::Handshake(io::Error::other(speaks_tls())).into(),
        ] {
            let cure = cure(&error);
            let is_for_all = ["redis.sentinel", "redis.cluster"].iter().all(|key| cure.contains(key));
            assert!(is_for_all || !cure.contains("redis.url"), "{error}: {cure}");
        }
    }

    #[test]
    fn a_slot_that_nobody_serves_keeps_nobody_waiting_for_other_keys() {
        let error = |answer: &str| {
            let value = redis::parse_redis_value(format!("-{answer}\r\n").as_bytes()).expect("an answer");
            value.extract_error().expect_err("an error")
        };
        for wait in ["CLUSTERDOWN The cluster is down", "TRYAGAIN Multiple keys request", "LOADING it"] {
            assert!(is_not_ready(&error(wait)) && !is_refusal(&error(wait)), "{wait}");
        }
        let unserved = error("CLUSTERDOWN Hash slot not served");
        assert!(is_refusal(&unserved) && !is_not_ready(&unserved));
    }
}
