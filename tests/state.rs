//! Saved tables: they serve a start without Redis, and survive kills, full disks and damaged files.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::support::{
    Backend, Program, Proxy, Redis, dead_address, eventually, greeting, next_greeting_is, require,
};

fn folder() -> TempDir {
    TempDir::new().expect("a folder")
}

/// Changes a weight every 2 ms until `over` is set. Returns how many changes were made.
fn write_until(redis: &Redis, over: &Arc<AtomicBool>) -> JoinHandle<u32> {
    let (client, over) = (redis.client(), Arc::clone(over));
    std::thread::spawn(move || {
        let mut connection = client.get_connection().expect("it runs");
        let mut weight = 0;
        while !over.load(Relaxed) {
            weight += 1;
            redis::cmd("ZADD")
                .arg("servers")
                .arg(weight)
                .arg("10.0.0.1:80")
                .exec(&mut connection)
                .expect("written");
            std::thread::sleep(Duration::from_millis(2));
        }
        weight
    })
}

#[tokio::test]
async fn the_newest_table_is_saved_before_the_proxy_ends() {
    let redis = Redis::start().await;
    for drains in [true, false] {
        let state = folder();
        let proxy = Proxy::web(&top(&redis.url(), "keep_last", state.path()), "weights_key: servers");
        let over = Arc::new(AtomicBool::new(false));
        let writer = write_until(&redis, &over);
        file_says(state.path(), " 10.0.0.1:80\n").await;
        let cell = Arc::clone(&proxy.running.observed.pools()[0].pool.cell);
        let before = cell.load().version;
        if drains {
            proxy.running.drain();
            eventually("it has ended", || async { proxy.running.has_ended() }).await;
        }
        drop(proxy);
        over.store(true, Relaxed);
        let written = writer.join().expect("it writes");
        let newest = cell.load().members()[0].weight.get();
        assert!(cell.load().version > before || !drains, "the table rested: {written} changes");
        assert!(
            saved(state.path()).contains(&format!("\n{newest:?} 10.0.0.1:80\n")),
            "{newest}: {}",
            saved(state.path())
        );
    }
}

/// Lines for the top level of a config.
fn top(url: &str, on_empty: &str, state_dir: &Path) -> String {
    format!("redis: {{url: \"{url}\", on_empty: {on_empty}, resync_interval: 1h}}\nstate_dir: {state_dir:?}")
}

fn pool(backend: &Backend) -> String {
    format!("weights_key: servers, backends: {{\"{}\": 1}}", backend.address)
}

/// A whole config, with an admin listener.
fn yaml(top: &str, pool: &str) -> String {
    format!(
        "workers: 1\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{{pool}}}}}\n{top}\n"
    )
}

fn saved(state_dir: &Path) -> String {
    fs::read_to_string(state_dir.join("web.table")).unwrap_or_default()
}

async fn file_says(state_dir: &Path, part: &str) {
    eventually(&format!("the file says {part:?}"), || async { saved(state_dir).contains(part) }).await;
}

async fn refuses(proxy: std::net::SocketAddr) -> bool {
    greeting(proxy).await.map_or(true, |name| name.is_empty())
}

#[tokio::test]
async fn a_saved_table_serves_a_start_without_redis_until_redis_answers() {
    let (kept, configured) = (Backend::named("kept").await, Backend::named("configured").await);
    let new = Backend::named("new").await;
    let (mut redis, state) = (Redis::start().await, folder());
    redis.set_weights([(&kept, 2.5)]).await;
    let top = top(&redis.url(), "keep_last", state.path());
    let proxy = Proxy::web(&top, &pool(&configured));
    next_greeting_is(proxy.address(), "kept").await;
    file_says(state.path(), &format!("\n2.5 {}\n", kept.address)).await;
    drop(proxy);

    redis.kill();
    let proxy = Proxy::web(&top, &pool(&configured));
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "kept");
    }
    assert_eq!((proxy.picks("stale"), proxy.picks("configured"), proxy.picks("snapshot")), (20.0, 0.0, 0.0));
    eventually("they are logged", || async { proxy.access_lines().len() == 20 }).await;
    for line in proxy.access_lines() {
        assert_eq!((&line["source"], &line["weight"]), (&"stale".into(), &2.5.into()), "{line}");
    }
    assert_eq!(
        proxy.metric("statera_snapshot_age_seconds{pool=\"web\"}"),
        None,
        "redis has not confirmed it"
    );

    redis.launch().await;
    redis.set_weights([(&new, 1.0)]).await;
    next_greeting_is(proxy.address(), "new").await;
    eventually("picks are fresh", || async {
        next_greeting_is(proxy.address(), "new").await;
        proxy.picks("snapshot") > 0.0
    })
    .await;
    file_says(state.path(), &new.address.to_string()).await;
    assert!(!saved(state.path()).contains(&kept.address.to_string()), "the file is the newest table alone");
    assert_eq!(configured.accepted(), 0);
}

