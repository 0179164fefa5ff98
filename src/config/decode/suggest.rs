//! Finds the key or word that was meant: by a typing mistake, or by the name that another load balancer
//! uses.

/// A typing mistake is rarely more than two letters.
const TYPO_MAX_EDITS: usize = 2;
const WORD_MAX_CHARS: usize = 60;

/// Words of HAProxy, nginx, Envoy and Traefik, each with the key of this config that does the same, and
/// with how to write it where the key alone is not enough. A word may occur more than once: the first
/// line whose key the section knows counts.
const FOREIGN: &[(&[&str], &str, Option<&str>)] = &[
    (&["frontend", "frontends", "listen", "entrypoints", "server"], "listeners", None),
    (&["backend", "upstream", "upstreams", "cluster", "clusters", "services"], "pools", None),
    (
        &["backend", "default_backend", "use_backend", "upstream", "cluster", "proxy_pass", "service"],
        "pool",
        None,
    ),
    (
        &["server", "servers", "endpoints", "targets", "hosts", "nodes", "members", "addresses"],
        "backends",
        None,
    ),
    (&["address", "addr", "listen", "port", "host", "ip", "socket", "socket_address"], "bind", None),
    (
        &["host", "port", "address", "addr", "server", "uri"],
        "url",
        Some("url: \"redis://HOST:PORT/DATABASE\""),
    ),
    (&["db", "database"], "url", Some("url: \"redis://HOST:PORT/DATABASE\"")),
    (&["maxconn", "max_conns", "max_conn"], "max_connections", None),
    (&["maxqueue", "max_queue", "queue_size"], "queue", Some("queue: {size: …}")),
    (&["timeout_queue", "queue_timeout"], "queue", Some("queue: {timeout: …}")),
    (&["maxqueue", "max", "length", "max_queue"], "size", None),
    (
        &["timeout_connect", "connect_timeout", "proxy_connect_timeout"],
        "connect",
        Some("connect: {timeout: …}"),
    ),
    (
        &["attempts", "retries", "max_retries", "tries", "num_retries"],
        "connect",
        Some("connect: {attempts: …}"),
    ),
    (&["retries", "max_retries", "tries", "num_retries"], "attempts", None),
    (
        &["timeout", "timeout_client", "timeout_server", "timeout_tunnel", "proxy_timeout"],
        "idle_timeout",
        None,
    ),
    (&["timeout_client_fin", "timeout_server_fin", "client_fin", "server_fin"], "half_close_timeout", None),
    (&["check", "checks", "healthcheck", "healthchecks", "health"], "health_check", None),
    (&["inter", "every", "period"], "interval", None),
    (&["healthy_threshold", "passes"], "rise", None),
    (&["unhealthy_threshold", "fails", "failures"], "fall", None),
    (&["tcp_check", "receive", "expect_string", "match"], "expect", None),
    (
        &["outlier_detection", "observe", "passive", "circuit_breaker", "max_fails", "fail_timeout"],
        "outlier",
        None,
    ),
    (&["consecutive_5xx", "max_fails", "error_limit"], "consecutive_failures", None),
    (&["base_ejection_time", "fail_timeout"], "ejection", None),
    (&["max_ejection_percent"], "max_ejected_percent", None),
    (&["panic_threshold", "healthy_panic_threshold"], "fail_open_percent", None),
    (&["algorithm", "lb_policy", "load_balancing", "method", "policy", "strategy"], "balance", None),
    (&["option_tcpka", "so_keepalive", "tcp_keepalive", "clitcpka", "srvtcpka"], "keepalive", None),
    (&["grace", "drain_timeout", "shutdown_timeout"], "drain", Some("drain: {timeout: …}")),
    (
        &["grace", "drain", "hard_stop_after", "graceful_timeout", "shutdown_timeout"],
        "shutdown",
        Some("shutdown: {timeout: …}"),
    ),
    (&["key", "weights", "redis_key", "table"], "weights_key", None),
    (&["nbthread", "nbproc", "threads", "worker_processes", "concurrency"], "workers", None),
    (&["stats", "metrics", "prometheus", "api", "dashboard"], "admin", None),
    (&["access_log", "error_log", "accesslog", "logging", "logger"], "log", None),
    (&["ssl"], "tls", None),
    (&["ca", "cafile", "cacert"], "ca_file", None),
    (&["cert", "crt", "certificate"], "cert_file", None),
    (&["key", "private_key"], "key_file", None),
    (&["user"], "username", None),
    (&["pass", "auth", "requirepass"], "password", None),
    (&["sentinels"], "sentinel", Some("sentinel: {master: NAME, nodes: […]}")),
    (&["name", "master_name", "service_name"], "master", None),
    (&["sentinels", "hosts", "addresses", "servers"], "nodes", None),
    (&["token", "password", "auth"], "token_file", None),
    (&["least_connections", "leastconnections", "least_request"], "least_conn", None),
    (&["rr", "wrr", "round_robin", "static-rr", "roundrobin"], "weighted_round_robin", None),
    (&["random", "p2c"], "weighted_random", None),
    (&["source", "ip_hash", "source_ip", "hash", "maglev", "ring_hash", "consistent"], "source_hash", None),
    (&["warning", "alert"], "warn", None),
    (&["err", "crit", "critical", "emerg", "fatal"], "error", None),
    (&["notice", "informational"], "info", None),
    (&["logfmt", "plain", "raw", "console"], "text", None),
    (&["keyspace", "notify", "events", "pubsub"], "notifications", None),
    (&["polling"], "poll", None),
    (&["keep", "last", "ignore"], "keep_last", None),
    (&["reject", "close", "deny"], "refuse", None),
];

