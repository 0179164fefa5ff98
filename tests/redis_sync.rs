//! The table follows Redis, for every kind of write, with many sets of ACL rights, and in each watch mode.

use redis::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{
    Backend, Program, Proxy, Redis, eventually, follow, greeting, info, mode_becomes, next_greeting_is,
};

/// With these settings a change arrives in time only if it is notified.
const NOTIFIED: &str = "resync_interval: 1h, on_empty: refuse";
/// Intervals short enough for a scenario.
const HASTY: &str = "resync_interval: 1s, poll_interval: 50ms, heartbeat_interval: 200ms, max_stale: 2s";

fn program(url: &str, more: &str, backends: &[&Backend], top: &str) -> Program {
    let backends: Vec<String> = backends.iter().map(|b| format!("\"{}\": 1", b.address)).collect();
    Program::run(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\npools: {{web: {{weights_key: servers, \
         backends: {{{}}}}}}}\nredis: {{url: \"{url}\", {more}}}\n{top}\n",
        backends.join(", ")
    ))
}

async fn table_becomes(proxy: &Proxy, why: &str, wanted: &[(&str, f64)]) {
    let wanted: Vec<(String, f64)> =
        wanted.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
    eventually(&format!("after {why}, the table is {wanted:?}"), || async { proxy.weights() == wanted })
        .await;
}

fn failed_reads(proxy: &Proxy) -> f64 {
    proxy.metric("statera_table_failed_reads_total{pool=\"web\"}").expect("it is counted")
}

#[tokio::test]
async fn every_kind_of_write_that_leaves_a_sorted_set_is_noticed() {
    let redis = Redis::start().await;
    notices_every_kind_of_write(&redis, NOTIFIED, "notifications").await;
}

#[tokio::test]
async fn every_kind_of_write_is_noticed_by_notifications_alone_and_by_tracking_alone() {
    let (notifying, silent) = (Redis::start().await, Redis::start_with(&[]).await);
    let alone = |watch: &str| format!("watch: {watch}, {NOTIFIED}");
    notices_every_kind_of_write(&notifying, &alone("notifications"), "notifications").await;
    notices_every_kind_of_write(&silent, &alone("tracking"), "tracking").await;
}

async fn notices_every_kind_of_write(redis: &Redis, settings: &str, mode: &str) {
    let proxy = follow(redis, settings);
    mode_becomes(&proxy, mode).await;
    let (a, b) = ("10.0.0.1:80", "10.0.0.2:80");
    redis.run("ZADD one 1 10.0.0.1:80").await;
    redis.run("ZADD two 2 10.0.0.2:80").await;
    type Step<'a> = (&'a str, &'a [(&'a str, f64)]);
    let steps: &[Step<'_>] = &[
        ("ZADD servers 5 10.0.0.1:80 6 10.0.0.2:80", &[(a, 5.0), (b, 6.0)]),
        ("ZADD servers XX GT CH 7 10.0.0.1:80", &[(a, 7.0), (b, 6.0)]),
        ("ZINCRBY servers 0.5 10.0.0.1:80", &[(a, 7.5), (b, 6.0)]),
        ("ZREM servers 10.0.0.1:80", &[(b, 6.0)]),
        ("ZREM servers 10.0.0.2:80", &[]),
        ("COPY one servers", &[(a, 1.0)]),
        ("COPY two servers REPLACE", &[(b, 2.0)]),
        ("DEL servers", &[]),
        ("ZUNIONSTORE servers 2 one two WEIGHTS 10 20", &[(a, 10.0), (b, 40.0)]),
        ("ZRANGESTORE servers two 0 -1", &[(b, 2.0)]),
        ("ZINTERSTORE servers 1 one", &[(a, 1.0)]),
        ("ZDIFFSTORE servers 2 two one", &[(b, 2.0)]),
        ("RENAME servers elsewhere", &[]),
        ("RENAME elsewhere servers", &[(b, 2.0)]),
        ("ZPOPMAX servers", &[]),
        ("MOVE one 1", &[]),
        ("ZADD servers 3 10.0.0.1:80", &[(a, 3.0)]),
        ("MOVE servers 2", &[]),
        ("ZADD servers 3 10.0.0.1:80 4 10.0.0.2:80", &[(a, 3.0), (b, 4.0)]),
        ("ZREMRANGEBYSCORE servers 3 3", &[(b, 4.0)]),
        ("ZREMRANGEBYRANK servers 0 -1", &[]),
        ("ZADD servers 3 10.0.0.1:80", &[(a, 3.0)]),
        ("UNLINK servers", &[]),
        ("ZADD servers 3 10.0.0.1:80", &[(a, 3.0)]),
        ("PEXPIRE servers 20", &[]),
        ("ZADD servers 3 10.0.0.1:80", &[(a, 3.0)]),
    ];
    for (command, wanted) in steps {
        redis.run(command).await;
        table_becomes(&proxy, command, wanted).await;
    }

    let dump = redis.run("DUMP two").await;
    let Value::BulkString(dump) = dump else { panic!("DUMP answered {dump:?}") };
    redis.run_words(&[b"RESTORE".as_slice(), b"servers", b"0", &dump, b"REPLACE"]).await;
    table_becomes(&proxy, "RESTORE", &[(b, 2.0)]).await;

    redis.run_words(&["EVAL", "return redis.call('ZADD', KEYS[1], 8, ARGV[1])", "1", "servers", a]).await;
    table_becomes(&proxy, "EVAL", &[(a, 8.0), (b, 2.0)]).await;

    let mut connection = redis.connection().await;
    let mut both = redis::pipe();
    both.atomic().cmd("ZREM").arg("servers").arg(b).cmd("ZADD").arg("servers").arg(9).arg(a);
    both.query_async::<()>(&mut connection).await.expect("a transaction");
    table_becomes(&proxy, "MULTI", &[(a, 9.0)]).await;
    assert_eq!(failed_reads(&proxy), 0.0);
}

