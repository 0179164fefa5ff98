//! Invalid answers from Redis and oversized tables: the log names the cause and the cure, memory stays
//! bounded, and the last table goes on serving.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Duration, sleep};

use crate::support::{Backend, Program, Redis, ScriptedRedis, calls, eventually, greeting, sum_of};

/// Reads the table every 20 ms, with timeouts long enough for a busy machine.
const POLLED: &str = "watch: poll, poll_interval: 20ms, connect_timeout: 10s, response_timeout: 10s";

/// Starts the program with the pool `web` on the key `servers` and the pool `other` on the key `others`.
fn program(port: u16, more: &str, configured: &Backend) -> Program {
    Program::run(&format!(
        "workers: 1\nadmin: {{bind: \"127.0.0.1:0\"}}\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools:\n  web: {{weights_key: servers, backends: {{\"{}\": 1}}}}\n  other: {{weights_key: others}}\n\
         redis: {{url: \"redis://127.0.0.1:{port}/0\", {more}}}\n\
         lua_pick: {{timeout: 2500ms}}\n",
        configured.address
    ))
}

async fn serves(program: &Program, wanted: &str) {
    let address = program.addresses().await.0[0];
    eventually(&format!("sessions reach {wanted}"), || async {
        greeting(address).await.is_ok_and(|name| name == wanted)
    })
    .await;
}

/// Runs twenty sessions, one after the other.
async fn goes_on_serving(program: &Program, wanted: &str) {
    let address = program.addresses().await.0[0];
    for _ in 0..20 {
        assert_eq!(greeting(address).await.expect("an answer"), wanted);
    }
}

async fn weight_of_pool_becomes(program: &Program, pool: &str, wanted: f64) {
    let label = format!("pool=\"{pool}\"");
    eventually(&format!("{pool} has the weight {wanted}"), || async {
        sum_of(&program.metrics().await, "statera_backend_weight", &label) == wanted
    })
    .await;
}

async fn failed_reads(program: &Program) -> f64 {
    program.metric("statera_table_failed_reads_total", "pool=\"web\"").await
}

fn one_member(backend: &Backend, weight: u32) -> Vec<u8> {
    let name = backend.address.to_string();
    format!("*1\r\n*2\r\n${}\r\n{name}\r\n,{weight}\r\n", name.len()).into()
}

/// Valid replies of the protocol that are no list of members with scores.
const WRONG_SHAPES: [&str; 9] = [
    ":3\r\n",
    "+OK\r\n",
    "_\r\n",
    "$11\r\n10.0.0.1:80\r\n",
    "%1\r\n$11\r\n10.0.0.1:80\r\n,1\r\n",
    "*3\r\n$11\r\n10.0.0.1:80\r\n$1\r\n1\r\n$11\r\n10.0.0.2:80\r\n",
    "*1\r\n*1\r\n$11\r\n10.0.0.1:80\r\n",
    "*1\r\n*2\r\n*1\r\n$11\r\n10.0.0.1:80\r\n,1\r\n",
    "*2\r\n*2\r\n$11\r\n10.0.0.1:80\r\n,1\r\n:7\r\n",
];

#[tokio::test]
async fn a_reply_of_the_wrong_shape_is_named_and_the_last_table_serves() {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let redis = ScriptedRedis::answering(&one_member(&known, 1));
    let program = program(redis.port, POLLED, &configured);
    serves(&program, "known").await;
    for (weight, shape) in (2..).zip(WRONG_SHAPES) {
        let failed = failed_reads(&program).await;
        redis.answer(shape.as_bytes());
        eventually(shape, || async { failed_reads(&program).await > failed }).await;
        assert_eq!(greeting(program.addresses().await.0[0]).await.expect("an answer"), "known", "{shape:?}");
        redis.answer(&one_member(&known, weight));
        weight_of_pool_becomes(&program, "web", f64::from(weight)).await;
    }
    let line = program.says("cannot read the weights, keeping the last table").await;
    let reason = line["reason"].as_str().expect("a text");
    assert!(reason.contains("not a list of members and scores: check what stands between"), "{reason}");
    assert_eq!(program.metric("statera_redis_reconnects_total", "").await, 0.0, "the connection is sound");
}

