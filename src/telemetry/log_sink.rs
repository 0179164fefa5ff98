//! Writes log lines on a thread of its own, so that a full pipe or a slow disk never holds back a session.
//!
//! The queue is bounded: what does not fit is dropped and counted, never waited for.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Chunks that may wait. An access log's chunk is up to 64 KiB, so this bounds the queue at 64 MiB.
const QUEUE_CHUNKS: usize = 1024;

enum Message {
    Bytes(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Takes whole lines. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LogSink {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl LogSink {
    /// Starts the thread that writes to `output`.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(output: Box<dyn Write + Send>) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_CHUNKS);
        let dropped = Arc::new(AtomicU64::new(0));
        let failed = Arc::clone(&dropped);
        std::thread::Builder::new()
            .name("statera-log".into())
            .spawn(move || write_all(&messages, output, &failed))?;
        Ok(Self { queue, dropped })
    }

    /// Hands over one or more whole lines. Never waits.
    pub fn write(&self, lines: Vec<u8>) {
        if self.queue.try_send(Message::Bytes(lines)).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Waits until what was handed over before is written, at most `limit`. Returns false if it was not.
    pub fn flush(&self, limit: Duration) -> bool {
        let (done, written) = sync_channel(1);
        self.queue.try_send(Message::Flush(done)).is_ok() && written.recv_timeout(limit).is_ok()
    }

    /// Chunks of lines that were lost: the queue was full or the output failed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }
}

fn write_all(messages: &Receiver<Message>, mut output: Box<dyn Write + Send>, failed: &AtomicU64) {
    for message in messages {
        match message {
            Message::Bytes(lines) => {
                if output.write_all(&lines).and_then(|()| output.flush()).is_err() {
                    failed.fetch_add(1, Relaxed);
                }
            }
            // Whoever waits may have given up.
            Message::Flush(done) => drop(done.try_send(())),
        }
    }
}

/// One event of the log on its way to the sink.
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
        self.sink.write(std::mem::take(&mut self.line));
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
    use std::sync::mpsc::channel;

    /// Writes only when told to.
    struct Stuck(Receiver<()>, std::sync::mpsc::Sender<Vec<u8>>);

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
    fn a_stuck_output_loses_lines_and_counts_them_but_holds_nobody_back() {
        let (go, wait) = channel();
        let (seen, written) = channel();
        let sink = LogSink::start(Box::new(Stuck(wait, seen))).expect("a thread");
        for _ in 0..QUEUE_CHUNKS + 10 {
            sink.write(b"line\n".to_vec());
        }
        assert!(sink.dropped() >= 9, "one is being written, the queue holds the rest");
        assert!(!sink.flush(Duration::from_millis(1)), "there is no room to wait in");
        for _ in 0..QUEUE_CHUNKS {
            go.send(()).expect("the thread runs");
        }
        assert_eq!(written.recv().expect("a line"), b"line\n");
    }
}