#[tokio::test]
async fn a_key_of_another_type_is_noticed_and_the_last_table_kept_until_it_is_a_sorted_set_again() {
    for watch in ["notifications", "tracking"] {
        outlives_a_key_of_another_type(watch).await;
    }
}

async fn outlives_a_key_of_another_type(watch: &str) {
    let redis = Redis::start().await;
    redis.run("SADD a_set 10.0.0.9:80").await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    let proxy = follow(&redis, &format!("watch: {watch}, resync_interval: 1h, on_empty: keep_last"));
    table_becomes(&proxy, "the start", &[("10.0.0.1:80", 1.0)]).await;
    let overwrites = [
        "SET servers 10.0.0.9:80",
        "SUNIONSTORE servers a_set",
        "SORT a_set BY nosort STORE servers",
        "COPY a_set servers REPLACE",
    ];
    for (round, overwrite) in overwrites.iter().enumerate() {
        let (refused, before) = (failed_reads(&proxy), proxy.weights());
        redis.run(overwrite).await;
        eventually(overwrite, || async { failed_reads(&proxy) > refused }).await;
        assert_eq!(proxy.weights(), before, "after {overwrite}");

        let weight = 2.0 + round as f64;
        redis.run("DEL servers").await;
        redis.run(&format!("ZADD servers {weight} 10.0.0.1:80")).await;
        table_becomes(&proxy, overwrite, &[("10.0.0.1:80", weight)]).await;
    }
}

#[tokio::test]
async fn a_key_of_another_type_is_logged_once_with_its_name_and_cure_while_traffic_goes_on() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let redis = Redis::start().await;
    redis.set_weights([(&old, 1.0)]).await;
    let program = program(&redis.url(), HASTY, &[], "");
    let address = program.address().await;
    next_greeting_is(address, "old").await;
    redis.run("SET servers nonsense").await;
    let logged = || program.log().lines().filter(|line| line.contains("cannot read the weights")).count();
    eventually("it is logged", || async { logged() > 0 }).await;
    // Two more notified changes cause two more reads.
    redis.run("SET servers nonsense").await;
    redis.run("SET servers nonsense").await;
    for _ in 0..20 {
        assert_eq!(greeting(address).await.expect("an answer"), "old");
    }
    redis.set_weights([(&new, 1.0)]).await;
    next_greeting_is(address, "new").await;
    // The log is written a little later than the table is used.
    eventually("the end is logged", || async { program.log().contains("the table can be read again") }).await;
    let log = program.log();
    let line = log.lines().find(|line| line.contains("cannot read the weights")).expect("it was logged");
    for part in ["ERROR", "WRONGTYPE", "\"key\":\"servers\"", "\"pool\":\"web\"", "delete it and ZADD"] {
        assert!(line.contains(part), "{part} is missing: {line}");
    }
    assert_eq!(logged(), 1, "{log}");
}

