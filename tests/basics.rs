//! The simplest scenarios through every layer: a client, the proxy, a backend, and a weight in Redis.

use crate::support::{Backend, Proxy, Redis, echo, eventually, greeting};

#[tokio::test]
async fn bytes_reach_a_configured_backend_and_come_back_without_redis() {
    let backend = Backend::echo().await;
    let proxy = Proxy::web("", &format!("backends: {{\"{}\": 1}}", backend.address));
    assert_eq!(echo(proxy.address(), b"ping").await.expect("an answer"), b"ping");
    eventually("the session is logged", || async { proxy.access_lines().len() == 1 }).await;
    let line = &proxy.access_lines()[0];
    assert_eq!(line["source"], "configured");
    assert_eq!(line["backend"], backend.address.to_string());
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&4.into(), &4.into()));
    assert_eq!((&line["close_reason"], &line["term"]), (&"finished".into(), &"--".into()));
}

#[tokio::test]
async fn sessions_after_a_zadd_go_where_the_new_weights_say() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let redis = Redis::start().await;
    redis.set_weights([(&old, 1.0)]).await;
    let proxy = Proxy::web(&format!("redis: {{url: \"{}\"}}", redis.url()), "weights_key: servers");
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "old");
    assert_eq!(proxy.picks("snapshot"), 1.0, "the first session waits for the first answer of redis");

    redis.set_weights([(&old, 0.0), (&new, 50.0)]).await;
    eventually("the weights arrive", || async { proxy.weights().len() == 2 }).await;
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "new");
    }
    assert_eq!(old.accepted(), 1);
}