#[tokio::test]
async fn a_reply_that_breaks_the_protocol_is_named_and_the_last_table_serves() {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let redis = ScriptedRedis::answering(&one_member(&known, 1));
    let program = program(redis.port, POLLED, &configured);
    serves(&program, "known").await;
    let nested = "*1\r\n".repeat(10_000);
    let broken = ["?3\r\n", "*1\r\n$abc\r\n", "$3\r\n10.0.0.1:80\r\n", ",one\r\n", nested.as_str(), ""];
    for (weight, answer) in (2..).zip(broken) {
        let reconnects = program.metric("statera_redis_reconnects_total", "").await;
        redis.answer(answer.as_bytes());
        eventually("it connects again", || async {
            program.metric("statera_redis_reconnects_total", "").await > reconnects
        })
        .await;
        goes_on_serving(&program, "known").await;
        redis.answer(&one_member(&known, weight));
        weight_of_pool_becomes(&program, "web", f64::from(weight)).await;
    }
    program.says("connection to redis lost, picking from the last snapshots").await;
}

#[tokio::test]
async fn a_reply_that_announces_more_than_the_limit_is_refused_before_it_is_read() {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let redis = ScriptedRedis::answering(&one_member(&known, 1));
    let program = program(redis.port, POLLED, &configured);
    serves(&program, "known").await;
    let before = program.peak_kilobytes();
    // A line without an end, of which more than the limit is really sent.
    let flood = [b"+".as_slice(), &vec![b'x'; 64 << 20]].concat();
    let announced: [&[u8]; 4] = [b"$536870912\r\nx", b"*1000000000\r\n", b"*1\r\n%4000000000\r\n", &flood];
    for (weight, answer) in (2..).zip(announced) {
        let failed = failed_reads(&program).await;
        redis.answer(answer);
        eventually("it is refused", || async { failed_reads(&program).await > failed }).await;
        goes_on_serving(&program, "known").await;
        redis.answer(&one_member(&known, weight));
        weight_of_pool_becomes(&program, "web", f64::from(weight)).await;
    }
    let line = program.says("cannot read the weights, keeping the last table").await;
    let reason = line["reason"].as_str().expect("a text");
    for part in ["more than 16 MiB or 500000 values", "remove the members that are no addresses"] {
        assert!(reason.contains(part), "{part} is missing: {reason}");
    }
    let grown = program.peak_kilobytes().saturating_sub(before);
    assert!(grown < 40_000, "{grown} kB more");
}

#[tokio::test]
async fn a_reply_that_never_completes_is_named_after_the_second_time() {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let redis = ScriptedRedis::answering(&one_member(&known, 1));
    let settings = POLLED.replace("response_timeout: 10s", "response_timeout: 500ms");
    let program = program(redis.port, &settings, &configured);
    serves(&program, "known").await;
    let whole = one_member(&known, 2);
    redis.answer(&whole[..whole.len() - 1]);
    let line = program.says("cannot read the weights, keeping the last table").await;
    let reason = line["reason"].as_str().expect("a text");
    assert!(reason.contains("in time, twice: raise redis.response_timeout"), "{reason}");
    goes_on_serving(&program, "known").await;
    redis.answer(&whole);
    weight_of_pool_becomes(&program, "web", 2.0).await;
    program.says("the table can be read again").await;
    // The failed read is logged for the pool, and not a second time for the connection.
    for line in ["cannot connect to redis", "cannot follow redis"] {
        assert!(program.messages(line).is_empty(), "{}", program.log());
    }
}

/// With notifications, Redis itself closes the connection: its output buffer for a subscriber is smaller
/// than the answer.
#[tokio::test]
async fn a_member_of_100_mb_that_redis_does_not_send_is_named_and_costs_no_stream_of_reads() {
    outlives_a_giant("notifications", "the connection is closed whenever the table is asked for").await;
}

#[tokio::test]
async fn a_member_of_100_mb_that_redis_sends_is_named_and_costs_no_memory() {
    outlives_a_giant("tracking", "more than 16 MiB or 500000 values").await;
}