#[tokio::test]
async fn a_password_alone_is_enough() {
    let redis = Redis::start_with(&["--notify-keyspace-events", "KA", "--requirepass", "secret"]).await;
    let proxy = follow(&redis, &format!("password: secret, {NOTIFIED}"));
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
}

/// Rights that are enough to follow a table by notifications.
const LEAST_RIGHTS: &str = "on >secret resetkeys %R~servers* resetchannels &__keyspace@0__:servers* nocommands +hello +auth \
                            +ping +select +client|setname +client|id +subscribe +unsubscribe +zrange +zcard +eval_ro \
                            +evalsha_ro +script|load +config|get";

#[tokio::test]
async fn the_least_rights_are_enough_for_notifications() {
    let redis = Redis::start().await;
    redis.grant(LEAST_RIGHTS).await;
    let proxy = follow(&redis, &format!("username: statera, password: secret, {NOTIFIED}"));
    mode_becomes(&proxy, "notifications").await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
    assert_eq!(proxy.metric("statera_redis_reconnects_total"), Some(0.0));
}

#[tokio::test]
async fn a_user_who_may_neither_see_the_flags_nor_subscribe_is_served_by_polling() {
    let redis = Redis::start().await;
    let rights = LEAST_RIGHTS.replace(" +config|get", "").replace(" +subscribe", "");
    redis.grant(&rights).await;
    let proxy = follow(&redis, &format!("username: statera, password: secret, {HASTY}"));
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
    mode_becomes(&proxy, "poll").await;
}

#[tokio::test]
async fn a_user_who_sees_that_notifications_are_on_but_may_not_subscribe_is_served_by_polling() {
    let redis = Redis::start().await;
    let rights = LEAST_RIGHTS.replace("&__keyspace@0__:servers*", "");
    redis.grant(&rights.replace("  ", " ")).await;
    let proxy = follow(&redis, &format!("username: statera, password: secret, {HASTY}"));
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
    mode_becomes(&proxy, "poll").await;
    assert_eq!(proxy.metric("statera_redis_reconnects_total"), Some(0.0));

    redis.run("ACL SETUSER statera &__keyspace@0__:servers*").await;
    mode_becomes(&proxy, "notifications").await;
}

#[tokio::test]
async fn the_same_key_in_another_database_is_ignored() {
    let redis = Redis::start().await;
    let url = redis.url().replace("/0", "/5");
    let proxy = Proxy::web(&format!("redis: {{url: \"{url}\", {NOTIFIED}}}"), "weights_key: servers");
    mode_becomes(&proxy, "notifications").await;
    for weight in 1..=20 {
        redis.run(&format!("ZADD servers {weight} 10.0.0.9:80")).await;
    }
    let mut followed = redis.connection().await;
    let mut write = redis::pipe();
    write.cmd("SELECT").arg(5).cmd("ZADD").arg("servers").arg(1).arg("10.0.0.1:80");
    write.query_async::<()>(&mut followed).await.expect("written");
    table_becomes(&proxy, "ZADD in database 5", &[("10.0.0.1:80", 1.0)]).await;
    // Notifications keep their order, so those of database 0 would have come before.
    assert_eq!(proxy.metric("statera_redis_notifications_total"), Some(1.0));
}

#[tokio::test]
async fn redis_behind_a_unix_socket_is_followed() {
    let folder = TempDir::new().expect("a folder");
    let socket = folder.path().join("redis.sock");
    let socket = socket.to_str().expect("text");
    let redis = Redis::start_with(&["--notify-keyspace-events", "KA", "--unixsocket", socket]).await;
    let proxy =
        Proxy::web(&format!("redis: {{url: \"unix://{socket}\", {NOTIFIED}}}"), "weights_key: servers");
    mode_becomes(&proxy, "notifications").await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
}