#[tokio::test]
async fn a_saved_table_is_kept_when_redis_comes_back_empty() {
    let (kept, configured) = (Backend::named("kept").await, Backend::named("configured").await);
    let (mut redis, state) = (Redis::start().await, folder());
    redis.set_weights([(&kept, 1.0)]).await;
    let yaml = yaml(&top(&redis.url(), "keep_last", state.path()), &pool(&configured));
    let mut program = Program::run(&yaml);
    next_greeting_is(program.address().await, "kept").await;
    file_says(state.path(), &kept.address.to_string()).await;
    program.signal(Signal::KILL);
    program.wait();
    let before = saved(state.path());

    redis.kill();
    redis.launch().await;
    let program = Program::run(&yaml);
    let line = program.says("redis holds no weights, keeping the last table").await;
    assert_eq!(line["last"], "saved", "{line}");
    let address = program.addresses().await.0[0];
    for _ in 0..10 {
        assert_eq!(greeting(address).await.expect("an answer"), "kept");
    }
    assert_eq!(program.metric("statera_picks_total", "source=\"stale\"").await, 10.0);
    assert_eq!(saved(state.path()), before, "an empty redis gives nothing to save");
}

#[tokio::test]
async fn a_table_that_was_emptied_to_refuse_is_not_brought_back_by_a_start_without_redis() {
    let (gone, configured) = (Backend::named("gone").await, Backend::named("configured").await);
    let (mut redis, state) = (Redis::start().await, folder());
    redis.set_weights([(&gone, 1.0)]).await;
    let refusing = top(&redis.url(), "refuse", state.path());
    let proxy = Proxy::web(&refusing, &pool(&configured));
    next_greeting_is(proxy.address(), "gone").await;
    file_says(state.path(), &gone.address.to_string()).await;
    redis.run("DEL servers").await;
    file_says(state.path(), "\nmembers 0\n").await;
    drop(proxy);

    redis.kill();
    let (served, proxy) = (gone.accepted(), Proxy::web(&refusing, &pool(&configured)));
    for _ in 0..10 {
        assert!(refuses(proxy.address()).await, "a session was served");
    }
    assert_eq!((gone.accepted(), configured.accepted()), (served, 0));
    drop(proxy);

    // With `keep_last` the saved empty table does not refuse sessions.
    let proxy = Proxy::web(&top(&redis.url(), "keep_last", state.path()), &pool(&configured));
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "configured");
}

#[tokio::test]
async fn a_table_of_zero_weights_is_saved_and_refuses_sessions_after_a_start_without_redis() {
    let (drained, configured) = (Backend::named("drained").await, Backend::named("configured").await);
    let (mut redis, state) = (Redis::start().await, folder());
    redis.set_weights([(&drained, 0.0)]).await;
    let top = top(&redis.url(), "keep_last", state.path());
    let proxy = Proxy::web(&top, &pool(&configured));
    file_says(state.path(), &format!("\n0.0 {}\n", drained.address)).await;
    drop(proxy);
    redis.kill();
    let proxy = Proxy::web(&top, &pool(&configured));
    assert!(refuses(proxy.address()).await, "a session was served");
    assert_eq!((drained.accepted(), configured.accepted()), (0, 0));
}

