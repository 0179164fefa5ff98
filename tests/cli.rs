//! The command line: the answers to commands, and their exit codes, on which scripts rely.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{Backend, Program, Server, echo, eventually, get, output, require, soon};

/// Runs the program to its end: exit code, standard output, standard error.
async fn statera(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(Program::path());
    command.args(arguments);
    texts(output(command).await)
}

fn texts(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("a text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn config(folder: &TempDir, yaml: &str) -> String {
    let path = folder.path().join("config.yaml");
    fs::write(&path, yaml).expect("a file");
    path.to_str().expect("a text").to_owned()
}

fn folder() -> TempDir {
    TempDir::new().expect("a folder")
}

const VALID: &str =
    "listeners: {web: {bind: \"127.0.0.1:0\", pool: web}}\npools: {web: {backends: {\"127.0.0.1:9\": 1}}}\n";
const INVALID: &str = "listeners: {web: {bind: \"nowhere\", pool: wep}}\n\
                       pools:\n  web: {backends: {\"127.0.0.1:9\": -1}, idle_timeout: soon}\n\
                       workerz: 2\n";

#[tokio::test]
async fn check_says_what_a_valid_config_would_run() {
    let folder = folder();
    let path = config(&folder, VALID);
    for arguments in [["check", "-c", &path], ["check", "--config", &path]] {
        let (code, stdout, stderr) = statera(&arguments).await;
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        assert!(stdout.starts_with(&format!("{path}: valid: 1 listeners, 1 pools")), "{stdout}");
    }
    let redis = config(&folder, &format!("{VALID}redis: {{url: \"redis://:geheim@10.0.0.9/0\"}}\n"));
    let (code, stdout, _) = statera(&["check", "-c", &redis]).await;
    assert_eq!(code, Some(0));
    assert!(stdout.contains("10.0.0.9:6379") && !stdout.contains("geheim"), "{stdout}");

    let mut here = Command::new(Program::path());
    let (code, _, stderr) = texts(
        output({
            here.arg("check").current_dir(folder.path());
            here
        })
        .await,
    );
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "config.yaml here needs no -c");
}

#[tokio::test]
async fn without_any_config_the_files_that_were_looked_for_are_named() {
    let folder = folder();
    for arguments in [&["check"][..], &["run"], &["weights", "get", "web"]] {
        let mut command = Command::new(Program::path());
        command.args(arguments).current_dir(folder.path());
        let (code, _, stderr) = texts(output(command).await);
        let expected = "there is neither config.yaml nor /etc/statera/config.yaml: name a config by -c FILE";
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    }
}

#[tokio::test]
async fn an_invalid_config_is_refused_with_every_problem_and_code_2() {
    let folder = folder();
    let path = config(&folder, INVALID);
    for command in ["check", "run"] {
        let (code, stdout, stderr) = statera(&[command, "-c", &path]).await;
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{command}");
        for problem in [
            "listeners.web.bind",
            "listeners.web.pool",
            "pools.web.backends",
            "pools.web.idle_timeout",
            "workerz",
        ] {
            assert!(stderr.contains(problem), "{command}: {problem} is not named: {stderr}");
        }
        assert!(stderr.starts_with(&path) && stderr.contains("(line "), "{stderr}");
    }
}

#[tokio::test]
async fn a_config_that_is_no_file_is_refused_with_its_cure_and_code_2() {
    let folder = folder();
    let (there, missing) = (folder.path().to_str().expect("a text"), folder.path().join("none.yaml"));
    for command in ["check", "run"] {
        for (path, cure) in [
            (there, "it is a directory: name the file in it"),
            (missing.to_str().expect("a text"), "there is no such file: name the config with -c FILE"),
        ] {
            let (code, stdout, stderr) = statera(&[command, "-c", path]).await;
            assert_eq!((code, stdout.as_str()), (Some(2), ""), "{command} {path}");
            assert!(stderr.contains(path) && stderr.contains(cure), "{stderr}");
        }
    }
}