#[tokio::test]
async fn without_notifications_changes_are_polled_and_the_cure_is_logged_once() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let redis = Redis::start_with(&[]).await;
    redis.set_weights([(&old, 1.0)]).await;
    let program = program(&redis.url(), &format!("watch: notifications, {HASTY}"), &[], "");
    let address = program.address().await;
    next_greeting_is(address, "old").await;
    redis.set_weights([(&new, 1.0)]).await;
    next_greeting_is(address, "new").await;

    // A new connection finds the same settings, and they are not logged again.
    let connections = |log: &str| log.lines().filter(|line| line.contains("connected to redis")).count();
    redis.run("CLIENT KILL TYPE normal SKIPME yes").await;
    redis.run("CLIENT KILL TYPE pubsub").await;
    eventually("it reconnects", || async { connections(&program.log()) >= 2 }).await;
    let log = program.log();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("polling")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    for part in ["WARN", "notify-keyspace-events lacks", "redis.manage_notifications: true"] {
        assert!(warnings[0].contains(part), "{part} is missing: {}", warnings[0]);
    }
    assert_eq!(
        redis.run("CONFIG GET notify-keyspace-events").await,
        config_answer(""),
        "the proxy changed a setting that it may not manage"
    );
}

fn config_answer(flags: &str) -> Value {
    let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
    Value::Array(vec![text("notify-keyspace-events"), text(flags)])
}

#[tokio::test]
async fn manage_notifications_adds_what_is_missing_and_keeps_what_is_there() {
    let redis = Redis::start_with(&["--notify-keyspace-events", "Ext"]).await;
    let proxy = follow(&redis, &format!("manage_notifications: true, {NOTIFIED}"));
    mode_becomes(&proxy, "notifications").await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
    let Value::Array(answer) = redis.run("CONFIG GET notify-keyspace-events").await else {
        panic!("no answer")
    };
    let Some(Value::BulkString(flags)) = answer.get(1) else { panic!("{answer:?}") };
    let flags = String::from_utf8_lossy(flags);
    assert!("ExtKgz$ls".chars().all(|flag| flags.contains(flag)), "{flags}");
}

#[tokio::test]
async fn manage_notifications_that_redis_refuses_ends_in_polling() {
    let redis = Redis::start_with(&[]).await;
    redis.grant(LEAST_RIGHTS).await;
    let proxy =
        follow(&redis, &format!("username: statera, password: secret, manage_notifications: true, {HASTY}"));
    mode_becomes(&proxy, "poll").await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    table_becomes(&proxy, "ZADD", &[("10.0.0.1:80", 1.0)]).await;
}

#[tokio::test]
async fn a_burst_of_changes_costs_few_reads_and_ends_at_the_right_table() {
    const CHANGES: usize = 10_000;
    let redis = Redis::start().await;
    let proxy = follow(&redis, NOTIFIED);
    mode_becomes(&proxy, "notifications").await;
    let reads = || proxy.metric("statera_redis_resyncs_total").expect("it is counted");
    let before = reads();
    let mut burst = redis::pipe();
    for change in 0..CHANGES {
        burst.cmd("ZADD").arg("servers").arg(1 + change).arg(format!("10.0.0.{}:80", change % 100)).ignore();
    }
    let mut connection = redis.connection().await;
    burst.query_async::<()>(&mut connection).await.expect("written");
    let mut wanted: Vec<(String, f64)> = (CHANGES - 100..CHANGES)
        .map(|change| (format!("10.0.0.{}:80", change % 100), 1.0 + change as f64))
        .collect();
    wanted.sort_by(|a, b| a.0.cmp(&b.0));
    eventually("the last weights arrive", || async { proxy.weights() == wanted }).await;
    eventually("every change was notified", || async {
        proxy.metric("statera_redis_notifications_total") == Some(CHANGES as f64)
    })
    .await;
    let reads = reads() - before;
    assert!((1.0..=CHANGES as f64 / 10.0).contains(&reads), "{reads} reads");
}

