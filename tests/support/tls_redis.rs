//! A redis-server that speaks TLS at one port of 127.0.0.1. The scenario itself uses its second port,
//! without TLS.

use super::{Authority, Identity, Redis, free_port, path_text};

/// A redis-server with a TLS port.
pub struct TlsRedis {
    pub redis: Redis,
    pub port: u16,
}

impl TlsRedis {
    /// Starts the server. `clients` says whether clients have to present a certificate: `yes` or `no`.
    pub async fn start(authority: &Authority, identity: &Identity, clients: &str) -> Self {
        let port = free_port();
        let mut arguments = vec!["--notify-keyspace-events".to_owned(), "KA".to_owned()];
        for (name, value) in tls_settings(port, authority, identity, clients) {
            arguments.extend([format!("--{name}"), value]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Self { redis: Redis::start_with(&arguments).await, port }
    }

    /// The `url` for the `redis` section of a config.
    pub fn url(&self) -> String {
        format!("rediss://127.0.0.1:{}/0", self.port)
    }
}

/// The TLS settings of a server or a sentinel, for their own replication links too.
pub fn tls_settings(
    port: u16,
    authority: &Authority,
    identity: &Identity,
    clients: &str,
) -> [(&'static str, String); 6] {
    [
        ("tls-port", port.to_string()),
        ("tls-cert-file", path_text(&identity.certificate).to_owned()),
        ("tls-key-file", path_text(&identity.key).to_owned()),
        ("tls-ca-cert-file", path_text(&authority.file()).to_owned()),
        ("tls-auth-clients", clients.to_owned()),
        ("tls-replication", "yes".to_owned()),
    ]
}