/// The one of `known` that differs from `word` by a letter or two.
pub(super) fn misspelt(word: &str, known: &[&'static str]) -> Option<&'static str> {
    let near = |known: &&&'static str| edits(word, known) <= TYPO_MAX_EDITS.min(known.len() / 2);
    known.iter().filter(near).min_by_key(|known| edits(word, known)).copied()
}

/// What to write in place of `word`, which other load balancers understand, where one of `known` does the
/// same.
pub(super) fn foreign(word: &str, known: &[&'static str]) -> Option<&'static str> {
    if word.len() > WORD_MAX_CHARS {
        return None;
    }
    // `timeout client`, `hard-stop-after`, `maxConn`
    let word = word.to_ascii_lowercase();
    let same = |foreign: &&str| {
        **foreign == word || foreign.replace('_', "-") == word || foreign.replace('_', " ") == word
    };
    let found = FOREIGN.iter().find(|(words, key, _)| known.contains(key) && words.iter().any(same));
    found.map(|(_, key, written)| written.unwrap_or(key))
}

/// Levenshtein's distance. A word far longer than any known one is not compared, so that the cost stays
/// small.
fn edits(a: &str, b: &str) -> usize {
    if a.len() > WORD_MAX_CHARS {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a_char) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b_char) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a_char != b_char);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_a_mistyped_letter_is_recognised() {
        let keys = ["bind", "pool"];
        assert_eq!((misspelt("bnid", &keys), misspelt("pools", &keys)), (Some("bind"), Some("pool")));
        assert_eq!((misspelt("weights", &keys), misspelt(&"x".repeat(100_000), &keys)), (None, None));
        assert_eq!((edits("", "abc"), edits("kitten", "sitting"), edits("same", "same")), (3, 3, 0));
    }

    #[test]
    fn words_of_other_load_balancers_are_recognised_where_the_section_has_such_a_key() {
        let pool = ["connect", "idle_timeout", "max_connections"];
        assert_eq!(foreign("maxconn", &pool), Some("max_connections"));
        assert_eq!(foreign("timeout", &pool), Some("idle_timeout"));
        assert_eq!(foreign("timeout connect", &pool), Some("connect: {timeout: …}"));
        assert_eq!(foreign("maxconn", &["bind", "pool"]), None);
    }

    /// A foreign word that is a known key of its section would never be looked up.
    #[test]
    fn no_word_stands_for_itself() {
        for (words, key, _) in FOREIGN {
            assert!(!words.contains(key), "{key}");
        }
    }
}
