//! Redis over TLS is followed if both sides trust each other's certificates. Otherwise the log names the
//! cause and the cure.

use std::path::Path;
use std::process::Command;

use crate::support::{
    Authority, Backend, Cluster, Identity, Link, Passing, Program, Proxy, Redis, Sentinels, TlsRedis,
    Traffic, eventually, free_port, greeting, path_text,
};

fn follow(url: &str, tls: &str) -> Proxy {
    Proxy::web(
        &format!("redis: {{url: \"{url}\", tls: {{{tls}}}, resync_interval: 1h}}"),
        "weights_key: servers",
    )
}

fn trusting(ca: &Path) -> String {
    format!("ca_file: \"{}\"", path_text(ca))
}

fn showing(ca: &Path, identity: &Identity) -> String {
    let (certificate, key) = (path_text(&identity.certificate), path_text(&identity.key));
    format!("{}, cert_file: \"{certificate}\", key_file: \"{key}\"", trusting(ca))
}

/// Writes a table and a change, and waits until the proxy has each, by notifications.
async fn follows(proxy: &Proxy, redis: &Redis) {
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    let first = [("10.0.0.1:80".to_owned(), 1.0)];
    eventually("the table arrives", || async { proxy.weights() == first }).await;
    redis.run("ZADD servers 2 10.0.0.1:80").await;
    let second = [("10.0.0.1:80".to_owned(), 2.0)];
    eventually("a change arrives", || async { proxy.weights() == second }).await;
    assert_eq!(proxy.metric("statera_redis_watch_mode{mode=\"notifications\"}"), Some(1.0));
}

#[tokio::test]
async fn redis_behind_tls_is_followed_if_its_certificate_is_trusted() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    let proxy = follow(&secure.url(), &trusting(&authority.file()));
    follows(&proxy, &secure.redis).await;
}

#[tokio::test]
async fn a_lone_node_behind_tls_that_does_not_know_its_own_address_is_followed() {
    let (authority, port) = (Authority::new(), free_port());
    let (identity, ca) = (authority.signs("127.0.0.1"), authority.file());
    let node = Cluster::alone(&[
        "--tls-cluster",
        "yes",
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        path_text(&identity.certificate),
        "--tls-key-file",
        path_text(&identity.key),
        "--tls-ca-cert-file",
        path_text(&ca),
        "--tls-auth-clients",
        "no",
    ])
    .await;
    let proxy = Proxy::web(
        &format!(
            "redis: {{cluster: {{nodes: [\"127.0.0.1:{port}\"]}}, tls: {{ca_file: \"{}\"}}, resync_interval: 1h}}",
            path_text(&ca)
        ),
        "weights_key: servers",
    );
    follows(&proxy, &node).await;
}

#[tokio::test]
async fn a_client_certificate_is_shown_on_both_connections() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "yes").await;
    let backend = Backend::named("backend").await;
    secure.redis.set_weights([(&backend, 1.0)]).await;
    let tls = showing(&authority.file(), &authority.signs("statera"));
    let proxy = follow(&secure.url(), &tls);
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    // The second connection is that of the Lua pick.
    eventually("both connections are made", || async {
        let list = secure.redis.run("CLIENT LIST").await;
        let list: String = redis::from_redis_value(list).expect("a text");
        list.lines().filter(|line| line.contains(&format!("laddr=127.0.0.1:{}", secure.port))).count() >= 2
    })
    .await;
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "backend");
}

#[tokio::test]
async fn without_a_ca_file_the_root_certificates_of_the_system_are_trusted() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    let backend = Backend::named("backend").await;
    secure.redis.set_weights([(&backend, 1.0)]).await;
    let mut launcher = Command::new("env");
    launcher.arg(format!("SSL_CERT_FILE={}", path_text(&authority.file()))).arg(Program::path());
    let program = Program::run_by(launcher, &config(&secure.url(), ""));
    program.says("connected to redis").await;
    let address = program.address().await;
    eventually("it serves", || async { greeting(address).await.is_ok_and(|name| name == "backend") }).await;
}

fn config(url: &str, tls: &str) -> String {
    config_of(&format!("url: \"{url}\""), tls)
}

/// The same with another key for the server: `sentinel: …` or `cluster: …`.
fn config_of(server: &str, tls: &str) -> String {
    let tls = if tls.is_empty() { String::new() } else { format!(", tls: {{{tls}}}") };
    format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{{server}{tls}}}\n"
    )
}