#[tokio::test]
async fn without_redis_nothing_is_saved() {
    let (backend, state) = (Backend::named("backend").await, folder());
    let state_dir = state.path().join("state");
    let proxy = Proxy::web(&format!("state_dir: {state_dir:?}"), &pool(&backend));
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "backend");
    assert!(!state_dir.exists());
    assert_eq!(proxy.metric("statera_state_writes_failed_total{pool=\"web\"}"), None);
}

/// A config with a pool, a key and a listener for each name.
fn pools(names: &[&str], key_of_other: &str, configured: &Backend, top: &str) -> String {
    let mut yaml = format!("workers: 1\n{top}\nlisteners:\n");
    for name in names {
        writeln!(yaml, "  {name}: {{bind: \"127.0.0.1:0\", pool: {name}}}").expect("memory");
    }
    yaml.push_str("pools:\n");
    for name in names {
        let key = if *name == "other_key" { key_of_other } else { name };
        let backend = configured.address;
        writeln!(yaml, "  {name}: {{weights_key: {key}, backends: {{\"{backend}\": 1}}}}").expect("memory");
    }
    yaml
}

/// Pools whose files are damaged, each in another way, and the logged reason.
const DAMAGED: [(&str, &str); 9] = [
    ("cut", "it ends in the middle"),
    ("empty", "it ends in the middle"),
    ("flipped", "its checksum does not fit"),
    ("foreign", "it is not a table that Statera saved"),
    ("future", "its format has version 2, and this Statera knows 1"),
    ("other_pool", "it is of the pool cut"),
    ("other_key", "it is of the weights_key other_key"),
    ("huge", "it is larger than 64 MiB"),
    ("link", "it is a symbolic link"),
];

fn damage(folder: &Path) {
    let path = |name: &str| folder.join(format!("{name}.table"));
    let bytes = |name: &str| fs::read(path(name)).expect("it was saved");
    let write = |name: &str, bytes: &[u8]| fs::write(path(name), bytes).expect("it is ours");
    let cut = bytes("cut");
    write("other_pool", &cut);
    write("cut", &cut[..cut.len() / 2]);
    write("empty", b"");
    let mut flipped = bytes("flipped");
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    write("flipped", &flipped);
    write("foreign", b"\x7fELF\0\x01\x02");
    let future = String::from_utf8(bytes("future")).expect("a text");
    write("future", future.replacen("table 1", "table 2", 1).as_bytes());
    let huge = fs::OpenOptions::new().write(true).open(path("huge")).expect("it is ours");
    huge.set_len(100 * 1024 * 1024).expect("a hole costs nothing");
    fs::rename(path("link"), folder.join("elsewhere")).expect("it is ours");
    std::os::unix::fs::symlink(folder.join("elsewhere"), path("link")).expect("a link");
}

#[tokio::test]
async fn damaged_and_foreign_files_are_ignored_and_named_while_the_others_serve() {
    let (kept, configured) = (Backend::named("kept").await, Backend::named("configured").await);
    let (mut redis, state) = (Redis::start().await, folder());
    let names: Vec<&str> = DAMAGED.iter().map(|(name, _)| *name).chain(["good"]).collect();
    for name in &names {
        redis.run(&format!("ZADD {name} 1 {}", kept.address)).await;
    }
    let top = top(&redis.url(), "keep_last", state.path());
    let mut program = Program::run(&pools(&names, "other_key", &configured, &top));
    let is_saved = |name: &&str| {
        let text = fs::read_to_string(state.path().join(format!("{name}.table"))).unwrap_or_default();
        text.contains(&kept.address.to_string())
    };
    eventually("all are saved", || async { names.iter().all(is_saved) }).await;
    program.signal(Signal::KILL);
    program.wait();
    redis.kill();
    damage(state.path());

    let program = Program::run(&pools(&names, "another_key", &configured, &top));
    eventually("all listeners accept", || async {
        program.messages("listener accepting connections").len() == names.len()
    })
    .await;
    for (name, reason) in DAMAGED {
        let ignored = program.messages("the saved table is ignored");
        let lines: Vec<_> = ignored.iter().filter(|line| line["pool"] == name).collect();
        assert_eq!(lines.len(), 1, "{name}: {ignored:?}");
        assert_eq!(lines[0]["level"], "WARN");
        let (file, logged) = (lines[0]["file"].as_str(), lines[0]["reason"].as_str().expect("a text"));
        assert_eq!(file.map(PathBuf::from), Some(state.path().join(format!("{name}.table"))));
        assert!(logged.starts_with(reason), "{name}: {logged}");
    }
    let good = program.messages("starting with the saved table");
    assert_eq!(good.len(), 1, "{good:?}");
    assert_eq!((&good[0]["pool"], &good[0]["backends"]), (&"good".into(), &1.into()));
    for line in program.messages("listener accepting connections") {
        let wanted = if line["listener"] == "good" { "kept" } else { "configured" };
        let address = line["addresses"].as_str().expect("a text").trim_matches(['[', ']']);
        let answer = greeting(address.parse().expect("an address")).await.expect("an answer");
        assert_eq!(answer, wanted, "{line}");
    }
}