#[tokio::test]
async fn version_and_help_are_answers_and_what_is_unknown_is_code_2() {
    let version = format!("statera {}\n", env!("CARGO_PKG_VERSION"));
    for argument in ["version", "--version", "-V"] {
        assert_eq!(statera(&[argument]).await, (Some(0), version.clone(), String::new()));
    }
    for arguments in [&["--help"][..], &["help"], &["-h"]] {
        let (code, stdout, stderr) = statera(arguments).await;
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
        for command in ["run", "check", "demo", "weights", "version"] {
            assert!(stdout.contains(&format!("\n  {command} ")), "{command}: {stdout}");
        }
    }
    for arguments in [
        &["bogus"][..],
        &[],
        &["run", "--bogus"],
        &["check", "-c"],
        &["version", "x"],
        &["demo", "--seconds", "x"],
    ] {
        let (code, stdout, stderr) = statera(arguments).await;
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(!stderr.is_empty(), "{arguments:?}");
    }
}

#[tokio::test]
async fn a_closed_standard_output_is_a_failure_without_a_panic() {
    let folder = folder();
    let check = format!("check -c {}", config(&folder, VALID));
    for arguments in ["version", "--help", &check, "demo --no-redis --seconds 20"] {
        let (reader, writer) = std::io::pipe().expect("descriptors");
        drop(reader);
        let mut command = Command::new(Program::path());
        command.args(arguments.split(' ')).stderr(Stdio::piped()).stdout(writer);
        let child = tokio::process::Command::from(command).kill_on_drop(true).spawn().expect("it starts");
        let ended = soon("it ends", child.wait_with_output()).await.expect("it is ours");
        let (code, _, stderr) = texts(ended);
        assert!(!stderr.contains("panicked"), "{arguments}: {stderr}");
        assert!(code == Some(1) || arguments == "--help" && code == Some(0), "{arguments}: {code:?}");
    }
}

#[tokio::test]
async fn a_congestion_control_that_the_kernel_lacks_is_refused_with_those_it_has() {
    let folder = folder();
    for (yaml, path) in [
        (VALID.replace("pool: web", "pool: web, tcp_congestion: bogus"), "listeners.web"),
        (VALID.replace("backends:", "tcp_congestion: bogus, backends:"), "pools.web"),
    ] {
        let config = config(&folder, &yaml);
        let (code, stdout, stderr) = statera(&["run", "-c", &config]).await;
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{yaml}: {stderr}");
        assert!(stderr.starts_with(&format!("statera: {path}.tcp_congestion: bogus: ")), "{stderr}");
        assert!(stderr.contains("this kernel has ") && stderr.contains("reno"), "{stderr}");
    }
}

#[tokio::test]
async fn a_port_in_use_is_refused_with_listener_address_and_cure() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = taken.local_addr().map(|address| (taken, address)).expect("bound");
    let backend = Backend::echo().await;
    let other = Program::run(
        &format!("{VALID}admin: {{bind: \"127.0.0.1:0\"}}\n")
            .replace("127.0.0.1:9", &backend.address.to_string()),
    );
    let (listeners, admin) = other.addresses().await;
    let folder = folder();
    for address in [taken.1, listeners[0], admin] {
        let listener = config(&folder, &VALID.replace("127.0.0.1:0", &address.to_string()));
        let (code, stdout, stderr) = statera(&["run", "-c", &listener]).await;
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.starts_with(&format!("statera: listeners.web.bind: {address}: ")), "{stderr}");
        assert!(stderr.contains("another program listens there") && stderr.contains("stop it"), "{stderr}");

        let admin = config(&folder, &format!("{VALID}admin: {{bind: \"{address}\"}}\n"));
        let (code, _, stderr) = statera(&["run", "-c", &admin]).await;
        assert_eq!(code, Some(1));
        assert!(stderr.starts_with(&format!("statera: admin.bind: {address}: ")), "{stderr}");
        assert!(stderr.contains("another program listens there") && stderr.contains("stop it"), "{stderr}");
    }
    assert_eq!(echo(listeners[0], b"ping").await.expect("the first goes on"), b"ping");
}