/// Waits for the log line that says why Redis cannot be watched, and returns its error and its cure.
async fn refusal(url: &str, tls: &str) -> (String, String) {
    let program = Program::run(&config(url, tls));
    let line = program.says("cannot connect to redis").await;
    let field = |name: &str| line[name].as_str().expect("a text").to_owned();
    assert_eq!(line["level"], "WARN");
    (field("error"), field("cure"))
}

fn assert_says((error, cure): &(String, String), wanted_error: &str, wanted_cure: &str) {
    assert!(error.contains(wanted_error), "error: {error}");
    assert!(cure.contains(wanted_cure), "cure: {cure} (of {error})");
}

#[tokio::test]
async fn an_unknown_misnamed_or_expired_certificate_is_refused_with_its_cure() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    let unknown = refusal(&secure.url(), &trusting(&stranger.file())).await;
    assert_says(&unknown, "UnknownIssuer", "set redis.tls.ca_file");

    let elsewhere = secure.url().replace("127.0.0.1", "localhost");
    let misnamed = refusal(&elsewhere, &trusting(&authority.file())).await;
    assert_says(&misnamed, "not valid for name", "a name or address that its certificate is for");

    let expired = TlsRedis::start(&authority, &authority.signed_long_ago("127.0.0.1"), "no").await;
    let over = refusal(&expired.url(), &trusting(&authority.file())).await;
    assert_says(&over, "expired", "renew the server's certificate");
}

#[tokio::test]
async fn a_missing_and_an_untrusted_client_certificate_are_logged_with_their_cure() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "yes").await;
    let none = refusal(&secure.url(), &trusting(&authority.file())).await;
    assert_says(&none, "", "redis.tls.cert_file");
    let foreign = refusal(&secure.url(), &showing(&authority.file(), &stranger.signs("statera"))).await;
    assert_says(&foreign, "", "redis.tls.cert_file and key_file to one that it trusts");
}

#[tokio::test]
async fn tls_to_a_plain_port_and_plain_to_a_tls_port_are_logged_with_their_cure() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    // A plain Redis reads the TLS handshake as the beginning of a command: it waits for the rest, or refuses
    // it.
    let tls_to_plain = secure.url().replace(&secure.port.to_string(), &secure.redis.port.to_string());
    let silent = refusal(&tls_to_plain, &trusting(&authority.file())).await;
    assert_says(&silent, "TLS handshake", "write redis://");

    let plain_to_tls = format!("redis://127.0.0.1:{}/0", secure.port);
    let closed = refusal(&plain_to_tls, "").await;
    assert_says(&closed, "", "write rediss://");
}

/// TLS moves to another port, and the old port answers in plain.
#[tokio::test]
async fn a_tls_port_that_becomes_plain_keeps_the_last_table_and_the_traffic() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    let backend = Backend::named("backend").await;
    secure.redis.set_weights([(&backend, 1.0)]).await;
    let link = Link::to(secure.port);
    let url = format!("rediss://127.0.0.1:{}/0", link.port);
    let proxy = follow(&url, &trusting(&authority.file()));
    eventually("the table arrives", || async { proxy.weights().len() == 1 }).await;
    let traffic = Traffic::start(proxy.address());
    traffic.more(20).await;
    link.lead_to(secure.redis.port);
    link.pass(Passing::Resets);
    let connected = || proxy.metric("statera_redis_connected");
    eventually("it is disconnected", || async { connected() == Some(0.0) }).await;
    link.pass(Passing::All);
    traffic.more(50).await;
    assert_eq!((connected(), proxy.weights().len()), (Some(0.0), 1));

    link.lead_to(secure.port);
    eventually("it is back", || async { connected() == Some(1.0) }).await;
    secure.redis.run(&format!("ZADD servers 7 {}", backend.address)).await;
    eventually("a change arrives", || async { proxy.weights() == [(backend.address.to_string(), 7.0)] })
        .await;
    assert!(traffic.stop().await.served["backend"] > 0);
}

