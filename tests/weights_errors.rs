//! `statera weights` when Redis is not what the config says: one message that names only what is at fault,
//! and a cure.

use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{Backend, Cluster, CommandOutput, Program, Redis, dead_address, info};

/// Runs `statera weights get web` with this `redis` section.
async fn get(section: &str) -> CommandOutput {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.yaml");
    let yaml = format!(
        "listeners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers}}}}\n\
         redis: {{{section}, connect_timeout: 10s, response_timeout: 10s}}\n"
    );
    std::fs::write(&path, yaml).expect("a file");
    get_by(&path).await
}

async fn get_by(config: &Path) -> CommandOutput {
    let mut command = std::process::Command::new(Program::path());
    command.args(["weights", "get", "web", "-c"]).arg(config);
    CommandOutput::of(command).await
}

/// Asserts the exit code of `get` and that its message has all these parts.
async fn ends(section: &str, code: i32, parts: &[&str]) -> CommandOutput {
    let typed = get(section).await;
    assert_eq!((typed.code, typed.stdout.as_str()), (Some(code), ""), "{section}: {}", typed.stderr);
    for part in parts {
        assert!(typed.stderr.contains(part), "{part} is missing: {}", typed.stderr);
    }
    typed
}

#[tokio::test]
async fn a_web_server_on_the_port_is_reported_once() {
    let web = Backend::start(|mut stream| async move {
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n<html></html>").await;
    })
    .await;
    let cure =
        "what answers there does not speak redis's protocol: check its address in the config's redis section";
    let typed = ends(&format!("url: \"redis://{}/0\"", web.address), 4, &[cure]).await;
    assert_eq!(typed.stderr.matches("redis's").count(), 2, "{}", typed.stderr);
    assert!(!typed.stderr.contains("Pipeline"), "{}", typed.stderr);
}

#[tokio::test]
async fn a_database_that_the_server_lacks_is_reported_with_its_cure() {
    let redis = Redis::start().await;
    let section = |database: u32| format!("url: \"{}\"", redis.url().replace("/0", &format!("/{database}")));
    ends(&section(99), 1, &["the server has fewer", "redis.url"]).await;
    redis.grant_to("bob", "on >geheim ~* +@all -select").await;
    ends(&format!("{}, username: bob, password: geheim", section(3)), 1, &["grant the ACL user +select"])
        .await;

    let node = Redis::start_with(&["--cluster-enabled", "yes"]).await;
    let url = node.url().replace("/0", "/3");
    // A cluster of Valkey may have several databases.
    let is_valkey = info(&node, "server").await.contains("valkey_version");
    let cure = if is_valkey {
        "the server has fewer"
    } else {
        "a Redis Cluster has database 0 alone: write redis.cluster"
    };
    ends(&format!("url: \"{url}\""), 1, &[cure]).await;
}

#[tokio::test]
async fn if_no_node_of_a_cluster_answers_all_are_named() {
    let ((_first, first), (_second, second)) = (dead_address(), dead_address());
    let section = format!("cluster: {{nodes: [\"{first}\", \"{second}\"]}}");
    let both = format!("no node of the cluster (redis://{first}, redis://{second}) can be asked, one says: ");
    ends(&section, 4, &[&both, "is redis.cluster right?"]).await;
}

#[tokio::test]
async fn a_dead_cluster_node_is_named_and_not_the_node_that_redirects_to_it() {
    let mut cluster = Cluster::start().await;
    let (owner, other) = (cluster.nodes[0].port, cluster.nodes[1].port);
    for node in &cluster.nodes {
        // The long timeout prevents a failover meanwhile.
        node.run("CONFIG SET cluster-node-timeout 600000").await;
    }
    cluster.nodes[0].kill();
    let typed = get(&format!("cluster: {{nodes: [\"127.0.0.1:{other}\"]}}")).await;
    assert_eq!(typed.code, Some(4), "{typed:?}");
    let blamed = format!("redis at redis://127.0.0.1:{owner} cannot be asked");
    assert!(typed.stderr.contains(&blamed), "{typed:?}");
    assert!(!typed.stderr.contains(&format!("127.0.0.1:{other}")), "{typed:?}");
}
