//! The access log: one line per session, written when the session has ended.
//!
//! Each worker collects its lines in a buffer of its own and hands them to the log's thread after 50 ms, or
//! when 60 KiB are full. So most lines cost a session no system call and no lock.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::Notify;

use crate::balance::BackendId;
use crate::balance::backend::Cause;
use crate::config::LogFormat;
use crate::observe::log_sink::LogSink;
use crate::reactor::sleep;

/// How long a line may wait in the worker's buffer.
const GATHER_TIME: Duration = Duration::from_millis(50);
/// How long a worker that ends waits for room in the sink's queue.
const LAST_LINES: Duration = Duration::from_secs(1);
/// A buffer with this many bytes is handed over at once.
const CHUNK_BYTES: usize = 60 * 1024;
/// The capacity of a buffer: [`CHUNK_BYTES`] and one more line. A buffer that grew step by step would be
/// copied each time.
const BUFFER_BYTES: usize = 64 * 1024;

/// The fields of a line. Programs rely on their names and order (docs/reference/access-log.md).
#[derive(Debug)]
pub struct AccessLine<'a> {
    /// When the connection was accepted: UTC, RFC 3339 with milliseconds.
    pub time: SystemTime,
    /// The listener's name.
    pub listener: &'a str,
    /// The client's address.
    pub client: SocketAddr,
    /// The pool's name.
    pub pool: &'a str,
    /// The backend that served the session, or the last one tried.
    pub backend: Option<&'a str>,
    /// What the pick was made from, as in [`Source::name`](crate::balance::pool::Source::name).
    pub source: Option<&'static str>,
    /// The weight that the backend was picked by.
    pub weight: Option<f64>,
    /// The number of backends tried before the last one.
    pub retries: u32,
    /// The time that all picks took, with waits in the queue and for Redis. In whole microseconds.
    pub queue_ms: f64,
    /// The time from the accept to the end of the last attempt to connect, less the queue time. In whole
    /// microseconds.
    pub connect_ms: f64,
    /// The time from accept to close.
    pub duration_ms: f64,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// Why the session ended.
    pub close_reason: &'static str,
    /// Why the session ended, in HAProxy's two letters.
    pub term: &'static str,
    /// Why the last attempt failed, if no backend was reached; what broke the connection, if a side reset
    /// it.
    pub error: Option<Cause>,
    /// The backends tried before `backend`, and why each failed: `[{"backend": …, "error": …}]`.
    pub failed: &'a [(BackendId, Cause)],
}

/// Milliseconds, rounded to a tenth of a microsecond so that the text has few digits.
#[must_use]
pub fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e7).round() / 1e4
}

/// The access log of one worker.
#[derive(Debug)]
pub struct AccessLog {
    format: LogFormat,
    sink: LogSink,
    lines: RefCell<Vec<u8>>,
    /// The number of lines in `lines`.
    count: Cell<u64>,
    waiting: Notify,
}

impl AccessLog {
    /// Writes lines in `format` to `sink`.
    #[must_use]
    pub fn new(format: LogFormat, sink: LogSink) -> Self {
        Self { format, sink, lines: RefCell::default(), count: Cell::default(), waiting: Notify::new() }
    }

    /// Adds a line to the buffer.
    pub fn write(&self, line: &AccessLine<'_>) {
        let mut lines = self.lines.borrow_mut();
        if lines.is_empty() {
            lines.reserve(BUFFER_BYTES);
            self.waiting.notify_one();
        }
        match self.format {
            LogFormat::Json => write_json(&mut lines, line),
            LogFormat::Text => lines.extend_from_slice(text(line).as_bytes()),
        }
        lines.push(b'\n');
        self.count.set(self.count.get() + 1);
        let full = lines.len() >= CHUNK_BYTES;
        drop(lines);
        if full {
            self.hand_over();
        }
    }

    /// Hands the buffered lines to the sink. Never waits.
    pub fn hand_over(&self) {
        self.hand_over_within(Duration::ZERO);
    }