#[tokio::test]
async fn a_port_that_this_user_may_not_bind_is_refused_with_its_cure() {
    // A copy in a folder that every user can read: other users may have no right to read the checkout.
    let folder = folder();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let program = folder.path().join("statera");
    fs::copy(Program::path(), &program).expect("there is room");
    let path = config(&folder, &VALID.replace("127.0.0.1:0", "0.0.0.0:80"));
    // In a network namespace of its own the ports below 1024 are privileged, even if a container has changed
    // that outside.
    let mut command = Command::new(require("unshare", "util-linux"));
    if rustix::process::geteuid().is_root() {
        command.args(["--net", "--"]).arg(require("setpriv", "util-linux"));
        command.args(["--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
    } else {
        command.args(["--user", "--map-current-user", "--net", "--"]);
    }
    command.arg(program).args(["run", "-c", &path]);
    let (code, stdout, stderr) = texts(output(command).await);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.starts_with("statera: listeners.web.bind: 0.0.0.0:80: "), "{stderr}");
    assert!(stderr.contains("CAP_NET_BIND_SERVICE") && stderr.contains("bind to a higher port"), "{stderr}");
}

#[tokio::test]
async fn hup_and_usr2_do_not_end_it_and_are_answered_in_the_log() {
    let backend = Backend::echo().await;
    let mut program = Program::run(
        &format!("{VALID}admin: {{bind: \"127.0.0.1:0\"}}\n")
            .replace("127.0.0.1:9", &backend.address.to_string()),
    );
    let (listeners, _) = program.addresses().await;
    for (signal, answer) in [(Signal::HUP, "reload"), (Signal::USR2, "handing over")] {
        program.signal(signal);
        eventually(answer, || async { program.log().contains(answer) }).await;
        assert_eq!(echo(listeners[0], b"ping").await.expect("it goes on"), b"ping");
    }
    program.signal(Signal::INT);
    assert_eq!(program.wait().code(), Some(0));
}

/// Starts `statera run` with standard output and standard error in two files, `out` and `err` in the folder.
fn run_with_split_output(folder: &TempDir, yaml: &str) -> Server {
    let path = config(folder, yaml);
    Server::start(|_| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "cd \"$1\"; exec \"$0\" run -c \"$2\" >out 2>err", Program::path()]);
        shell.arg(folder.path()).arg(path);
        shell
    })
}

#[tokio::test]
async fn the_log_is_json_lines_or_text_on_the_output_that_was_asked_for() {
    let backend = Backend::echo().await;
    for (format, to) in [("json", "stdout"), ("json", "stderr"), ("text", "stdout"), ("text", "stderr")] {
        let folder = folder();
        // The unreachable Redis is there for log lines of more than one level.
        let yaml = format!(
            "{VALID}log: {{format: {format}, output: {to}, level: debug}}\n\
             redis: {{url: \"redis://127.0.0.1:1\"}}\nadmin: {{bind: \"127.0.0.1:0\"}}\n"
        );
        let mut program =
            run_with_split_output(&folder, &yaml.replace("127.0.0.1:9\"", &format!("{}\"", backend.address)));
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        let (used, unused) = if to == "stdout" { ("out", "err") } else { ("err", "out") };
        let entry = || -> Option<SocketAddr> {
            let log = read(used);
            let line = log.lines().find(|line| line.contains("listener accepting connections"))?;
            line.split_once('[')?.1.split_once(']')?.0.parse().ok()
        };
        eventually("it accepts", || async { entry().is_some() }).await;
        assert_eq!(echo(entry().expect("it was there"), b"ping").await.expect("an answer"), b"ping");
        eventually("the session is logged", || async { read(used).contains("finished") }).await;
        program.signal(Signal::TERM);
        assert_eq!(program.wait().await, Some(0), "{}", read("err"));

        assert_eq!(read(unused), "", "{format} {to}");
        let log = read(used);
        assert!(log.ends_with('\n') && log.contains("stopped"), "the last lines are written too: {log}");
        for line in log.lines() {
            let json = serde_json::from_str::<serde_json::Value>(line);
            assert_eq!(json.is_ok_and(|json| json.is_object()), format == "json", "{format}: {line}");
            assert!(!line.contains('\u{1b}'), "no colours in a file: {line}");
        }
        if format == "text" {
            assert!(log.contains(" session listener=web client=127.0.0.1:"), "{log}");
        }
    }
}

#[tokio::test]
async fn log_level_error_and_access_false_leave_all_other_lines_out() {
    let backend = Backend::echo().await;
    let folder = folder();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound");
    drop(taken);
    let yaml =
        VALID.replace("127.0.0.1:0", &port.to_string()).replace("127.0.0.1:9", &backend.address.to_string());
    let mut program =
        run_with_split_output(&folder, &format!("{yaml}log: {{level: error, access: false}}\n"));
    eventually("it accepts", || async { echo(port, b"ping").await.is_ok_and(|answer| answer == b"ping") })
        .await;
    program.signal(Signal::TERM);
    assert_eq!(program.wait().await, Some(0));
    for name in ["out", "err"] {
        assert_eq!(fs::read_to_string(folder.path().join(name)).expect("a file"), "");
    }
}