async fn outlives_a_giant(watch: &str, reason: &str) {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let redis = Redis::start().await;
    redis.set_weights([(&known, 1.0)]).await;
    // With a short `max_stale` the snapshot becomes stale and the proxy asks Redis to pick.
    let settings = format!("watch: {watch}, max_stale: 2s, response_timeout: 10s");
    let program = program(redis.port, &settings, &configured);
    serves(&program, "known").await;
    let (before, failed) = (program.peak_kilobytes(), failed_reads(&program).await);
    let giant = vec![b'x'; 100_000_000];
    redis.run_words(&[b"ZADD".as_slice(), b"servers", b"1", &giant]).await;
    let line = program.says("cannot read the weights, keeping the last table").await;
    let logged = line["reason"].as_str().expect("a text");
    assert!(
        logged.contains(reason) && logged.contains("remove the members that are no addresses"),
        "{logged}"
    );

    // Meanwhile changes of the other pool's table still arrive.
    for weight in 1..=20 {
        redis.run(&format!("ZADD others {weight} 10.0.0.1:80")).await;
        weight_of_pool_becomes(&program, "other", f64::from(weight)).await;
    }
    let address = program.addresses().await.0[0];
    eventually("the snapshot is stale", || async {
        assert_eq!(greeting(address).await.expect("an answer"), "known");
        program.metric("statera_picks_total", "source=\"stale\"").await > 100.0
    })
    .await;
    // More than 100 sessions needed a pick. After an answer with oversized members Redis is seldom asked
    // again.
    let asked = calls(&redis, if Redis::is_before_7() { "evalsha" } else { "evalsha_ro" }).await;
    assert!(asked <= 10, "{asked} questions");
    assert_eq!(program.metric("statera_picks_total", "source=\"lua\"").await, 0.0);
    let grown = program.peak_kilobytes().saturating_sub(before);
    assert!(grown < 20_000, "{grown} kB more");
    let failed = failed_reads(&program).await - failed;
    assert!(failed <= 12.0, "{failed} reads of what is too large in a few seconds");

    redis.run_words(&[b"ZREM".as_slice(), b"servers", &giant]).await;
    redis.run(&format!("ZADD servers 7 {}", known.address)).await;
    weight_of_pool_becomes(&program, "web", 7.0).await;
    program.says("the table can be read again").await;
    println!("{failed} reads, {asked} questions, {grown} kB");
}

/// Fills the key `filled` with `members` members. A test renames it to a table's key, which is one change.
async fn fill(redis: &Redis, members: u32) {
    // In pieces: while a script runs for more than five seconds, Redis answers BUSY to all other commands.
    const PIECE: u32 = 100_000;
    let script = "for i = ARGV[1], ARGV[2] do redis.call('ZADD', KEYS[1], 1, \
                  '10.' .. math.floor(i / 62500) .. '.' .. math.floor(i / 250) % 250 .. '.' .. i % 250 .. ':80') end";
    for from in (1..=members).step_by(PIECE as usize) {
        let (from, to) = (from.to_string(), members.min(from + PIECE - 1).to_string());
        redis.run_words(&["EVAL", script, "1", "filled", &from, &to]).await;
    }
}

#[tokio::test]
async fn a_million_members_are_refused_once_counted_from_then_on_and_the_last_table_serves() {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let redis = Redis::start().await;
    redis.set_weights([(&known, 1.0)]).await;
    // No full reads within the scenario: a read of the other pool's key would be counted too.
    let settings = "max_stale: 2h, resync_interval: 1h, response_timeout: 20s";
    let program = program(redis.port, settings, &configured);
    serves(&program, "known").await;
    program.says("redis holds no weights").await;
    let before = program.peak_kilobytes();
    fill(&redis, 1_000_000).await;
    let reads = calls(&redis, "zrange").await;
    redis.run("RENAME filled servers").await;
    let line = program.says("cannot read the weights, keeping the last table").await;
    let reason = line["reason"].as_str().expect("a text");
    assert!(reason.contains("more than 100000 members: split the pool"), "{reason}");
    eventually("they are counted again and again", || async { calls(&redis, "zcard").await >= 3 }).await;
    let read = calls(&redis, "zrange").await - reads;
    assert_eq!(read, 1, "what is too large is read once");
    goes_on_serving(&program, "known").await;
    let grown = program.peak_kilobytes().saturating_sub(before);
    assert!(grown < 60_000, "{grown} kB more");

    redis.run("DEL servers").await;
    redis.run(&format!("ZADD servers 7 {}", known.address)).await;
    weight_of_pool_becomes(&program, "web", 7.0).await;
    println!("{read} reads, {grown} kB");
}

#[tokio::test]
async fn a_web_server_that_takes_the_port_of_redis_is_named_and_the_last_table_serves() {
    let (configured, known) = (Backend::named("configured").await, Backend::named("known").await);
    let mut redis = Redis::start().await;
    redis.set_weights([(&known, 1.0)]).await;
    let program = program(redis.port, "resync_interval: 1s", &configured);
    serves(&program, "known").await;
    redis.kill();
    let address = format!("127.0.0.1:{}", redis.port).parse().expect("an address");
    let web = Backend::start_at(address, |mut stream| async move {
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n<html></html>").await;
    })
    .await;
    eventually("it is named", || async {
        program.messages("cannot connect to redis").iter().any(|line| {
            line["cure"].as_str().is_some_and(|cure| cure.contains("does not speak redis's protocol"))
        })
    })
    .await;
    goes_on_serving(&program, "known").await;
    assert!(web.accepted() > 0);
    drop(web);
    sleep(Duration::ZERO).await;
    redis.launch().await;
    redis.run(&format!("ZADD servers 7 {}", known.address)).await;
    weight_of_pool_becomes(&program, "web", 7.0).await;
}