    /// Hands over the buffered lines at the worker's end. Waits up to a second for room in the sink's queue.
    pub fn hand_over_last(&self) {
        self.hand_over_within(LAST_LINES);
    }

    fn hand_over_within(&self, limit: Duration) {
        let (lines, count) = (self.lines.take(), self.count.take());
        if !lines.is_empty() {
            self.sink.write_within(lines, count, limit);
        }
    }

    /// Hands over the buffered lines 50 ms after the first of them. Never ends.
    pub async fn run(&self) {
        loop {
            self.waiting.notified().await;
            sleep(GATHER_TIME).await;
            self.hand_over();
        }
    }
}

/// Appends `line` to `out` as a JSON object.
///
/// Keys and constant values need no escaping and are copied. A serializer that looks at each of their bytes
/// took more instructions than a short session's relay.
fn write_json(out: &mut Vec<u8>, line: &AccessLine<'_>) {
    // Writing to memory cannot fail.
    let _ = write!(out, "{{\"time\":\"{}\"", humantime::format_rfc3339_millis(line.time));
    write_value(out, ",\"listener\":", line.listener);
    let _ = write!(out, ",\"client\":\"{}\"", line.client);
    write_value(out, ",\"pool\":", line.pool);
    write_value(out, ",\"backend\":", line.backend);
    match line.source {
        Some(source) => write_word(out, ",\"source\":\"", source),
        None => out.extend_from_slice(b",\"source\":null"),
    }
    write_value(out, ",\"weight\":", line.weight);
    write_value(out, ",\"retries\":", line.retries);
    write_value(out, ",\"queue_ms\":", line.queue_ms);
    write_value(out, ",\"connect_ms\":", line.connect_ms);
    write_value(out, ",\"duration_ms\":", line.duration_ms);
    write_value(out, ",\"bytes_in\":", line.bytes_in);
    write_value(out, ",\"bytes_out\":", line.bytes_out);
    write_word(out, ",\"close_reason\":\"", line.close_reason);
    write_word(out, ",\"term\":\"", line.term);
    if let Some(error) = line.error {
        write_value(out, ",\"error\":", error);
    }
    if !line.failed.is_empty() {
        #[derive(Serialize)]
        struct Attempt<'a> {
            backend: &'a str,
            error: Cause,
        }
        let attempts = line.failed.iter().map(|(id, error)| Attempt { backend: id.as_str(), error: *error });
        write_value(out, ",\"failed\":", attempts.collect::<Vec<_>>());
    }
    out.push(b'}');
}

/// Appends `key`, which includes its comma and colon, and the serialized `value`.
fn write_value(out: &mut Vec<u8>, key: &str, value: impl Serialize) {
    out.extend_from_slice(key.as_bytes());
    serde_json::to_writer(out, &value).expect("plain values are written to memory without failure");
}

/// Appends `key`, which includes its comma, colon and opening quote, and `word`, which needs no escaping.
fn write_word(out: &mut Vec<u8>, key: &str, word: &str) {
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(word.as_bytes());
    out.push(b'"');
}

