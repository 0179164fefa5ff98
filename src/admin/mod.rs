//! The admin server: liveness, readiness and metrics over HTTP, for monitoring systems and orchestrators.
//!
//! It runs on the control plane. The number of connections and the time for a request are bounded. When
//! there are too many connections, the server closes the oldest idle one: a new request matters more than an
//! idle connection. `/livez` and `/readyz` require no token, since orchestrators have none. Next:
//! `scrapes.rs` shares one text among concurrent scrapes.

mod scrapes;

use std::collections::VecDeque;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, yield_now};
use tokio::time::{sleep, timeout};
use tracing::debug;

use self::scrapes::Scrapes;
use crate::config::{Admin, Secret};
use crate::drain::{Drain, Phase};
use crate::fault;
use crate::metrics::format::Format;
use crate::metrics::{self, Observed};
use crate::net::descriptors::{self, User};
use crate::net::errors::{exhausted, explain};

const MOST_CONNECTIONS: usize = 256;
/// The limit on connections while clients use all descriptors that they may have.
const MOST_IN_SHORTAGE: usize = 8;
const HEADER_TIME: Duration = Duration::from_secs(5);
/// How long a connection may stay open. A scraper with a longer one has to reconnect.
const CONNECTION_TIME: Duration = Duration::from_secs(300);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server's answers are made from.
#[derive(Debug)]
pub struct AdminState {
    scrapes: Arc<Scrapes>,
    /// The phase decides whether the proxy is ready.
    drain: Drain,
    /// The token that `/metrics` requires; `None` if it is open.
    token: Option<Secret>,
}

impl AdminState {
    /// Serves the metrics of `observed` and the readiness of `drain`. `/metrics` requires `token` if there
    /// is one.
    #[must_use]
    pub fn new(observed: Observed, drain: Drain, token: Option<Secret>) -> Self {
        let scrapes = Scrapes::new(move |format, size| metrics::encode(&observed, format, size));
        Self { scrapes, drain, token }
    }
}

/// The admin address cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("admin.bind: {address}: {reason}")]
pub struct AdminBindError {
    address: std::net::SocketAddr,
    reason: String,
}

/// Binds the admin address.
///
/// # Errors
/// The address is taken, forbidden or not this machine's; the message says what to do.
pub fn bind(admin: &Admin) -> Result<StdListener, AdminBindError> {
    let bound = StdListener::bind(admin.bind).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|error| AdminBindError { address: admin.bind, reason: explain(&error) })
}

/// Serves on `listener`. Never ends.
pub async fn serve(listener: Arc<TcpListener>, state: Arc<AdminState>) {
    let guarded = Router::new()
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&state), require_token));
    let open = Router::new().route("/livez", get(|| async { "live\n" })).route("/readyz", get(readyz));
    let service = TowerToHyperService::new(open.merge(guarded).with_state(state));
    let mut connections: VecDeque<Connection> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "the admin server cannot accept");
                if exhausted(&error) {
                    make_room(&mut connections, MOST_IN_SHORTAGE);
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        fault::point("admin", "");
        // The descriptor is in the control plane's reserve, which Redis, names and saved tables need as
        // well.
        let is_short = descriptors::is_reserved(&stream, User::Sessions);
        make_room(&mut connections, if is_short { MOST_IN_SHORTAGE } else { MOST_CONNECTIONS });
        connections.push_back(Connection::serve(stream, service.clone()));
        // Let the connection read its request, so that it does not count as idle when the next one needs
        // room.
        yield_now().await;
    }
}

/// Closes connections until there are fewer than `most`: the oldest without a request under way, else the
/// oldest of all.
fn make_room(connections: &mut VecDeque<Connection>, most: usize) {
    connections.retain(|connection| !connection.task.is_finished());
    while connections.len() >= most {
        let idle = connections.iter().position(|connection| !connection.answering.load(Relaxed));
        if let Some(connection) = connections.remove(idle.unwrap_or(0)) {
            connection.task.abort();
        }
    }
}

/// A connection, served by a task of its own.
struct Connection {
    task: AbortHandle,
    /// True while a request is under way.
    answering: Arc<AtomicBool>,
}

impl Connection {
    fn serve(stream: TcpStream, service: TowerToHyperService<Router>) -> Self {
        let answering = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&answering);
        let service = service_fn(move |request| {
            let (mark, answer) = (Arc::clone(&mark), service.call(request));
            mark.store(true, Relaxed);
            async move {
                let answer = answer.await;
                mark.store(false, Relaxed);
                answer
            }
        });
        let task = tokio::spawn(async move {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIME)
                .serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = timeout(CONNECTION_TIME, connection).await {
                debug!(%error, "an admin connection failed");
            }
        });
        Self { task: task.abort_handle(), answering }
    }
}

/// Answers whether the proxy is in the phase serving. Before, the admin server answers `starting`, while
/// the first reads of Redis are under way.
async fn readyz(State(state): State<Arc<AdminState>>) -> Response {
    match state.drain.phase() {
        Phase::Serving => (StatusCode::OK, "ready\n"),
        Phase::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        Phase::Leaving | Phase::Draining | Phase::Closing => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
    .into_response()
}

async fn metrics(State(state): State<Arc<AdminState>>, headers: HeaderMap) -> Response {
    let accepted = headers.get_all(header::ACCEPT).iter();
    // A value that is not ASCII is no media type; "?" makes the header malformed.
    let accepted: Vec<&str> = accepted.map(|value| value.to_str().unwrap_or("?")).collect();
    let format = Format::wanted(&accepted.join(","));
    match state.scrapes.text(format).await {
        Ok(text) => {
            ([(header::CONTENT_TYPE, format.content_type()), (header::VARY, "accept")], text).into_response()
        }
        Err(error) => {
            debug!(%error, "a scrape was refused");
            (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response()
        }
    }
}

async fn require_token(State(state): State<Arc<AdminState>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let allowed = match &state.token {
        None => true,
        Some(token) => given.and_then(|v| v.strip_prefix("Bearer ")).is_some_and(|t| same(t, token.expose())),
    };
    if allowed {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    let cure = "send the token of admin.token_file as `Authorization: Bearer …`\n";
    (StatusCode::UNAUTHORIZED, challenge, cure).into_response()
}

/// Compares tokens. The time does not depend on how many characters match, so a token cannot be guessed
/// character by character.
fn same(given: &str, token: &str) -> bool {
    let differs = given.bytes().zip(token.bytes()).fold(0, |differs, (a, b)| differs | (a ^ b));
    given.len() == token.len() && std::hint::black_box(differs) == 0
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn only_the_whole_token_is_accepted() {
        assert!(same("secret", "secret"));
        for wrong in ["", "secre", "secrets", "Secret", "secreu"] {
            assert!(!same(wrong, "secret"), "{wrong}");
        }
    }
}