#[tokio::test]
async fn pools_of_one_redis_each_follow_their_key_and_may_share_one() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{a: {{bind: \"127.0.0.1:0\", pool: one}}}}\nredis: {{url: \"{}\", {NOTIFIED}}}\n\
         pools: {{one: {{weights_key: shared}}, two: {{weights_key: own}}, three: {{weights_key: shared}}}}\n",
        redis.url()
    ));
    mode_becomes(&proxy, "notifications").await;
    let weights = || {
        let weight = |pool: usize| {
            proxy.running.observed.pools()[pool].pool.cell.load().members().first().map(|m| m.weight.get())
        };
        [weight(0), weight(1), weight(2)]
    };
    redis.run("ZADD shared 1 10.0.0.1:80").await;
    eventually("both pools see it", || async { weights() == [Some(1.0), None, Some(1.0)] }).await;
    redis.run("ZADD own 2 10.0.0.1:80").await;
    eventually("the third sees its own", || async { weights() == [Some(1.0), Some(2.0), Some(1.0)] }).await;
    redis.run("ZADD shared 3 10.0.0.1:80").await;
    eventually("both pools see it", || async { weights() == [Some(3.0), Some(2.0), Some(3.0)] }).await;
}

#[tokio::test]
async fn a_wrong_password_is_logged_once_and_the_table_is_read_once_it_is_right() {
    let (configured, new) = (Backend::named("configured").await, Backend::named("new").await);
    let redis = Redis::start_with(&["--notify-keyspace-events", "KA", "--requirepass", "secret"]).await;
    redis.set_weights([(&new, 1.0)]).await;
    let program = program(&redis.url(), "password: wr0ng-one", &[&configured], "");
    let address = program.address().await;
    assert_eq!(greeting(address).await.expect("an answer"), "configured");

    eventually("it tries again", || async { refused_logins(&redis).await >= 6 }).await;
    assert_eq!(greeting(address).await.expect("an answer"), "configured");
    let log = program.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("cannot connect to redis")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("check redis.username and redis.password"), "{}", lines[0]);
    assert!(!log.contains("wr0ng-one"), "the password is in the log: {log}");

    redis.run("ACL SETUSER default >wr0ng-one").await;
    next_greeting_is(address, "new").await;
}

async fn refused_logins(redis: &Redis) -> u64 {
    let Value::BulkString(info) = redis.run("INFO stats").await else { return 0 };
    let info = String::from_utf8_lossy(&info).into_owned();
    let line = info.lines().find_map(|line| line.strip_prefix("acl_access_denied_auth:"));
    // Redis 7.0 does not count refused logins; each try is a connection, so connections are counted instead.
    let line =
        line.or_else(|| info.lines().find_map(|line| line.strip_prefix("total_connections_received:")));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

const HOSTILE: [(&[u8], &str); 8] = [
    (b"10.0.0.2:80", "inf"),
    (b"10.0.0.3:80", "-1"),
    (b"10.0.0.4:80", "-inf"),
    (b"no-port", "1"),
    (b"\xff\xfe:80", "1"),
    (b"", "1"),
    (b"\x1b[2J\x1b]0;owned\x07:80", "1"),
    (b"a:80\n{\"level\":\"ERROR\",\"message\":\"forged\"}\r\nb:80", "1"),
];

async fn write_hostile(redis: &Redis) {
    let mut words: Vec<&[u8]> = vec![b"ZADD", b"servers"];
    for (member, score) in HOSTILE {
        words.extend([score.as_bytes(), member]);
    }
    redis.run_words(&words).await;
}

#[tokio::test]
async fn hostile_members_are_left_out_and_counted_and_the_others_work() {
    let good = Backend::named("good").await;
    let redis = Redis::start().await;
    redis.set_weights([(&good, 1.0)]).await;
    write_hostile(&redis).await;
    let proxy = follow(&redis, NOTIFIED);
    let series = "statera_table_rejected_members{pool=\"web\"}";
    eventually("they are counted", || async { proxy.metric(series) == Some(HOSTILE.len() as f64) }).await;
    assert_eq!(proxy.weights(), [(good.address.to_string(), 1.0)]);
    for _ in 0..20 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "good");
    }
    redis.set_weights([(&good, 2.0)]).await;
    eventually("the count goes back", || async { proxy.metric(series) == Some(0.0) }).await;
}

