//! A plain HTTP/1.1 client for the admin server, and the metrics that a started program reports through it.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{PATIENCE, Program, eventually};

/// A complete HTTP response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    pub body: String,
}

impl Answer {
    fn parse(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        Some(Self { status, head: head.to_lowercase(), body: body.to_owned() })
    }
}

/// Sends `GET path` on a new connection.
pub async fn get(address: SocketAddr, path: &str) -> io::Result<Answer> {
    ask(address, &format!("GET {path}"), "").await
}

/// Sends a request with any method and more headers, each of which ends in `\r\n`, on a new connection.
pub async fn ask(address: SocketAddr, method_and_path: &str, headers: &str) -> io::Result<Answer> {
    let answer = timeout(PATIENCE, async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("{method_and_path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, io::Error>(text)
    });
    let text = answer.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Answer::parse(&text).ok_or_else(|| io::Error::other(format!("no HTTP answer: {text:?}")))
}

/// These functions need a log of JSON lines.
impl Program {
    /// The addresses of all listeners, one each, in the order of the config, and that of the admin server.
    pub async fn addresses(&self) -> (Vec<SocketAddr>, SocketAddr) {
        let logged = |message: &str, field: &str| -> Vec<SocketAddr> {
            let lines = self.log();
            let lines = lines.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            let addresses = lines.filter(|line| line["message"] == message).map(|line| {
                let text = line[field].as_str().expect("a text");
                text.trim_matches(['[', ']']).parse().unwrap_or_else(|e| panic!("{e}: {text}"))
            });
            addresses.collect()
        };
        // The line of the admin server comes after those of all listeners.
        eventually("the program accepts", || async {
            !logged("admin server listening", "address").is_empty()
        })
        .await;
        (
            logged("listener accepting connections", "addresses"),
            logged("admin server listening", "address")[0],
        )
    }

    /// All metrics, from one scrape.
    pub async fn metrics(&self) -> String {
        let answer = get(self.addresses().await.1, "/metrics").await.expect("metrics");
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    /// The sum of one metric, by a new scrape: see [`sum_of`].
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        sum_of(&self.metrics().await, name, label)
    }
}

/// The sum of those series of a metric whose labels contain `label`; 0 without any.
pub fn sum_of(metrics: &str, name: &str, label: &str) -> f64 {
    let values = metrics.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let labels = series.strip_prefix(name)?;
        let is_it = (labels.is_empty() || labels.starts_with('{')) && labels.contains(label);
        is_it.then(|| value.parse::<f64>().unwrap_or_else(|e| panic!("{e}: {line}")))
    });
    values.sum()
}