/// All sentinels and servers ask clients for a certificate.
#[tokio::test]
async fn sentinels_and_servers_behind_tls_are_followed_also_through_a_failover() {
    let authority = Authority::new();
    let set = Sentinels::start_secure(&authority, &authority.signs("127.0.0.1")).await;
    let backend = Backend::named("backend").await;
    let tls = showing(&authority.file(), &authority.signs("statera"));
    let section = format!("redis: {{{}, tls: {{{tls}}}, resync_interval: 1h}}", set.section());
    let proxy = Proxy::web(&section, "weights_key: servers");
    follows(&proxy, &set.servers[0]).await;
    set.servers[0].set_weights([(&backend, 1.0)]).await;
    eventually("the table is replicated", || set.is_replicated(0)).await;
    // Waits for this table, since the one before names an address without a backend, where sessions would
    // fail.
    let first = [(backend.address.to_string(), 1.0)];
    eventually("the proxy has the table", || async { proxy.weights() == first }).await;
    let traffic = Traffic::start(proxy.address());
    traffic.more(20).await;
    set.fail_over().await;
    let primary = set.new_primary(0).await;
    set.servers[primary].run(&format!("ZADD servers 7 {}", backend.address)).await;
    let wanted = [(backend.address.to_string(), 7.0)];
    eventually("the new primary is followed", || async { proxy.weights() == wanted }).await;
    traffic.stop().await;

    // Without `redis.tls` the proxy cannot connect: it has no plain port to fall back to.
    let plain = Program::run(&config_of(&set.section(), ""));
    let line = plain.says("no sentinel names a primary").await;
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("set redis.tls beside")), "{line}");
    let stranger = Authority::new();
    let mistrusting = Program::run(&config_of(&set.section(), &trusting(&stranger.file())));
    let line = mistrusting.says("no sentinel names a primary").await;
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("redis.tls.ca_file")), "{line}");
}

/// The time limit is the same as without TLS.
#[tokio::test]
async fn a_frozen_redis_behind_tls_is_noticed_in_time() {
    let authority = Authority::new();
    let secure = TlsRedis::start(&authority, &authority.signs("127.0.0.1"), "no").await;
    let tls = trusting(&authority.file());
    let proxy = Proxy::web(
        &format!(
            "redis: {{url: \"{}\", tls: {{{tls}}}, heartbeat_interval: 200ms, response_timeout: 1s}}",
            secure.url()
        ),
        "weights_key: servers",
    );
    let connected = || proxy.metric("statera_redis_connected");
    eventually("it is there", || async { connected() == Some(1.0) }).await;
    secure.redis.freeze();
    let frozen = tokio::time::Instant::now();
    eventually("it is disconnected", || async { connected() == Some(0.0) }).await;
    let took = frozen.elapsed();
    assert!(took < std::time::Duration::from_millis(1_400 + 5_000), "it took {took:?}");
    secure.redis.thaw();
    eventually("it is back", || async { connected() == Some(1.0) }).await;
}

#[test]
fn unusable_certificate_files_are_refused_with_path_and_cure() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (one, two) = (authority.signs("one"), other.signs("two"));
    let message = |tls: &str| {
        let text = config("rediss://h", tls);
        statera::config::Config::from_yaml(&text).expect_err("it is refused").to_string()
    };
    let (ca, certificate, key) = (authority.file(), path_text(&one.certificate), path_text(&one.key));
    let trusted = trusting(&ca);
    for (tls, path, cure) in [
        (format!("ca_file: \"{key}\""), "redis.tls.ca_file: /", "it has no certificate"),
        (format!("{trusted}, cert_file: \"{certificate}\""), "redis.tls.cert_file: /", "key_file is missing"),
        (format!("{trusted}, key_file: \"{key}\""), "redis.tls.key_file: /", "cert_file is missing"),
        (
            format!("{trusted}, cert_file: \"{certificate}\", key_file: \"{certificate}\""),
            "redis.tls.key_file: /",
            "it has no private key",
        ),
        (
            format!("{trusted}, cert_file: \"{certificate}\", key_file: \"{}\"", path_text(&two.key)),
            "redis.tls.key_file: /",
            "it does not fit cert_file",
        ),
        ("ca_file: /nowhere.pem".to_owned(), "redis.tls.ca_file: /nowhere.pem", "there is no such file"),
    ] {
        let message = message(&tls);
        assert!(message.contains(path) && message.contains(cure), "{tls}: {message}");
        assert!(!message.contains("PRIVATE"), "{message}");
    }
    let whole = config("rediss://h", &showing(&ca, &one));
    statera::config::Config::from_yaml(&whole).expect("all of it fits");
}