#[tokio::test]
async fn hostile_members_reach_no_terminal_and_forge_no_line() {
    let good = Backend::named("good").await;
    let redis = Redis::start().await;
    redis.set_weights([(&good, 1.0)]).await;
    write_hostile(&redis).await;
    for format in ["json", "text"] {
        let program = program(&redis.url(), HASTY, &[], &format!("log: {{format: {format}, level: debug}}"));
        let logged = || program.log().matches("a member is left out").count();
        eventually("they are logged", || async { logged() >= HOSTILE.len() }).await;
        // Further reads of the same table must not log the members again.
        let reads = || async { info(&redis, "commandstats").await.contains("cmdstat_zrange:") };
        eventually("it reads", reads).await;
        let log = program.log();
        assert!(!log.chars().any(|c| c.is_control() && c != '\n'), "{log:?}");
        for line in log.lines() {
            let is_log_line = match format {
                "json" => line.starts_with("{\"time\":"),
                _ => line.starts_with("20"),
            };
            assert!(is_log_line, "{line:?}");
        }
        assert_eq!(logged(), HOSTILE.len(), "{log}");
    }
}

#[tokio::test]
async fn a_writer_that_flips_the_table_costs_only_a_few_log_lines() {
    let redis = Redis::start().await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    let program = program(&redis.url(), NOTIFIED, &[], "");
    program.address().await;
    let mut connection = redis.connection().await;
    for round in 0..500 {
        let mut flip = redis::pipe();
        flip.atomic().cmd("DEL").arg("servers");
        // Bad members of two alternating kinds, and in every third round an empty table.
        for member in (0..12).filter(|_| round % 3 > 0) {
            flip.cmd("ZADD").arg("servers").arg(1).arg(format!("bad{}-{member}", round % 2));
        }
        if round % 3 == 2 {
            flip.cmd("ZADD").arg("servers").arg(round).arg("10.0.0.1:80");
        }
        flip.query_async::<()>(&mut connection).await.expect("written");
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let log = program.log();
    let about = |message: &str| log.matches(message).count();
    let (left_out, states) = (about("left out"), about("redis holds"));
    // The rounds take a second or two. On a slow machine they may reach into a second window of the log
    // limiter.
    assert!((1..=22).contains(&left_out), "{left_out} lines on members:\n{log}");
    assert!((1..=8).contains(&states), "{states} lines on states:\n{log}");
}

#[tokio::test]
async fn an_emptied_table_that_is_filled_again_is_logged() {
    let redis = Redis::start().await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    let program = program(&redis.url(), NOTIFIED, &[], "");
    program.address().await;
    redis.run("DEL servers").await;
    program.says("redis holds no weights").await;
    redis.run("ZADD servers 1 10.0.0.1:80").await;
    program.says("redis holds weights again").await;
    assert!(!program.log().contains("can be read again"), "{}", program.log());
}

#[tokio::test]
async fn ten_thousand_members_are_followed() {
    let redis = Redis::start().await;
    let proxy = follow(&redis, NOTIFIED);
    mode_becomes(&proxy, "notifications").await;
    let mut words = vec!["ZADD".to_owned(), "servers".to_owned()];
    for member in 0..10_000 {
        words.extend(["1".to_owned(), format!("10.1.{}.{}:80", member / 250, member % 250)]);
    }
    redis.run_words(&words).await;
    eventually("all arrive", || async { proxy.weights().len() == 10_000 }).await;
    redis.run("ZADD servers 77.5 10.1.39.249:80").await;
    eventually("one change arrives", || async {
        proxy.weights().contains(&("10.1.39.249:80".to_owned(), 77.5))
    })
    .await;
    redis.run("ZREM servers 10.1.39.249:80").await;
    eventually("one less", || async { proxy.weights().len() == 9_999 }).await;
}

#[tokio::test]
async fn a_table_of_zero_weights_refuses_and_counts_sessions_and_is_not_taken_for_equal_weights() {
    let (a, b) = (Backend::named("a").await, Backend::named("b").await);
    let redis = Redis::start().await;
    redis.set_weights([(&a, 0.0), (&b, 0.0)]).await;
    let proxy = follow(&redis, NOTIFIED);
    eventually("the table arrives", || async { proxy.weights().len() == 2 }).await;
    for _ in 0..20 {
        assert!(!matches!(greeting(proxy.address()).await.as_deref(), Ok("a" | "b")), "a session was served");
    }
    let refused = "statera_sessions_closed_total{reason=\"no_backend\"}";
    eventually("they are counted", || async { proxy.metric(refused) == Some(20.0) }).await;
    assert_eq!((a.accepted(), b.accepted()), (0, 0));
    eventually("they are logged", || async { proxy.access_lines().len() == 20 }).await;
    assert!(
        proxy.access_lines().iter().all(|line| line["close_reason"] == "no_backend" && line["term"] == "SC")
    );

    redis.set_weights([(&a, 0.0), (&b, 0.1)]).await;
    next_greeting_is(proxy.address(), "b").await;
    assert_eq!(a.accepted(), 0);
}

/// The log lines of a table that is lost.
struct Messages {
    /// The level of `keeping`; `refusing` is always an error.
    level: &'static str,
    /// Logged if `redis.on_empty` keeps the last table.
    keeping: &'static str,
    /// Logged if `redis.on_empty` refuses sessions.
    refusing: &'static str,
    /// Logged when the table is back.
    mended: &'static str,
}

const EMPTY: Messages = Messages {
    level: "WARN",
    keeping: "redis holds no weights, keeping the last table",
    refusing: "redis holds no weights, refusing sessions (redis.on_empty)",
    mended: "redis holds weights again",
};
const OVERWRITTEN: Messages = Messages {
    level: "ERROR",
    keeping: "cannot read the weights, keeping the last table",
    refusing: "cannot read the weights, refusing sessions (redis.on_empty)",
    mended: "the table can be read again",
};

/// Commands that make a table without its only member, `{}`, and the log lines of each.
const EMPTYINGS: [(&str, Messages); 5] = [
    ("ZREM servers {}", EMPTY),
    ("DEL servers", EMPTY),
    ("RENAME servers elsewhere", EMPTY),
    ("PEXPIRE servers 20", EMPTY),
    ("SET servers nonsense", OVERWRITTEN),
];

#[tokio::test]
async fn a_table_that_is_emptied_expires_or_is_overwritten_is_kept_or_refused_as_the_config_says() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    for (emptying, messages) in EMPTYINGS {
        redis.set_weights([(&backend, 1.0)]).await;
        // Each command gets new programs, since the log limiter of a program holds back repeated lines.
        let keeping = program(&redis.url(), "resync_interval: 1h, on_empty: keep_last", &[], "");
        let refusing = program(&redis.url(), NOTIFIED, &[], "");
        let (kept, refused) = (keeping.address().await, refusing.address().await);
        next_greeting_is(kept, "backend").await;
        next_greeting_is(refused, "backend").await;

        redis.run(&emptying.replace("{}", &backend.address.to_string())).await;
        for (program, message, level) in
            [(&keeping, messages.keeping, messages.level), (&refusing, messages.refusing, "ERROR")]
        {
            let line = program.says(message).await;
            assert_eq!((&line["level"], &line["key"]), (&level.into(), &"servers".into()), "{line}");
        }
        let accepted = backend.accepted();
        for _ in 0..10 {
            assert!(
                greeting(refused).await.map_or(true, |name| name.is_empty()),
                "{emptying}: it was served"
            );
        }
        assert_eq!(backend.accepted(), accepted, "{emptying}");
        for _ in 0..10 {
            assert_eq!(greeting(kept).await.expect("an answer"), "backend", "{emptying}");
        }

        redis.set_weights([(&backend, 2.0)]).await;
        next_greeting_is(refused, "backend").await;
        for (program, message) in [(&keeping, messages.keeping), (&refusing, messages.refusing)] {
            program.says(messages.mended).await;
            assert_eq!(program.messages(message).len(), 1, "{emptying}: {}", program.log());
        }
    }
}