/// A running `statera demo`.
struct Demo(Server);

impl Demo {
    fn start(arguments: &[&str], path: Option<&Path>) -> Self {
        Self(Server::start(|_| {
            let mut command = Command::new(Program::path());
            command.arg("demo").args(arguments);
            if let Some(path) = path {
                command.env("PATH", path);
            }
            command
        }))
    }

    /// The commands that it suggests.
    fn commands(&self) -> Vec<String> {
        let output = self.0.output();
        let lines = output.lines().filter_map(|line| {
            let (number, rest) = line.strip_prefix("  ")?.split_once("  ")?;
            number.parse::<u8>().ok()?;
            Some(rest.split_once("   #").or_else(|| rest.split_once(" #"))?.0.trim().to_owned())
        });
        lines.collect()
    }

    /// The shares in percent of each second that had sessions.
    fn shares(&self) -> Vec<[f64; 3]> {
        let output = self.0.output();
        let whole = output.rfind('\n').map_or("", |end| &output[..end]);
        let lines =
            whole.lines().filter(|line| line.starts_with("alpha ") && !line.ends_with(" of 0 sessions"));
        let shares = lines.map(|line| {
            let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).take(3).collect();
            numbers.try_into().unwrap_or_else(|_| panic!("{line}"))
        });
        shares.collect()
    }

    async fn shows_shares(&self) {
        eventually("the demo shows shares", || async { !self.shares().is_empty() }).await;
    }

    /// The pid of its redis-server.
    fn redis_pid(&self) -> Option<u32> {
        let parent = format!(" {} ", self.0.pid());
        let processes = fs::read_dir("/proc").expect("Linux");
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let is_redis = |pid: &u32| {
            // `pid (redis-server) S ppid …`
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let Some((name, rest)) = stat.split_once(") ") else { return false };
            name.contains("(redis-server") && rest.get(1..).is_some_and(|rest| rest.starts_with(&parent))
        };
        pids.into_iter().find(is_redis)
    }
}

fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.contains("(redis-server")
}

/// Checks that the shares of each second add up to 100 %.
fn assert_whole(shares: &[[f64; 3]]) {
    assert!(!shares.is_empty());
    for shares in shares {
        // Each share is rounded to a tenth.
        assert!((shares.iter().sum::<f64>() - 100.0).abs() < 0.2, "{shares:?}");
    }
}

#[tokio::test]
async fn the_demo_shows_shares_that_follow_the_commands_it_suggests() {
    let cli = require("redis-cli", "redis-tools");
    require("redis-server", "redis-server");
    let mut demo = Demo::start(&["--seconds", "60"], None);
    demo.shows_shares().await;
    let commands = demo.commands();
    assert_eq!(commands.len(), 3, "{}", demo.0.output());
    for command in &commands {
        assert!(command.starts_with("redis-cli -p "), "{command}");
    }
    let equal = demo.shares()[0];
    assert!(equal.iter().all(|share| (share - 33.3).abs() < 5.0), "{equal:?}");

    for (command, expected) in [
        (&commands[0], [60.0, 20.0, 20.0]),
        (&commands[1], [75.0, 0.0, 25.0]),
        (&commands[2], [100.0, 0.0, 0.0]),
    ] {
        let mut words = command.split(' ');
        assert_eq!(words.next(), Some("redis-cli"));
        let mut typed = Command::new(&cli);
        typed.args(words);
        assert!(output(typed).await.status.success(), "{command}");
        eventually(command, || async {
            let last = demo.shares().pop().expect("some");
            last.iter().zip(expected).all(|(share, expected)| (share - expected).abs() < 5.0)
        })
        .await;
    }
    assert_whole(&demo.shares());

    let metrics = demo.0.output();
    let metrics = metrics.lines().find_map(|line| line.strip_prefix("metrics: http://")).expect("an address");
    let address =
        metrics.strip_suffix("/metrics").and_then(|address| address.parse().ok()).expect("an address");
    assert!(get(address, "/metrics").await.expect("an answer").body.contains("statera_redis_connected"));

    let redis = demo.redis_pid().expect("it runs a redis-server");
    demo.0.signal(Signal::TERM);
    assert_eq!(demo.0.wait().await, Some(0), "{}", demo.0.output());
    assert!(is_gone(redis), "it left its redis-server behind");
}

