//! The bytes between a client and a backend: in both directions, after a half-close of either side, in
//! sessions that are cut, slow or silent, one byte and very many.
//!
//! Each scenario runs with a TCP backend, with a backend at a unix socket, and in a session whose two
//! directions already splice.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, interval};

use crate::support::{Kind, Pair, Pattern, Peer, Program, Proxy, eventually, require, seed, soon};

/// Makes of each function a test `tcp::…`, a test `unix::…` and a test `spliced::…`.
macro_rules! with_each_kind_of_backend {
    ($($name:ident)*) => {
        mod tcp {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::Tcp).await })*
        }
        mod unix {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::Unix).await })*
        }
        mod spliced {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::Spliced).await })*
        }
    };
}

with_each_kind_of_backend! {
    a_late_and_long_answer_arrives_after_the_client_has_half_closed
    a_client_goes_on_sending_after_the_backend_has_half_closed
    a_reset_by_the_client_reaches_the_backend_as_a_reset
    a_reset_by_the_backend_reaches_the_client_as_a_reset
    an_answer_that_was_sent_before_the_backend_broke_off_still_arrives
    a_client_that_sends_too_much_still_reads_why_it_was_refused
    a_reset_of_a_half_closed_session_is_no_clean_end
    a_slow_client_holds_back_a_fast_backend_and_loses_nothing
    a_slow_backend_holds_back_a_fast_client_and_loses_nothing
    both_directions_run_at_full_speed_at_once
    one_direction_runs_while_the_other_is_blocked
    bytes_sent_one_at_a_time_arrive_one_by_one
    bytes_arrive_that_left_together_with_the_end
    a_client_that_reads_one_byte_at_a_time_gets_every_byte
    a_backend_that_reads_one_byte_at_a_time_gets_every_byte
    bulk_changes_its_direction_again_and_again
    a_session_without_a_byte_is_a_session
    a_silent_session_is_closed_after_the_idle_timeout
    bytes_in_either_direction_keep_a_session_alive
    a_backend_that_stays_silent_after_the_client_has_half_closed_is_cut_off
    a_client_that_stays_silent_after_the_backend_has_half_closed_is_cut_off
    a_half_closed_session_lives_while_bytes_come
}

const MEGABYTE: u64 = 1024 * 1024;

/// The most bytes of one direction that the four kernel buffers may hold: far more than a default system
/// allows, and far less than a proxy without backpressure would take.
const IN_FLIGHT_MAX: u64 = 96 * MEGABYTE;

async fn a_late_and_long_answer_arrives_after_the_client_has_half_closed(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    client.say(b"question").await;
    client.end().await;
    backend.hears(b"question").await;
    backend.hears_the_end().await;

    // The backend has seen the end of this half. A proxy that took it for the end of the session would have
    // closed by now.
    let answer = async {
        pattern.send(&mut backend, 8 * MEGABYTE).await;
        backend.end().await;
    };
    tokio::join!(answer, pattern.expect(&mut client, 8 * MEGABYTE));
    client.hears_the_end().await;
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["bytes_in"]), (&"finished".into(), &8.into()));
    assert_eq!(line["bytes_out"], 8 * MEGABYTE);
}

async fn a_client_goes_on_sending_after_the_backend_has_half_closed(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    backend.say(b"go on").await;
    backend.end().await;
    client.hears(b"go on").await;
    client.hears_the_end().await;

    let upload = async {
        pattern.send(&mut client, 8 * MEGABYTE).await;
        client.end().await;
    };
    tokio::join!(upload, pattern.expect(&mut backend, 8 * MEGABYTE));
    backend.hears_the_end().await;
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["bytes_out"]), (&"finished".into(), &5.into()));
    assert_eq!(line["bytes_in"], 8 * MEGABYTE);
}

async fn a_reset_by_the_client_reaches_the_backend_as_a_reset(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"half a quest").await;
    backend.hears(b"half a quest").await;
    client.reset();
    match kind {
        Kind::Tcp | Kind::Spliced => backend.hears_a_reset().await,
        // The kernel gives a program no way to reset a unix socket.
        Kind::Unix => backend.hears_the_end().await,
    }
    assert_eq!(pair.line().await["close_reason"], "client_reset");
}

