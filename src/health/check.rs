//! One check of a backend: it must accept a connection and, if the settings say so, send the expected
//! answer.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UnixStream};
use tokio::time::{Instant, timeout_at};

use super::check_error::{ANSWER_MAX_BYTES, CheckError, ExpectedAnswer};
use crate::balance::backend::{Endpoint, Target};
use crate::config::HealthCheck;
use crate::net::descriptors::{User, is_reserved};
use crate::net::errors::exhausted;

/// Checks one address of a backend once, for at most `timeout`.
pub(super) async fn check(target: &Target, settings: &HealthCheck) -> Result<(), CheckError> {
    #[cfg(test)]
    fault::check();
    let deadline = Deadline::new(settings.timeout);
    match target.endpoint() {
        Endpoint::Tcp(mut address) => {
            address.set_port(settings.port.unwrap_or(address.port()));
            ask_tcp(address, settings, deadline).await
        }
        Endpoint::Unix(path) => ask_unix(&path, settings, deadline).await,
    }
}

/// When a check must have ended.
#[derive(Clone, Copy)]
struct Deadline {
    timeout: Duration,
    at: Instant,
}

impl Deadline {
    fn new(timeout: Duration) -> Self {
        Self { timeout, at: Instant::now() + timeout }
    }

    /// Returns the error of a check whose time is over: `error`, or [`CheckError::Late`] if this thread ran
    /// late. A late thread still reads an answer that came in time, since the runtime polls sockets before
    /// timers. But a request that was sent late left the backend too little time.
    fn missed(self, error: CheckError) -> CheckError {
        let late = self.at.elapsed();
        if late > self.timeout / 4 { CheckError::Late(late) } else { error }
    }
}

async fn ask_tcp(address: SocketAddr, settings: &HealthCheck, deadline: Deadline) -> Result<(), CheckError> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(failed)?;
    leave_reserve(&socket)?;
    // Closing sends a reset. Otherwise each of thousands of checks a second would leave a port in TIME_WAIT.
    socket.set_zero_linger().map_err(failed)?;
    let mut stream = timeout_at(deadline.at, socket.connect(address))
        .await
        .map_err(|_| deadline.missed(CheckError::NoConnection(deadline.timeout)))?
        .map_err(failed)?;
    // The kernel can connect a socket to itself if the port is in the ephemeral range.
    if stream.local_addr().is_ok_and(|local| local == address) {
        return Err(CheckError::ToItself);
    }
    exchange(&mut stream, settings, deadline).await
}

async fn ask_unix(path: &Path, settings: &HealthCheck, deadline: Deadline) -> Result<(), CheckError> {
    let mut stream = timeout_at(deadline.at, UnixStream::connect(path))
        .await
        .map_err(|_| deadline.missed(CheckError::NoConnection(deadline.timeout)))?
        .map_err(failed)?;
    leave_reserve(&stream)?;
    exchange(&mut stream, settings, deadline).await
}

/// Fails if `socket` has one of the reserved last descriptors, which are for the admin server, Redis and
/// saved tables.
fn leave_reserve(socket: &impl AsFd) -> Result<(), CheckError> {
    if is_reserved(socket, User::Checks) {
        return Err(CheckError::Exhausted(Errno::MFILE.into()));
    }
    Ok(())
}

fn failed(error: io::Error) -> CheckError {
    if exhausted(&error) || error.kind() == io::ErrorKind::AddrNotAvailable {
        CheckError::Exhausted(error)
    } else {
        CheckError::Connect(error)
    }
}

/// Sends the request and waits for the expected answer, as far as the settings have them.
async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    settings: &HealthCheck,
    deadline: Deadline,
) -> Result<(), CheckError> {
    if settings.send.is_none() && settings.expect.is_none() {
        return Ok(());
    }
    let mut received = Vec::new();
    let exchanging = async {
        if let Some(send) = &settings.send {
            stream.write_all(send).await?;
        }
        let Some(expect) = &settings.expect else { return Ok(Ok(())) };
        receive(stream, expect, &mut received).await
    };
    match timeout_at(deadline.at, exchanging).await {
        Ok(Ok(found)) => found.map_err(|wrong| wrong(ExpectedAnswer::new(settings, &received))),
        Ok(Err(error)) => Err(CheckError::Broken(error)),
        Err(_) => {
            Err(deadline
                .missed(CheckError::Silent(deadline.timeout, ExpectedAnswer::new(settings, &received))))
        }
    }
}

/// Reads until `expect` has come. If the connection ends or the answer grows too long before, returns
/// `Ok(Err(make))`, where `make` makes the error.
async fn receive<S: AsyncRead + Unpin>(
    stream: &mut S,
    expect: &[u8],
    received: &mut Vec<u8>,
) -> io::Result<Result<(), fn(ExpectedAnswer) -> CheckError>> {
    loop {
        // The expected answer may begin in the last bytes that were searched before, but not earlier.
        let begin = received.len().saturating_sub(expect.len() - 1);
        let read = stream.read_buf(received).await?;
        if received[begin..].windows(expect.len()).any(|window| window == expect) {
            return Ok(Ok(()));
        }
        if read == 0 {
            return Ok(Err(CheckError::Closed));
        }
        if received.len() >= ANSWER_MAX_BYTES {
            return Ok(Err(CheckError::TooMuch));
        }
    }
}

