//! Proxies that follow the key `servers` of a Redis, and the waits for what they do.

use std::net::SocketAddr;

use super::{Program, Proxy, Redis, eventually, greeting, info, info_number};

/// A proxy whose pool `web` takes its weights from the key `servers`. `more` goes into the `redis` section.
pub fn follow(redis: &Redis, more: &str) -> Proxy {
    Proxy::web(&format!("redis: {{url: \"{}\", {more}}}", redis.url()), "weights_key: servers")
}

/// A program whose pool `web` takes its weights from the key `servers`. `section` is its `redis` section, to
/// which a heartbeat of 200 ms is added.
pub fn program_following(section: &str) -> Program {
    Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{weights_key: servers}}}}\n\
         redis: {{{section}, heartbeat_interval: 200ms}}\n"
    ))
}

/// Waits until the proxy is in the watch mode `mode`.
pub async fn mode_becomes(proxy: &Proxy, mode: &str) {
    let series = format!("statera_redis_watch_mode{{mode=\"{mode}\"}}");
    eventually(&series, || async { proxy.metric(&series) == Some(1.0) }).await;
}

/// Waits until a new session through `proxy` reaches the backend called `name`.
pub async fn next_greeting_is(proxy: SocketAddr, name: &str) {
    let what = format!("sessions reach {name}");
    eventually(&what, || async { greeting(proxy).await.is_ok_and(|greeting| greeting == name) }).await;
}

/// How often a command was called, by any client, as the server counts it.
pub async fn calls(server: &Redis, command: &str) -> u64 {
    info_number(&info(server, "commandstats").await, &format!("cmdstat_{command}:calls="))
}