async fn a_reset_by_the_backend_reaches_the_client_as_a_reset(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    backend.say(b"half an ans").await;
    client.hears(b"half an ans").await;
    // Unread bytes make the close of a unix socket a reset.
    client.say(b"never read").await;
    soon("the bytes are there", backend.read_u8()).await.expect("connected");
    backend.reset();
    client.hears_a_reset().await;
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
}

async fn an_answer_that_was_sent_before_the_backend_broke_off_still_arrives(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    // The last size is more than the client's kernel takes unread, so that some bytes wait at the proxy when
    // the reset comes.
    for bytes in [1, 1_000, 150_000] {
        let (mut client, mut backend) = pair.session().await;
        let pattern = Pattern::new(seed());
        client.say(b"a question that is not read to its end").await;
        soon("the question is there", backend.read_u8()).await.expect("connected");
        pattern.send(&mut backend, bytes).await;
        if kind != Kind::Unix {
            // Before that, a reset would make the backend's own kernel discard bytes that it has not sent
            // yet.
            let filter = format!("sport = :{}", pair.backend_port());
            let sent = || sockets(&filter).lines().all(|line| line.split_whitespace().nth(1) == Some("0"));
            eventually("all bytes have left the backend", || async { sent() }).await;
        }
        // Unread bytes make this close a reset, for either kind.
        drop(backend);
        let (answer, end) = client.rest().await;
        assert!(answer == pattern.from(0, bytes), "{} of {bytes} bytes", answer.len());
        assert_eq!(end.expect_err("no clean end").kind(), std::io::ErrorKind::ConnectionReset);
    }
    let reset = "statera_sessions_closed_total{reason=\"backend_reset\"}";
    eventually("all are counted", || async { pair.proxy.metric(reset) == Some(3.0) }).await;
}

async fn a_client_that_sends_too_much_still_reads_why_it_was_refused(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    let pattern = Pattern::new(seed());
    client.say(b"POST").await;
    backend.hears(b"POST").await;
    // The backend never reads the rest: the bytes of the client fill every buffer in between.
    write_until_held_back(&mut client, &pattern).await;
    backend.say(b"413 too large").await;
    drop(backend);
    client.hears(b"413 too large").await;
    let reason = pair.line().await["close_reason"].clone();
    assert_eq!(reason, "backend_reset");
}

async fn a_reset_of_a_half_closed_session_is_no_clean_end(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"question").await;
    client.end().await;
    backend.say(b"half an ans").await;
    client.hears(b"half an ans").await;
    if kind != Kind::Unix {
        backend.hears(b"question").await;
        backend.hears_the_end().await;
    }
    backend.reset();
    client.hears_a_reset().await;
    assert_eq!(pair.line().await["close_reason"], "backend_reset");
}

/// Writes until the writer is held back, and returns how many bytes were taken: see [`Peer::stuff`].
async fn write_until_held_back(writer: &mut Peer, pattern: &Pattern) -> u64 {
    let sent = writer.stuff(pattern, IN_FLIGHT_MAX).await;
    assert!(sent < IN_FLIGHT_MAX, "{sent} bytes were taken, and no reader reads them");
    sent
}

async fn holds_back(mut writer: Peer, mut reader: Peer) -> (Peer, Peer) {
    let pattern = Pattern::new(seed());
    let sent = write_until_held_back(&mut writer, &pattern).await;
    // First in small reads, so that the writer is held back and released many times, then all.
    let total = sent + 64 * MEGABYTE;
    let write = async {
        let mut position = sent;
        while position < total {
            let write = writer.write(pattern.from(position, total - position));
            position += soon("the writer makes progress", write).await.expect("connected") as u64;
        }
        writer.end().await;
    };
    let read = async {
        for position in (0..MEGABYTE).step_by(10_000) {
            pattern.expect_between(&mut reader, position, position + 10_000).await;
            tokio::task::yield_now().await;
        }
        pattern.expect_between(&mut reader, MEGABYTE.next_multiple_of(10_000), total).await;
        reader.hears_the_end().await;
    };
    tokio::join!(write, read);
    (writer, reader)
}