/// Makes checks of this thread panic, for tests.
#[cfg(test)]
pub(super) mod fault {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<u32> = const { Cell::new(0) };
    }

    pub(in super::super) fn panic_in_next_checks(checks: u32) {
        LEFT.set(checks);
    }

    pub(in super::super) fn is_over() -> bool {
        LEFT.get() == 0
    }

    pub(super) fn check() {
        if LEFT.get() > 0 {
            LEFT.set(LEFT.get() - 1);
            panic!("a fault that a test asked for");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;
    use std::sync::Arc;

    use crate::balance::backend::Registry;
    use tokio::io::duplex;

    fn settings(send: Option<&[u8]>, expect: Option<&[u8]>) -> HealthCheck {
        HealthCheck {
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: NonZeroU32::MIN,
            fall: NonZeroU32::MIN,
            port: None,
            send: send.map(Arc::from),
            expect: expect.map(Arc::from),
        }
    }

    /// The result of a check of a backend that sends `pieces`, and then closes or stays silent.
    async fn answer(pieces: Vec<Vec<u8>>, closes: bool) -> Result<(), CheckError> {
        let (mut stream, mut backend) = duplex(1024);
        let sending = tokio::spawn(async move {
            let mut sent = [0; 4];
            backend.read_exact(&mut sent).await.expect("the question");
            assert_eq!(&sent, b"PING");
            for piece in pieces {
                // The check may have ended already.
                let _ = backend.write_all(&piece).await;
                tokio::task::yield_now().await;
            }
            if !closes {
                std::future::pending::<()>().await;
            }
        });
        let result = {
            let deadline = Deadline::new(Duration::from_secs(1));
            exchange(&mut stream, &settings(Some(b"PING"), Some(b"PONG")), deadline).await
        };
        sending.abort();
        result
    }

    #[tokio::test(start_paused = true)]
    async fn the_expected_answer_is_found_at_any_position_and_in_any_pieces() {
        for pieces in [
            vec![b"PONG".to_vec()],
            vec![b"+PONG\r\n".to_vec()],
            vec![b"P".to_vec(), b"O".to_vec(), b"N".to_vec(), b"G".to_vec()],
            vec![b"PPPO".to_vec(), b"PON".to_vec(), b"G and more".to_vec()],
            vec![vec![b'.'; 60_000], b"PONG".to_vec()],
        ] {
            answer(pieces, false).await.expect("it is there");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn any_other_answer_is_logged_in_short() {
        let error_of =
            async |pieces, closes| answer(pieces, closes).await.expect_err("it is not there").to_string();
        assert_eq!(error_of(vec![], false).await, "no answer within 1s, expected \"PONG\"");
        assert_eq!(
            error_of(vec![b"-ERR\r\n".to_vec()], true).await,
            "the connection was closed before the answer, expected \"PONG\", got \"-ERR\\r\\n\""
        );
        let megabytes = error_of(vec![vec![b'x'; 3_000_000]], false).await;
        assert!(megabytes.starts_with("not among the first 65536 bytes of the answer: \"PONG\", got \"xxx"));
        assert!(megabytes.len() < 150, "{megabytes}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_on_a_late_thread_does_not_blame_the_backend() {
        let (mut stream, _backend) = duplex(1024);
        let settings = settings(Some(b"PING"), Some(b"PONG"));
        let mut asking = Box::pin(exchange(&mut stream, &settings, Deadline::new(Duration::from_secs(1))));
        assert!(tokio::time::timeout(Duration::ZERO, &mut asking).await.is_err(), "no answer comes");
        tokio::time::advance(Duration::from_secs(3)).await;
        let error = asking.await.expect_err("no answer comes");
        assert!(matches!(error, CheckError::Late(_)) && !error.is_of_backend(), "{error}");
    }

    #[tokio::test]
    async fn a_connection_is_enough_if_no_answer_is_expected_and_each_address_of_a_name_is_checked() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let registry = Registry::new(1);
        let backend = registry.get_or_create(&format!("db.test:{}", address.port()).parse().expect("a name"));
        assert_eq!(Target::all_of(&backend).count(), 0, "it has not been resolved");

        // Nothing listens on the first one.
        let dead = SocketAddr::from(([127, 0, 0, 0], 1));
        backend.set_resolved(vec![dead, address]);
        let targets: Vec<_> = Target::all_of(&backend).collect();
        let result = check(&targets[0], &settings(None, None)).await;
        assert!(matches!(result, Err(CheckError::Connect(_))), "{result:?}");
        check(&targets[1], &settings(None, None)).await.expect("it listens");
        drop(listener);
        let result = check(&targets[1], &settings(None, None)).await;
        assert!(matches!(result, Err(CheckError::Connect(_))), "{result:?}");
    }
}