/// The line as `key=value` pairs, in the order of the JSON line.
fn text(line: &AccessLine<'_>) -> String {
    let mut text = humantime::format_rfc3339_millis(line.time).to_string();
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        " session listener={} client={} pool={} backend={} source={} weight={} retries={} queue_ms={} \
         connect_ms={} duration_ms={} bytes_in={} bytes_out={} close_reason={} term={}",
        line.listener,
        line.client,
        line.pool,
        line.backend.unwrap_or("-"),
        line.source.unwrap_or("-"),
        line.weight.map_or_else(|| "-".to_owned(), |weight| weight.to_string()),
        line.retries,
        line.queue_ms,
        line.connect_ms,
        line.duration_ms,
        line.bytes_in,
        line.bytes_out,
        line.close_reason,
        line.term,
    );
    if let Some(error) = line.error {
        let _ = write!(text, " error=\"{error}\"");
    }
    for (index, (backend, error)) in line.failed.iter().enumerate() {
        let _ = write!(text, "{}{backend}: {error}", if index == 0 { " failed=\"" } else { ", " });
    }
    if !line.failed.is_empty() {
        text.push('"');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(line: &AccessLine<'_>) -> String {
        let mut out = Vec::new();
        write_json(&mut out, line);
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    fn line() -> AccessLine<'static> {
        AccessLine {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678),
            listener: "web",
            client: "127.0.0.1:5000".parse().expect("an address"),
            pool: "web",
            backend: Some("10.0.0.1:80"),
            source: Some("snapshot"),
            weight: Some(2.5),
            retries: 1,
            queue_ms: 0.0,
            connect_ms: millis(Duration::from_nanos(1_234_567)),
            duration_ms: millis(Duration::from_millis(1500)),
            bytes_in: 3,
            bytes_out: 4,
            close_reason: "finished",
            term: "--",
            error: None,
            failed: &[],
        }
    }

    #[test]
    fn error_and_failed_attempts_are_the_last_fields_and_left_out_when_empty() {
        let id = |text: &str| text.parse::<BackendId>().expect("an address");
        let failed = [(id("10.0.0.2:80"), Cause::TIMED_OUT), (id("10.0.0.3:80"), Cause::UNRESOLVED)];
        let line = AccessLine { error: Some(Cause::RESET), failed: &failed, ..line() };
        let json = json(&line);
        let end = concat!(
            r#""term":"--","error":"connection reset by peer","failed":["#,
            r#"{"backend":"10.0.0.2:80","error":"timed out"},"#,
            r#"{"backend":"10.0.0.3:80","error":"name not resolved"}]}"#,
        );
        assert!(json.ends_with(end), "{json}");
        let end = concat!(
            r#"term=-- error="connection reset by peer" "#,
            r#"failed="10.0.0.2:80: timed out, 10.0.0.3:80: name not resolved""#,
        );
        assert!(text(&line).ends_with(end), "{}", text(&line));
    }

    #[test]
    fn the_line_has_the_contracts_fields_in_its_order() {
        assert_eq!(
            json(&line()),
            concat!(
                r#"{"time":"2026-01-02T03:04:05.678Z","listener":"web","client":"127.0.0.1:5000","pool":"web","#,
                r#""backend":"10.0.0.1:80","source":"snapshot","weight":2.5,"retries":1,"queue_ms":0.0,"#,
                r#""connect_ms":1.2346,"duration_ms":1500.0,"bytes_in":3,"bytes_out":4,"#,
                r#""close_reason":"finished","term":"--"}"#,
            )
        );
        assert_eq!(
            text(&line()),
            "2026-01-02T03:04:05.678Z session listener=web client=127.0.0.1:5000 pool=web \
             backend=10.0.0.1:80 source=snapshot weight=2.5 retries=1 queue_ms=0 connect_ms=1.2346 \
             duration_ms=1500 bytes_in=3 bytes_out=4 close_reason=finished term=--"
        );
    }

    /// Names come from the config, and a path of a unix socket may hold anything.
    #[test]
    fn a_line_is_json_whatever_the_names_and_whatever_is_missing() {
        let names = "q\"b\\n\nu\u{1}\u{e9}";
        let line = AccessLine { listener: names, pool: names, backend: Some(names), ..line() };
        let value: serde_json::Value = serde_json::from_str(&json(&line)).expect("JSON");
        for key in ["listener", "pool", "backend"] {
            assert_eq!(value[key], names, "{key}");
        }
        let without = AccessLine { backend: None, source: None, weight: None, ..line };
        let value: serde_json::Value = serde_json::from_str(&json(&without)).expect("JSON");
        for key in ["backend", "source", "weight"] {
            assert!(value.as_object().expect("an object")[key].is_null(), "{key}");
        }
    }
}
