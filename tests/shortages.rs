//! Shortages of threads and descriptors: sessions go on, and failed work of the control plane is tried
//! again.

use std::fs::read_dir;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use statera::config::Config;
use statera::supervisor;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::support::{
    Backend, Peer, Program, Redis, Unprivileged, dead_address, echo, eventually, free_port, get, greeting,
    limited,
};

async fn metric_is(program: &Program, name: &str, value: f64) {
    eventually(&format!("{name} is {value}"), || async { program.metric(name, "").await == value }).await;
}

#[tokio::test]
async fn a_proxy_that_gets_no_thread_goes_on_serving_and_catches_up_afterwards() {
    let (first, second) = (Backend::named("first").await, Backend::named("second").await);
    let mut redis = Redis::start().await;
    redis.set_weights([(&first, 1.0)]).await;
    let user = Unprivileged::new();
    let state = user.folder.path().join("state");
    let url = redis.url().replace("127.0.0.1", "localhost");
    let mut program = Program::run_by(
        user.launcher(1_000),
        &format!(
            "workers: 2\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
             pools: {{web: {{weights_key: servers}}}}\nredis: {{url: \"{url}\"}}\nstate_dir: {state:?}\n"
        ),
    );
    let (listeners, admin) = program.addresses().await;
    let saved = || std::fs::read_to_string(state.join("web.table")).unwrap_or_default();
    eventually("the table is saved", || async { saved().contains(&first.address.to_string()) }).await;
    assert_eq!(greeting(listeners[0]).await.expect("it serves"), "first");

    // The limit is below the number of its threads, so no thread can be started.
    user.limit_threads(&program, 0);
    // The new table needs a thread to be saved and one to look up a backend's name.
    let name = format!("localhost:{}", second.address.port());
    redis.run(&format!("ZADD servers 2 {} 1 {name}", first.address)).await;
    program.says("the system gives no thread").await;
    // The reconnect to Redis needs a thread to look up its name.
    redis.kill();
    metric_is(&program, "statera_redis_connected", 0.0).await;
    redis.launch().await;
    redis.run(&format!("ZADD servers 0 {} 1 {name}", first.address)).await;
    for _ in 0..20 {
        assert_eq!(greeting(listeners[0]).await.expect("it serves"), "first");
        assert_eq!(get(admin, "/readyz").await.expect("an answer").status, 200, "{}", program.log());
    }
    assert!(!saved().contains(&name));

    user.limit_threads(&program, 1_000);
    program.says("the system gives threads again").await;
    eventually("the last table serves", || async {
        greeting(listeners[0]).await.is_ok_and(|is| is == "second")
    })
    .await;
    eventually("the last table is saved", || async { saved().contains(&format!("\n1.0 {name}\n")) }).await;
    metric_is(&program, "statera_redis_connected", 1.0).await;
    program.signal(Signal::TERM);
    assert_eq!(program.ends().await, Some(0), "{}", program.log());
}

#[tokio::test]
async fn a_start_with_few_threads_serves_or_ends_with_a_message() {
    let backend = Backend::echo().await;
    let user = Unprivileged::new();
    let yaml = format!(
        "workers: 2\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}, health_check: {{interval: 1s}}}}}}\n",
        backend.address
    );
    for threads in 0.. {
        let mut program = Program::run_by(user.launcher(threads), &yaml);
        match program.accepts_or_ends().await {
            None => {
                let (listeners, _) = program.addresses().await;
                assert_eq!(echo(listeners[0], b"ping").await.expect("it serves"), b"ping");
                assert!(threads >= 4, "log, control, two workers");
                break;
            }
            Some(code) => {
                assert_eq!(code, 1, "{threads} threads: {}", program.log());
                assert!(program.log().contains("statera: "), "{threads} threads: {}", program.log());
                assert!(!program.log().contains("panicked"), "{threads} threads: {}", program.log());
            }
        }
    }
}

#[tokio::test]
async fn a_start_with_few_descriptors_serves_or_ends_with_a_message() {
    let backend = Backend::echo().await;
    let yaml = format!(
        "workers: 2\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}, health_check: {{interval: 1s}}}}}}\n",
        backend.address
    );
    // With fewer descriptors the system cannot load the program itself.
    for limit in 5.. {
        let mut program = Program::run_by(limited(&[&format!("--nofile={limit}:{limit}")]), &yaml);
        match program.accepts_or_ends().await {
            None => {
                let warned = program.says("few descriptors are left").await;
                assert!(warned["left"].as_u64().expect("a number") < 64);
                break;
            }
            Some(code) => {
                assert_eq!(code, 1, "{limit} descriptors: {}", program.log());
                assert!(program.log().contains("statera: "), "{limit} descriptors: {}", program.log());
                assert!(!program.log().contains("panicked"), "{limit} descriptors: {}", program.log());
            }
        }
    }
}

/// Starts the proxy in this process, where everything that a failed start leaves behind can be counted. Each
/// round allows one more descriptor, so that the start fails at every point that needs one.
#[tokio::test]
async fn a_failed_start_leaves_nothing_behind() {
    let (_guard, dead) = dead_address();
    let state = TempDir::new().expect("a folder");
    let (web, admin) = (free_port(), free_port());
    let yaml = format!(
        "workers: 2\nadmin: {{bind: \"127.0.0.1:{admin}\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:{web}\", pool: web}}}}\n\
         pools: {{web: {{weights_key: servers, backends: {{\"{dead}\": 1, \"localhost:9\": 1}}, \
         health_check: {{interval: 1s}}}}}}\nredis: {{url: \"redis://{dead}\"}}\nstate_dir: {:?}\n",
        state.path()
    );
    let config = Config::from_yaml(&yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    let count = |folder: &str| read_dir(folder).expect("Linux has it").count();
    let (threads, descriptors) = (count("/proc/self/task"), count("/proc/self/fd"));
    let usual = getrlimit(Resource::Nofile);
    let limit =
        |soft| setrlimit(Resource::Nofile, Rlimit { current: soft, ..usual }).expect("below the hard one");
    let lowest_free = || {
        let lowest = std::fs::File::open("/dev/null").expect("a descriptor");
        u64::try_from(lowest.as_raw_fd()).expect("a number")
    };
    let mut failed = 0;
    loop {
        limit(Some(lowest_free() + failed));
        let started = supervisor::start(&config, None);
        limit(usual.current);
        let Err(error) = started else { break };
        failed += 1;
        assert!(failed < 200, "{error}");
        for port in [web, admin] {
            TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port)))
                .unwrap_or_else(|bound| panic!("after {error:?}: {port}: {bound}"));
        }
        // A thread that read state_dir may not have ended yet.
        eventually("no thread is left", || async { count("/proc/self/task") == threads }).await;
        assert_eq!(count("/proc/self/fd"), descriptors, "after {error:?}");
    }
    assert!(failed > 10, "the start failed only {failed} times");
}