#[tokio::test]
async fn sessions_outlive_every_change_of_their_backends_weight() {
    let (old, new) = (Backend::echo().await, Backend::named("new").await);
    let redis = Redis::start().await;
    redis.set_weights([(&old, 1.0)]).await;
    let proxy = follow(&redis, NOTIFIED);
    let mut session = TcpStream::connect(proxy.address()).await.expect("it accepts");
    let mut beat = async || {
        let mut answer = [0; 4];
        session.write_all(b"ping").await.expect("the session lives");
        tokio::time::timeout(crate::support::PATIENCE, session.read_exact(&mut answer))
            .await
            .expect("an answer in time")
            .expect("the session lives");
        assert_eq!(&answer, b"ping");
    };
    beat().await;
    let (old_id, new_id) = (old.address.to_string(), new.address.to_string());
    let weight =
        |id: &str| proxy.weights().into_iter().find(|(name, _)| name == id).map(|(_, weight)| weight);
    redis.run(&format!("ZADD servers 500 {old_id} 1 {new_id}")).await;
    eventually("it weighs more", || async { weight(&old_id) == Some(500.0) }).await;
    beat().await;
    redis.run(&format!("ZADD servers 0 {old_id}")).await;
    eventually("it weighs nothing", || async { weight(&old_id) == Some(0.0) }).await;
    beat().await;
    redis.run(&format!("ZREM servers {old_id}")).await;
    eventually("it is gone", || async { weight(&old_id).is_none() }).await;
    beat().await;
    let active = format!("statera_backend_connections_active{{pool=\"web\",backend=\"{old_id}\"}}");
    assert_eq!(proxy.metric(&active), Some(1.0), "its series stay as long as its session");
    drop(session);
    eventually("its series go with its session", || async { proxy.metric(&active).is_none() }).await;
}

