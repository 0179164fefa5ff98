//! Writes log lines on a thread of its own, so that a full pipe or a slow disk never holds back a session.
//!
//! The queue is bounded. Lines that find the queue full, or that the output refuses, are dropped and
//! counted.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{Builder, sleep};
use std::time::Duration;

/// The capacity of the queue, in chunks. A chunk of the access log has up to 64 KiB, so the queue takes at
/// most 64 MiB.
const QUEUE_CHUNKS: usize = 1024;
/// The pause between two tries to put a chunk into a full queue, for callers that may wait.
const FULL_PAUSE: Duration = Duration::from_millis(1);

enum Message {
    Lines { bytes: Vec<u8>, count: u64 },
    Flush(SyncSender<()>),
}

/// The queue of the log's thread. It takes whole lines. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LogSink {
    queue: SyncSender<Message>,
    counts: Arc<Counts>,
}

/// How many lines are lost, and how many wait.
#[derive(Debug, Default)]
struct Counts {
    dropped: AtomicU64,
    /// Lines in the queue and lines being written.
    waiting: AtomicU64,
}

impl LogSink {
    /// Starts the thread that writes to `output`.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(output: Box<dyn Write + Send>) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_CHUNKS);
        let counts = Arc::new(Counts::default());
        let writer = Writer { output, counts: Arc::clone(&counts), is_torn: false };
        Builder::new().name("statera-log".into()).spawn(move || writer.run(&messages))?;
        Ok(Self { queue, counts })
    }

    /// Hands over `count` whole lines. Never waits.
    pub fn write(&self, bytes: Vec<u8>, count: u64) {
        self.write_within(bytes, count, Duration::ZERO);
    }

    /// Hands over `count` whole lines. Waits at most `limit` for room in the queue, so a worker may use it
    /// only at its end.
    pub fn write_within(&self, bytes: Vec<u8>, count: u64, limit: Duration) {
        self.counts.waiting.fetch_add(count, Relaxed);
        if self.send(Message::Lines { bytes, count }, limit).is_none() {
            self.counts.lose(count);
            self.counts.waiting.fetch_sub(count, Relaxed);
        }
    }

    /// Waits at most `limit` until the lines handed over before are written. Returns false if they are not.
    pub fn flush(&self, limit: Duration) -> bool {
        let (done, written) = sync_channel(1);
        let left = self.send(Message::Flush(done), limit);
        left.is_some_and(|left| written.recv_timeout(left).is_ok())
    }

    /// Like [`LogSink::flush`], for the end of the process: counts the lines that could not be written as
    /// lost. Returns how many lines were lost since the start.
    pub fn end(&self, limit: Duration) -> u64 {
        if !self.flush(limit) {
            self.counts.lose(self.counts.waiting.load(Relaxed));
        }
        self.dropped()
    }

    /// Returns the number of lines lost because the queue was full, the output failed, or the time of
    /// [`LogSink::end`] was over.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.counts.dropped.load(Relaxed)
    }

    /// Returns what is left of `limit`, or `None` if the queue had no room within it.
    fn send(&self, mut message: Message, limit: Duration) -> Option<Duration> {
        let mut left = limit;
        loop {
            message = match self.queue.try_send(message) {
                Ok(()) => return Some(left),
                Err(TrySendError::Full(message)) if !left.is_zero() => message,
                Err(_) => return None,
            };
            // Counting the pauses instead of reading the clock makes the limit a little longer, which does
            // no harm.
            sleep(FULL_PAUSE);
            left = left.saturating_sub(FULL_PAUSE);
        }
    }
}

impl Counts {
    fn lose(&self, lines: u64) {
        self.dropped.fetch_add(lines, Relaxed);
    }
}

/// The state of the log's thread.
struct Writer {
    output: Box<dyn Write + Send>,
    counts: Arc<Counts>,
    /// The output ends in the middle of a line.
    is_torn: bool,
}

impl Writer {
    fn run(mut self, messages: &Receiver<Message>) {
        for message in messages {
            match message {
                Message::Lines { bytes, count } => {
                    self.write(&bytes);
                    self.counts.waiting.fetch_sub(count, Relaxed);
                }
                // The caller of `flush` may have given up.
                Message::Flush(done) => drop(done.try_send(())),
            }
        }
    }

