//! Clients that run one session each, within a deadline.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::PATIENCE;

/// Connects, and reads until the server closes.
pub async fn greeting(address: SocketAddr) -> io::Result<String> {
    timeout(PATIENCE, async {
        let mut stream = TcpStream::connect(address).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    })
    .await
    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Connects, sends `bytes`, ends its half, and reads until the server closes.
pub async fn echo(address: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    timeout(PATIENCE, async {
        let mut stream = TcpStream::connect(address).await?;
        let (mut reader, mut writer) = stream.split();
        let mut answer = Vec::new();
        let send = async {
            writer.write_all(bytes).await?;
            writer.shutdown().await
        };
        let (sent, read) = tokio::join!(send, reader.read_to_end(&mut answer));
        sent.and(read)?;
        Ok(answer)
    })
    .await
    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