#[tokio::test]
async fn a_backend_at_weight_zero_gets_no_new_sessions() {
    let (open, closed) = (Backend::named("open").await, Backend::named("closed").await);
    let redis = Redis::start().await;
    redis.set_weights([(&open, 1.0), (&closed, 100.0)]).await;
    let proxy = follow(&redis, NOTIFIED);
    next_greeting_is(proxy.address(), "closed").await;
    redis.run(&format!("ZADD servers 0 {}", closed.address)).await;
    eventually("the change settles", || async {
        proxy.weights().contains(&(closed.address.to_string(), 0.0))
    })
    .await;
    let before = closed.accepted();
    for _ in 0..100 {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "open");
    }
    assert_eq!(closed.accepted(), before);
}

#[tokio::test]
async fn a_redis_that_is_down_at_the_start_is_followed_once_it_is_up() {
    let (configured, new) = (Backend::named("configured").await, Backend::named("new").await);
    let mut redis = Redis::start().await;
    redis.kill();
    let proxy = Proxy::web(
        &format!("redis: {{url: \"{}\"}}", redis.url()),
        &format!("weights_key: servers, backends: {{\"{}\": 1}}", configured.address),
    );
    assert_eq!(greeting(proxy.address()).await.expect("an answer"), "configured");
    assert_eq!(proxy.metric("statera_redis_connected"), Some(0.0));
    assert_eq!(proxy.picks("configured"), 1.0);
    redis.launch().await;
    redis.set_weights([(&new, 1.0)]).await;
    next_greeting_is(proxy.address(), "new").await;
    // The table may have come by the Lua pick, before the watching connection was up.
    eventually("it is connected", || async { proxy.metric("statera_redis_connected") == Some(1.0) }).await;
}

#[tokio::test]
async fn a_table_that_does_not_change_stays_fresh_by_heartbeats_alone() {
    let backend = Backend::named("backend").await;
    let redis = Redis::start().await;
    redis.set_weights([(&backend, 1.0)]).await;
    let proxy = follow(&redis, "heartbeat_interval: 100ms, max_stale: 1500ms, resync_interval: 1h");
    next_greeting_is(proxy.address(), "backend").await;
    let begun = tokio::time::Instant::now();
    eventually("twice max_stale is over", || async {
        assert_eq!(greeting(proxy.address()).await.expect("an answer"), "backend");
        begun.elapsed().as_secs() >= 3
    })
    .await;
    assert_eq!((proxy.picks("stale"), proxy.picks("lua")), (0.0, 0.0));
    assert_eq!(proxy.metric("statera_redis_resyncs_total"), Some(1.0));
}