#[tokio::test]
async fn a_proxy_that_is_killed_at_any_moment_leaves_a_whole_table() {
    const MEMBERS: usize = 2_000;
    let (redis, state, configured) = (Redis::start().await, folder(), Backend::echo().await);
    let (_kept, dead) = dead_address();
    let away = top(&format!("redis://{dead}"), "keep_last", state.path());
    let mut generation = 0u32;
    let seed = crate::support::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..6 {
        let mut program =
            Program::run(&yaml(&top(&redis.url(), "keep_last", state.path()), &pool(&configured)));
        program.addresses().await;
        let before = saved(state.path());
        let ends = Instant::now() + Duration::from_millis(random.u64(200..500));
        while saved(state.path()) == before || Instant::now() < ends {
            generation += 1;
            let mut words = vec!["ZADD".to_owned(), "servers".to_owned()];
            for member in 0..MEMBERS {
                words.extend([generation.to_string(), format!("10.1.{}.{}:80", member / 250, member % 250)]);
            }
            redis.run_words(&words).await;
        }
        program.signal(Signal::KILL);
        program.wait();

        let proxy = Proxy::web(&away, &pool(&configured));
        let weights = proxy.weights();
        assert_eq!(weights.len(), MEMBERS);
        let first = weights[0].1;
        assert!(weights.iter().all(|(_, weight)| *weight == first) && first <= f64::from(generation));
        drop(proxy);
        let left: Vec<_> =
            fs::read_dir(state.path()).expect("a folder").map(|entry| entry.expect("one")).collect();
        assert_eq!(left.len(), 1, "the start removes what was left behind: {left:?}");
    }
}

/// Starts `statera` with its own file system mounted on `state_dir`.
fn with_mount(options: &str, state_dir: &Path) -> Command {
    let mut command = Command::new(require("unshare", "util-linux"));
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
    command.arg(format!("mount -t tmpfs -o {options} tmpfs \"$0\"; exec \"$@\"")).arg(state_dir);
    command.arg(Program::path());
    command
}

#[tokio::test]
async fn a_full_disk_costs_two_log_lines_and_no_session_and_tables_are_saved_once_there_is_room() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let (redis, state) = (Redis::start().await, folder());
    redis.set_weights([(&old, 1.0)]).await;
    let yaml = yaml(&top(&redis.url(), "keep_last", state.path()), "weights_key: servers");
    let program = Program::run_by(with_mount("size=256k,mode=0700", state.path()), &yaml);
    let address = program.addresses().await.0[0];
    // The path to that file system from outside the program's mount namespace.
    let path = state.path().to_str().expect("text").trim_start_matches('/');
    let inside = PathBuf::from(format!("/proc/{}/root", program.pid())).join(path);
    file_says(&inside, &old.address.to_string()).await;
    let before = saved(&inside);
    let full = fs::write(inside.join("filler"), vec![0; 1024 * 1024]).expect_err("256 kB");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);

    redis.set_weights([(&new, 1.0)]).await;
    next_greeting_is(address, "new").await;
    eventually("it is tried again", || async {
        program.metric("statera_state_writes_failed_total", "pool=\"web\"").await >= 3.0
    })
    .await;
    assert_eq!(saved(&inside), before, "the old file is whole");
    let names = fs::read_dir(&inside).expect("a folder").map(|entry| entry.expect("one").file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["filler", "web.table"], "what could not be written takes no room");
    for _ in 0..10 {
        assert_eq!(greeting(address).await.expect("an answer"), "new");
    }

    fs::remove_file(inside.join("filler")).expect("it is there");
    program.says("tables are saved again").await;
    file_says(&inside, &new.address.to_string()).await;
    let warned = program.messages("cannot save tables");
    assert_eq!((warned.len(), program.messages("tables are saved again").len()), (1, 1), "{}", program.log());
    assert_eq!((&warned[0]["level"], &warned[0]["cure"]), (&"WARN".into(), &"make room on its disk".into()));
    assert!(warned[0]["reason"].as_str().is_some_and(|reason| reason.contains("No space left")));
}