async fn a_slow_client_holds_back_a_fast_backend_and_loses_nothing(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (client, backend) = pair.session().await;
    holds_back(backend, client).await;
}

async fn a_slow_backend_holds_back_a_fast_client_and_loses_nothing(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (client, backend) = pair.session().await;
    holds_back(client, backend).await;
}

async fn both_directions_run_at_full_speed_at_once(kind: Kind) {
    full_speed(kind, 64 * MEGABYTE).await;
}

async fn full_speed(kind: Kind, bytes: u64) {
    let pair = Pair::new(kind, "").await;
    let (client, backend) = pair.session().await;
    let (up, down) = (Pattern::new(seed()), Pattern::new(seed()));
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_backend, mut to_backend) = tokio::io::split(backend);
    tokio::join!(
        async {
            up.send(&mut to_client, bytes).await;
            to_client.shutdown().await.expect("connected");
        },
        async {
            down.send(&mut to_backend, bytes).await;
            to_backend.shutdown().await.expect("connected");
        },
        async {
            up.expect(&mut from_backend, bytes).await;
            assert_eq!(soon("the end", from_backend.read(&mut [0])).await.expect("a clean end"), 0);
        },
        async {
            down.expect(&mut from_client, bytes).await;
            assert_eq!(soon("the end", from_client.read(&mut [0])).await.expect("a clean end"), 0);
        },
    );
    let line = pair.line().await;
    assert_eq!(line["close_reason"], "finished");
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&bytes.into(), &bytes.into()));
}

/// The ten gigabytes in each direction take minutes, so they are sent only with STATERA_LONG=1.
#[tokio::test]
async fn one_byte_passes_and_on_demand_ten_gigabytes_in_each_direction() {
    let bytes = if std::env::var_os("STATERA_LONG").is_some() { 10 * 1024 * MEGABYTE } else { 1 };
    full_speed(Kind::Tcp, bytes).await;
}

async fn one_direction_runs_while_the_other_is_blocked(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    let (up, down) = (Pattern::new(seed()), Pattern::new(seed()));
    let sent = write_until_held_back(&mut client, &up).await;
    tokio::join!(down.send(&mut backend, 16 * MEGABYTE), down.expect(&mut client, 16 * MEGABYTE));
    client.end().await;
    up.expect(&mut backend, sent).await;
    backend.hears_the_end().await;
}

async fn bytes_sent_one_at_a_time_arrive_one_by_one(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    for byte in (0..=255).cycle().take(1_000) {
        client.say(&[byte]).await;
        assert_eq!(soon("the byte", backend.read_u8()).await.expect("connected"), byte);
        backend.say(&[!byte]).await;
        assert_eq!(soon("the answer", client.read_u8()).await.expect("connected"), !byte);
    }
    for byte in (0..=255).cycle().take(1_000) {
        client.say(&[byte]).await;
    }
    client.end().await;
    let (all, end) = backend.rest().await;
    assert!(end.is_ok() && all.iter().copied().eq((0..=255).cycle().take(1_000)));
}

async fn bytes_arrive_that_left_together_with_the_end(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (mut client, mut backend) = pair.session().await;
    client.say_and_end(b"all of it").await;
    assert_eq!(backend.rest().await.0, b"all of it");
    backend.say_and_end(b"an answer").await;
    assert_eq!(client.rest().await.0, b"an answer");
    assert_eq!(pair.line().await["close_reason"], "finished");
}

async fn reads_one_byte_at_a_time(mut writer: Peer, mut reader: Peer) {
    const SINGLE_BYTES: u64 = 5_000;
    let pattern = Pattern::new(seed());
    let write = async {
        pattern.send(&mut writer, 16 * MEGABYTE).await;
        writer.end().await;
    };
    let read = async {
        for position in 0..SINGLE_BYTES {
            let byte = soon("a byte", reader.read_u8()).await.expect("connected");
            assert_eq!(byte, pattern.from(position, 1)[0], "at {position}");
            tokio::task::yield_now().await;
        }
        pattern.expect_between(&mut reader, SINGLE_BYTES, 16 * MEGABYTE).await;
        reader.hears_the_end().await;
    };
    tokio::join!(write, read);
}