#[tokio::test]
async fn clients_that_use_all_descriptors_leave_the_reserve_to_the_control_plane() {
    // The last descriptor before the reserve goes to a client or to a backend, and the log has another line
    // for each. Which it is depends on whether the program has an even number of descriptors of its own, so
    // both numbers are tried.
    for limit in [256, 257] {
        clients_use_all_descriptors(limit).await;
    }
}

async fn clients_use_all_descriptors(limit: u32) {
    const CLIENTS: usize = 150;
    let backend = Backend::echo().await;
    let mut redis = Redis::start().await;
    redis.set_weights([(&backend, 1.0)]).await;
    let state = TempDir::new().expect("a folder");
    let mut program = Program::run_by(
        limited(&[&format!("--nofile={limit}:{limit}")]),
        &format!(
            "workers: 2\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
             pools: {{web: {{weights_key: servers, health_check: {{interval: 200ms, timeout: 100ms}}, \
             connect: {{deadline: 60s}}}}}}\nredis: {{url: \"{}\"}}\nstate_dir: {:?}\n",
            redis.url().replace("127.0.0.1", "localhost"),
            state.path()
        ),
    );
    let (listeners, admin) = program.addresses().await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = Peer::connect(listeners[0]).await;
        client.say(b"ping").await;
        clients.push(client);
    }
    let cannot_accept = || !program.messages("cannot accept").is_empty();
    let cannot_connect =
        || !program.messages("nothing left on this machine for a backend connection").is_empty();
    eventually("the descriptors run out", || async { cannot_accept() || cannot_connect() }).await;
    // The first clients got a session before the descriptors ran out.
    clients[0].hears(b"ping").await;
    clients[1].hears(b"ping").await;

    // Opens more connections to the admin server than there are descriptors.
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(TcpStream::connect(admin).await.expect("the kernel takes it"));
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        for _ in 0..10 {
            assert_eq!(get(admin, path).await.expect("an answer").status, 200, "{path}");
        }
    }
    let passed = || program.metric("statera_backend_health_checks_total", "result=\"passed\"");
    let before = passed().await;
    eventually("checks go on", || async { passed().await > before + 2.0 }).await;

    redis.kill();
    metric_is(&program, "statera_redis_connected", 0.0).await;
    redis.launch().await;
    let name = format!("localhost:{}", backend.address.port());
    redis.run(&format!("ZADD servers 3 {name}")).await;
    metric_is(&program, "statera_redis_connected", 1.0).await;
    let saved = || std::fs::read_to_string(state.path().join("web.table")).unwrap_or_default();
    eventually("the table is saved", || async { saved().contains(&format!("\n3.0 {name}\n")) }).await;
    let resolved = || program.metric("statera_backend_effective_weight", &name);
    eventually("the name is resolved", || async { resolved().await > 0.0 }).await;
    // Established sessions are not affected.
    clients[0].say(b"pong").await;
    clients[0].hears(b"pong").await;

    drop(idle);
    let waiting = clients.split_off(CLIENTS / 2);
    drop(clients);
    for mut client in waiting {
        client.hears(b"ping").await;
    }
    if cannot_accept() {
        program.says("accepting again").await;
    }
    for _ in 0..20 {
        assert_eq!(echo(listeners[0], b"ping").await.expect("it serves"), b"ping");
    }
    assert!(program.messages("accept keeps failing").is_empty());
    program.signal(Signal::TERM);
    assert_eq!(program.ends().await, Some(0), "{}", program.log());
}