#[tokio::test]
async fn a_folder_that_is_removed_is_made_again_and_one_that_is_replaced_is_logged() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let (redis, state) = (Redis::start().await, folder());
    let state_dir = state.path().join("state");
    redis.set_weights([(&old, 1.0)]).await;
    let yaml = yaml(&top(&redis.url(), "keep_last", &state_dir), "weights_key: servers");
    let program = Program::run(&yaml);
    file_says(&state_dir, &old.address.to_string()).await;

    // The folder is replaced by a file.
    fs::rename(&state_dir, state.path().join("moved")).expect("it is ours");
    fs::write(&state_dir, "a file").expect("it is ours");
    redis.set_weights([(&new, 1.0)]).await;
    let line = program.says("cannot save tables").await;
    assert!(line["cure"].as_str().is_some_and(|cure| cure.contains("remove it")), "{line}");
    next_greeting_is(program.addresses().await.0[0], "new").await;
    fs::remove_file(&state_dir).expect("it is ours");
    program.says("tables are saved again").await;
    file_says(&state_dir, &new.address.to_string()).await;

    // The folder is removed: it is made again, and that is not logged.
    fs::remove_dir_all(&state_dir).expect("it is ours");
    redis.set_weights([(&old, 3.0)]).await;
    file_says(&state_dir, &format!("\n3.0 {}\n", old.address)).await;
    assert_eq!(program.messages("cannot save tables").len(), 1, "{}", program.log());
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_or_written_is_logged_once_and_the_start_goes_on() {
    let backend = Backend::named("backend").await;
    let (redis, state) = (Redis::start().await, folder());
    redis.set_weights([(&backend, 1.0)]).await;
    let readonly = with_mount("ro", state.path());
    for (launcher, state_dir, reason, cure) in [
        (
            Command::new(Program::path()),
            Path::new("/proc/statera"),
            "cannot make the folder",
            "check the folder",
        ),
        (readonly, state.path(), "Read-only file system", "mount it writable, or name another folder"),
    ] {
        let yaml = yaml(&top(&redis.url(), "keep_last", state_dir), "weights_key: servers");
        let program = Program::run_by(launcher, &yaml);
        let address = program.addresses().await.0[0];
        assert_eq!(greeting(address).await.expect("an answer"), "backend");
        eventually("it is tried", || async {
            program.metric("statera_state_writes_failed_total", "pool=\"web\"").await >= 2.0
        })
        .await;
        let warned = program.messages("cannot save tables");
        assert_eq!(warned.len(), 1, "{}", program.log());
        assert_eq!(
            (&warned[0]["level"], warned[0]["state_dir"].as_str()),
            (&"WARN".into(), state_dir.to_str())
        );
        let text = |field: &str| warned[0][field].as_str().unwrap_or_default().to_owned();
        assert!(text("reason").contains(reason) && text("cure").starts_with(cure), "{}", warned[0]);
    }
}

/// Starts `statera` under strace, which delays each open of these paths by 14 s. That is longer than
/// anything waits for it.
fn with_hanging(paths: &[PathBuf], traces: &Path) -> Command {
    let mut strace = Command::new(require("strace", "strace"));
    strace.args(["-D", "-ff", "-qq", "-o"]).arg(traces.join("calls"));
    for path in paths {
        strace.arg("-P").arg(path);
    }
    strace.args(["-e", "trace=/^open(at)?$", "-e", "inject=/^open(at)?$:delay_enter=14000000"]);
    strace.arg(Program::path());
    strace
}

