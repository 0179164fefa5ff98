//! A server that behaves like a Redis, but answers ZRANGE with the bytes that a scenario chooses.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::thread_server::ThreadServer;

/// A scripted Redis on a free port. Dropping it ends it.
pub struct ScriptedRedis {
    pub port: u16,
    server: ThreadServer<Vec<u8>>,
}

impl ScriptedRedis {
    pub fn answering(answer: &[u8]) -> Self {
        let server = ThreadServer::start(answer.to_vec(), serve);
        Self { port: server.port, server }
    }

    /// Sets the answer to ZRANGE from now on. An empty one closes the connection.
    pub fn answer(&self, answer: &[u8]) {
        self.server.set(answer.to_vec());
    }
}

async fn serve(mut client: TcpStream, answer: watch::Receiver<Vec<u8>>) {
    let mut unread = Vec::new();
    loop {
        while let Some((words, length)) = request(&unread) {
            unread.drain(..length);
            let word = |index: usize| words.get(index).map(|word| word.to_ascii_uppercase());
            let answer: Vec<u8> = match word(0).as_deref() {
                Some("HELLO") => b"%2\r\n+version\r\n+7.0.15\r\n+role\r\n+master\r\n".to_vec(),
                Some("SUBSCRIBE") => {
                    let confirmed = words[1..].iter().enumerate().map(|(before, channel)| {
                        format!(">3\r\n+subscribe\r\n${}\r\n{channel}\r\n:{}\r\n", channel.len(), before + 1)
                    });
                    confirmed.collect::<String>().into()
                }
                Some("CONFIG") => b"%1\r\n+notify-keyspace-events\r\n+KA\r\n".to_vec(),
                Some("ZRANGE") => answer.borrow().clone(),
                Some("ZCARD") => b":1\r\n".to_vec(),
                Some("HLEN") => b":0\r\n".to_vec(),
                Some("EVALSHA_RO") => b"_\r\n".to_vec(),
                _ => b"+OK\r\n".to_vec(),
            };
            // A failed write means that the client has closed.
            if answer.is_empty() || client.write_all(&answer).await.is_err() {
                return;
            }
            // After an incomplete answer no other may follow: its bytes would complete this one.
            if !answer.ends_with(b"\n") {
                while matches!(client.read_buf(&mut unread).await, Ok(1..)) {}
                return;
            }
        }
        if !matches!(client.read_buf(&mut unread).await, Ok(1..)) {
            return;
        }
    }
}

/// The first complete request: its words, and its length in bytes.
fn request(bytes: &[u8]) -> Option<(Vec<String>, usize)> {
    let mut position = 0;
    let mut number = |mark: u8| {
        let line = bytes[position..].split(|byte| *byte == b'\n').next().filter(|l| l.ends_with(b"\r"))?;
        assert_eq!(line[0], mark, "requests are arrays of texts");
        let number: usize = std::str::from_utf8(&line[1..line.len() - 1]).ok()?.parse().ok()?;
        position += line.len() + 1;
        if mark == b'*' {
            return Some((number, position));
        }
        position += number + 2;
        Some((number, position))
    };
    let (count, mut end) = number(b'*')?;
    let mut words = Vec::new();
    for _ in 0..count {
        let length;
        (length, end) = number(b'$')?;
        words.push(String::from_utf8_lossy(bytes.get(end - length - 2..end)?).trim_end().to_owned());
    }
    Some((words, end))
}