async fn a_client_that_reads_one_byte_at_a_time_gets_every_byte(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (client, backend) = pair.session().await;
    reads_one_byte_at_a_time(backend, client).await;
}

async fn a_backend_that_reads_one_byte_at_a_time_gets_every_byte(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (client, backend) = pair.session().await;
    reads_one_byte_at_a_time(client, backend).await;
}

async fn bulk_changes_its_direction_again_and_again(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (client, backend) = pair.session().await;
    let (up, down) = (Pattern::new(seed()), Pattern::new(seed()));
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_backend, mut to_backend) = tokio::io::split(backend);
    let (mut up_position, mut down_position) = (0, 0);
    // Down, up, both at once, a few bytes each, and again. The sizes are no multiple of any buffer.
    for (up_bytes, down_bytes) in [(0, 3_000_001), (2_000_003, 0), (4_000_037, 5_000_011), (3, 7)].repeat(4) {
        let (up_end, down_end) = (up_position + up_bytes, down_position + down_bytes);
        tokio::join!(
            up.send_between(&mut to_client, up_position, up_end),
            up.expect_between(&mut from_backend, up_position, up_end),
            down.send_between(&mut to_backend, down_position, down_end),
            down.expect_between(&mut from_client, down_position, down_end),
        );
        (up_position, down_position) = (up_end, down_end);
    }
    let ends = tokio::try_join!(to_client.shutdown(), to_backend.shutdown());
    ends.expect("connected");
    let line = pair.line().await;
    assert_eq!(line["close_reason"], "finished");
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&up_position.into(), &down_position.into()));
}

async fn a_session_without_a_byte_is_a_session(kind: Kind) {
    let pair = Pair::new(kind, "").await;
    let (client, mut backend) = pair.session().await;
    drop(client);
    backend.hears_the_end().await;
    drop(backend);
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["term"]), (&"finished".into(), &"--".into()));
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&0.into(), &0.into()));
}

async fn a_silent_session_is_closed_after_the_idle_timeout(kind: Kind) {
    let begun = Instant::now();
    let pair = Pair::new(kind, "idle_timeout: 1s").await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"ping").await;
    backend.hears(b"ping").await;
    client.hears_the_end().await;
    backend.hears_the_end().await;
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["term"]), (&"idle_timeout".into(), &"cD".into()));
}

/// One byte every 100 ms, for longer than the timeout of two seconds.
async fn says_something_for_three_seconds(speaker: &mut Peer, listener: &mut Peer) {
    let mut pace = interval(Duration::from_millis(100));
    for _ in 0..30 {
        pace.tick().await;
        speaker.say(b".").await;
        listener.hears(b".").await;
    }
}

async fn bytes_in_either_direction_keep_a_session_alive(kind: Kind) {
    let pair = Pair::new(kind, "idle_timeout: 2s").await;
    let (mut client, mut backend) = pair.session().await;
    let (mut other_client, mut other_backend) = pair.session().await;
    tokio::join!(
        says_something_for_three_seconds(&mut client, &mut backend),
        says_something_for_three_seconds(&mut other_backend, &mut other_client),
    );
    client.hears_the_end().await;
    other_client.hears_the_end().await;
}

async fn a_backend_that_stays_silent_after_the_client_has_half_closed_is_cut_off(kind: Kind) {
    let pair = Pair::new(kind, "half_close_timeout: 300ms").await;
    let (mut client, mut backend) = pair.session().await;
    client.say(b"question").await;
    client.end().await;
    backend.hears(b"question").await;
    // The answer is missing, so the client must not get a clean end.
    client.hears_a_reset().await;
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["term"]), (&"backend_half_close_timeout".into(), &"sD".into()));
    // The backend has seen the end of the question, and a unix socket cannot be reset: either end is right.
    let (bytes, _) = backend.rest().await;
    assert!(bytes.is_empty());
}