#[tokio::test]
async fn a_disk_that_hangs_delays_the_start_and_nothing_else() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let (redis, state, traces) = (Redis::start().await, folder(), folder());
    redis.set_weights([(&old, 1.0)]).await;
    let hanging = [state.path().to_owned(), state.path().join("web.table")];
    let yaml = yaml(&top(&redis.url(), "keep_last", state.path()), "weights_key: servers");
    let begun = Instant::now();
    let mut program = Program::run_by(with_hanging(&hanging, traces.path()), &yaml);
    let address = program.addresses().await.0[0];
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(greeting(address).await.expect("an answer"), "old");
    assert_eq!(program.messages("state_dir does not answer: starting without").len(), 1, "{}", program.log());
    let warned = program.messages("cannot save tables");
    assert!(warned.iter().any(|line| line["reason"] == "the folder does not answer"), "{warned:?}");

    // The first write hangs by now; changes from Redis are still used.
    redis.set_weights([(&new, 1.0)]).await;
    next_greeting_is(address, "new").await;
    eventually("the hanging write is logged", || async {
        let warned = program.messages("cannot save tables");
        warned
            .iter()
            .any(|line| line["reason"].as_str().is_some_and(|reason| reason.contains("takes longer")))
    })
    .await;
    next_greeting_is(address, "new").await;
    program.signal(Signal::TERM);
    assert!(program.wait().success(), "{}", program.log());
}

#[tokio::test]
async fn a_burst_of_changes_costs_few_writes_each_synced_to_the_disk() {
    let (backend, redis, state) = (Backend::echo().await, Redis::start().await, folder());
    let calls = folder();
    let mut strace = Command::new(require("strace", "strace"));
    strace.args(["-D", "-ff", "-qq", "-y", "-e", "trace=/^(openat|write|flock|fsync|rename.*)$", "-o"]);
    strace.arg(calls.path().join("calls")).arg(Program::path());
    let yaml = yaml(&top(&redis.url(), "keep_last", state.path()), "weights_key: servers");
    let mut program = Program::run_by(strace, &yaml);
    program.addresses().await;
    let begun = Instant::now();
    let mut weight = 0;
    while begun.elapsed() < Duration::from_secs(1) {
        weight += 1;
        redis.run(&format!("ZADD servers {weight} {}", backend.address)).await;
        // The pause spreads the changes over a second, so that the proxy reads them one by one.
        sleep(Duration::from_millis(2)).await;
    }
    file_says(state.path(), &format!("\n{weight}.0 {}\n", backend.address)).await;
    let took = begun.elapsed();
    program.signal(Signal::TERM);
    assert!(program.wait().success(), "{}", program.log());

    let traces = fs::read_dir(calls.path()).expect("a folder").map(|entry| entry.expect("one").path());
    let traces: Vec<String> = traces.map(|path| fs::read_to_string(path).expect("a trace")).collect();
    let mut writes = 0;
    for trace in &traces {
        let lines: Vec<&str> =
            trace.lines().filter(|line| line.contains(state.path().to_str().expect("text"))).collect();
        for at in (0..lines.len()).filter(|at| lines[*at].starts_with("rename")) {
            writes += 1;
            let steps = [
                ("openat(", "O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC, 0600)"),
                ("flock(", "LOCK_EX|LOCK_NB"),
                ("write(", "statera table 1"),
                ("fsync(", ".tmp>)"),
                ("rename", "web.table\")"),
            ];
            for ((call, part), line) in steps.iter().zip(&lines[at + 1 - steps.len()..]) {
                assert!(
                    line.starts_with(call) && line.contains(part) && !line.contains("= -1"),
                    "{call}: {lines:?}"
                );
            }
            let folder =
                lines[at + 1..].iter().find(|line| line.starts_with("fsync(")).expect("the folder's");
            assert!(folder.contains(&format!("{}>) ", state.path().display())), "{folder}");
        }
    }
    let most = took.as_millis() / 100 + 2;
    assert!((3..=most).contains(&writes), "{writes} writes in {took:?} for {weight} changes");
}