    /// Writes as much of `bytes` as the output takes: a disk may be full, a file at its limit (EFBIG), a
    /// pipe's reader gone.
    fn write(&mut self, bytes: &[u8]) {
        if self.is_torn && self.write_part(b"\n") == 0 {
            return self.counts.lose(lines_in(bytes));
        }
        let written = self.write_part(bytes);
        self.is_torn = bytes[..written].last().is_some_and(|last| *last != b'\n');
        self.counts.lose(lines_in(&bytes[written..]));
    }

    /// Returns how many bytes the output took.
    fn write_part(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match self.output.write(&bytes[written..]) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // `cli/run.rs` opens outputs without a buffer, so what was written has reached the system.
        if self.output.flush().is_err() { 0 } else { written }
    }
}

fn lines_in(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Collects the line of one log event and hands it over when dropped.
#[derive(Debug)]
pub struct EventWriter {
    sink: LogSink,
    line: Vec<u8>,
}

impl Write for EventWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        self.sink.write(std::mem::take(&mut self.line), 1);
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for LogSink {
    type Writer = EventWriter;

    fn make_writer(&'a self) -> EventWriter {
        EventWriter { sink: self.clone(), line: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Writes only when told to.
    struct Stuck(Receiver<()>, Sender<Vec<u8>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            self.1.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_output_loses_lines_and_counts_them_but_blocks_no_caller() {
        let (go, wait) = channel();
        let (seen, written) = channel();
        let sink = LogSink::start(Box::new(Stuck(wait, seen))).expect("a thread");
        for _ in 0..QUEUE_CHUNKS + 10 {
            sink.write(b"line\n".to_vec(), 1);
        }
        assert!(sink.dropped() >= 9, "one is being written, the queue holds the rest");
        assert!(!sink.flush(Duration::from_millis(1)), "the queue is full");
        for _ in 0..QUEUE_CHUNKS {
            go.send(()).expect("the thread runs");
        }
        assert_eq!(written.recv().expect("a line"), b"line\n");
    }

    #[test]
    fn lines_in_a_full_queue_are_written_at_the_end() {
        let (go, wait) = channel();
        let (seen, written) = channel();
        let sink = LogSink::start(Box::new(Stuck(wait, seen))).expect("a thread");
        let mut handed_over = 0;
        while sink.dropped() == 0 {
            sink.write(b"line\n".to_vec(), 1);
            handed_over += 1;
        }
        // From now on the output takes lines. The queue is still full when `end` is called.
        let ending = std::thread::spawn(move || (sink.end(PATIENCE), sink));
        for _ in 0..=handed_over {
            go.send(()).expect("the thread runs");
        }
        let (lost, sink) = ending.join().expect("it ends");
        assert_eq!((written.try_iter().count(), lost), (handed_over - 1, 1));
        assert_eq!(sink.dropped(), 1);
    }

    #[test]
    fn lines_that_a_stuck_output_does_not_take_at_the_end_are_counted() {
        let (_go, wait) = channel();
        let (seen, _written) = channel();
        let sink = LogSink::start(Box::new(Stuck(wait, seen))).expect("a thread");
        sink.write(b"one\ntwo\n".to_vec(), 2);
        sink.write(b"three\n".to_vec(), 1);
        assert_eq!(sink.end(Duration::from_millis(10)), 3);
    }

    /// A file with a size limit that the test raises later.
    #[derive(Clone, Default)]
    struct Limited(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Write for Limited {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (taken, limit) = &mut *self.0.lock().expect("it does not panic");
            let room = limit.saturating_sub(taken.len()).min(bytes.len());
            if room == 0 {
                return Err(ErrorKind::FileTooLarge.into());
            }
            taken.extend_from_slice(&bytes[..room]);
            Ok(room)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_that_was_cut_off_does_not_run_into_the_next_one() {
        let file = Limited::default();
        let set_limit = |limit| file.0.lock().expect("it does not panic").1 = limit;
        let sink = LogSink::start(Box::new(file.clone())).expect("a thread");
        set_limit(10);
        sink.write(b"first\nsecond\nthird\n".to_vec(), 3);
        sink.write(b"fourth\n".to_vec(), 1);
        assert!(sink.flush(PATIENCE));
        assert_eq!(sink.dropped(), 3);
        set_limit(1000);
        sink.write(b"fifth\n".to_vec(), 1);
        assert!(sink.flush(PATIENCE));
        let text = file.0.lock().expect("it does not panic").0.clone();
        assert_eq!(String::from_utf8_lossy(&text), "first\nseco\nfifth\n");
        assert_eq!(sink.dropped(), 3);
    }
}