async fn a_client_that_stays_silent_after_the_backend_has_half_closed_is_cut_off(kind: Kind) {
    let pair = Pair::new(kind, "half_close_timeout: 300ms").await;
    let (mut client, mut backend) = pair.session().await;
    backend.say(b"that is all").await;
    backend.end().await;
    client.hears(b"that is all").await;
    client.hears_the_end().await;
    backend.hears_the_end().await;
    let line = pair.line().await;
    assert_eq!((&line["close_reason"], &line["term"]), (&"client_half_close_timeout".into(), &"cD".into()));
}

async fn a_half_closed_session_lives_while_bytes_come(kind: Kind) {
    let pair = Pair::new(kind, "half_close_timeout: 2s").await;
    let (mut client, mut backend) = pair.session().await;
    client.end().await;
    says_something_for_three_seconds(&mut backend, &mut client).await;
    backend.end().await;
    client.hears_the_end().await;
    assert_eq!(pair.line().await["close_reason"], "finished");
}

/// The sockets that match `filter`, as `ss` prints them.
fn sockets(filter: &str) -> String {
    require("ss", "iproute2");
    let output = std::process::Command::new("ss").args(["-tnoH", "state", "established", filter]).output();
    String::from_utf8(output.expect("ss runs").stdout).expect("ss writes text")
}

#[tokio::test]
async fn both_sides_of_a_session_are_probed_by_keepalive() {
    let pair = Pair::new(Kind::Tcp, "keepalive: {idle: 3333s, interval: 7s, probes: 3}").await;
    let (_client, _backend) = pair.session().await;
    let (listener, backend) = (pair.proxy.address().port(), pair.backend_port());
    for filter in [format!("sport = :{listener}"), format!("dport = :{backend}")] {
        // 3333 s are 55 and a half minutes. The other end of each connection has no timer.
        eventually("the timer runs", || async { sockets(&filter).contains("timer:(keepalive,55min") }).await;
    }
}

#[tokio::test]
async fn many_slow_readers_use_little_memory() {
    const SESSIONS: u64 = 50;
    let backend = crate::support::Backend::start(|mut stream| async move {
        let block = vec![b'x'; 1 << 20];
        while stream.write_all(&block).await.is_ok() {}
    })
    .await;
    let program = Program::run(&format!(
        "workers: 2\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}}}}}",
        backend.address
    ));
    let address = program.address().await;
    // The first session allocates what all sessions share.
    let mut first = Peer::connect(address).await;
    soon("a byte", first.read_u8()).await.expect("connected");
    let before = program.resident_kilobytes();
    let mut clients = Vec::new();
    for _ in 0..SESSIONS {
        let mut client = Peer::connect(address).await;
        soon("a byte", client.read_u8()).await.expect("connected");
        clients.push(client);
    }
    // Reads a little of each session, so that its buffers are full, have room, and are full again.
    let mut buffer = vec![0; 100_000];
    for _ in 0..10 {
        for client in &mut clients {
            soon("bytes", client.read_exact(&mut buffer)).await.expect("connected");
        }
    }
    let grown = program.resident_kilobytes().saturating_sub(before);
    // A direction holds at most 64 KB, and the allocator may keep as much again.
    assert!(grown < SESSIONS * 160, "{grown} kB for {SESSIONS} sessions");
}

#[tokio::test]
async fn one_session_at_full_speed_leaves_time_for_the_other_sessions_of_its_worker() {
    let backend = crate::support::Backend::echo().await;
    let proxy = Proxy::start(&format!(
        "workers: 1\nlisteners: {{web: {{bind: \"127.0.0.1:0\", pool: web}}}}\n\
         pools: {{web: {{backends: {{\"{}\": 1}}}}}}",
        backend.address
    ));
    let busy = Peer::connect(proxy.address()).await;
    let (mut reader, mut writer) = tokio::io::split(busy);
    let flood = tokio::spawn(async move {
        let block = vec![0; 1 << 20];
        while writer.write_all(&block).await.is_ok() {}
    });
    let drain = tokio::spawn(async move {
        let mut block = vec![0; 1 << 20];
        while reader.read(&mut block).await.is_ok_and(|count| count > 0) {}
    });
    for _ in 0..50 {
        let answer = crate::support::echo(proxy.address(), b"small").await;
        assert_eq!(answer.expect("an answer"), b"small");
    }
    flood.abort();
    drain.abort();
}