#[tokio::test]
async fn the_demos_redis_ends_with_it_however_it_ends() {
    require("redis-server", "redis-server");
    for signal in [None, Some(Signal::INT), Some(Signal::TERM)] {
        let mut demo = Demo::start(&["--seconds", if signal.is_some() { "60" } else { "3" }], None);
        // As early as possible, as when a user types Ctrl-C at the first line.
        eventually("it runs a redis-server", || async { demo.redis_pid().is_some() }).await;
        let redis = demo.redis_pid().expect("it was there");
        if let Some(signal) = signal {
            demo.0.signal(signal);
        }
        assert_eq!(demo.0.wait().await, Some(0), "{signal:?}: {}", demo.0.output());
        assert!(is_gone(redis), "{signal:?}: it left its redis-server behind");
        if signal.is_none() {
            assert_whole(&demo.shares());
        }
    }
}

#[tokio::test]
async fn the_demo_runs_without_redis() {
    let empty = folder();
    for (arguments, path) in
        [(&["--seconds", "3", "--no-redis"][..], None), (&["--seconds", "3"], Some(empty.path()))]
    {
        let mut demo = Demo::start(arguments, path);
        demo.shows_shares().await;
        assert_eq!(demo.redis_pid(), None);
        assert_eq!(demo.0.wait().await, Some(0));
        let text = demo.0.output();
        assert_eq!(demo.commands().len(), 3, "{text}");
        assert!(demo.commands()[0].starts_with("nc 127.0.0.1 "), "{text}");
        assert!(text.contains("the weights are those of the config alone"), "{text}");
        assert_whole(&demo.shares());
    }
}

#[tokio::test]
async fn the_demo_draws_in_place_on_a_terminal() {
    let mut terminal = Command::new(require("script", "bsdutils"));
    let line = format!("{} demo --no-redis --seconds 2", Program::path());
    terminal.args(["-qec", &line, "/dev/null"]);
    let (code, text, _) = texts(output(terminal).await);
    assert_eq!(code, Some(0), "{text}");
    for part in ["alpha ", "beta ", "gamma ", "share of the last second's", "\u{2588}", "\u{1b}[4A\u{1b}[J"] {
        assert!(text.contains(part), "{part:?}: {text}");
    }
}

#[test]
fn the_readme_opens_with_the_two_commands_and_stays_short() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = fs::read_to_string(readme).expect("a README");
    let commands: Vec<&str> =
        text.lines().map(str::trim).filter(|line| line.starts_with("make ")).take(2).collect();
    assert!(
        commands.len() == 2 && commands[0].starts_with("make run") && commands[1].starts_with("make test"),
        "{commands:?}"
    );
    let first = text.lines().position(|line| line.trim().starts_with("make run")).expect("it is there");
    assert!(first < 15, "the commands come first, not on line {first}");
    assert!(text.lines().count() < 120);
}

#[tokio::test]
async fn warnings_are_printed_by_check_and_logged_at_the_start_and_refuse_nothing() {
    let folder = folder();
    let path =
        config(&folder, &VALID.replace("pools: {", "pools: {spare: {backends: {\"127.0.0.1:9\": 1}}, "));
    let (code, stdout, stderr) = statera(&["check", "-c", &path]).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("valid: 1 listeners, 2 pools"), "{stdout}");
    let warning =
        "pools.spare: no listener uses it: name it as the pool of a listener, or remove it (line 2)";
    assert_eq!(stderr, format!("warning: {warning}\n"));

    let program = Program::run(&fs::read_to_string(&path).expect("a file"));
    eventually("it accepts", || async { program.log().contains("\"listener accepting connections\"") }).await;
    let log = program.log();
    let line = log.lines().find(|line| line.contains("no listener uses it")).expect("a warning");
    let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
    assert_eq!((line["level"].as_str(), line["path"].as_str()), (Some("WARN"), Some("pools.spare")));
    assert_eq!(line["line"], 2);
}
