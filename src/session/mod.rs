//! The life of a session. [`serve`] has its stages in their order.
//!
//! | stage | what happens | file |
//! |---|---|---|
//! | accept | a worker accepts a connection; its listener's [`Context`] has pool and settings | `listen` |
//! | open | the session is counted and its report begins | `report.rs` |
//! | pick and connect | a backend is picked and connected, on a failure another one | `connect.rs` |
//! | relay | bytes are relayed in both directions until the session ends | `relay` |
//! | report | the end is counted and logged, when the report is dropped | `report.rs`, `access_log.rs` |
//!
//! `connect.rs` uses `queue.rs` (the wait while all backends are full) and `attempt.rs` (one attempt at one
//! backend). What the sessions of a worker share is in `worker.rs`; `draining.rs` closes the sessions of
//! draining backends.

pub mod access_log;
mod attempt;
mod close_reason;
mod connect;
pub mod draining;
mod failures;
mod queue;
mod report;
mod worker;

pub use close_reason::CloseReason;
pub use report::SessionCounters;
pub use worker::{Starvation, Worker};

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use self::report::Report;
use crate::balance::pool::Pool;
use crate::config;
use crate::fault;
use crate::net::options::tcp_keepalive;
use crate::observe::counters::{ListenerCounters, PerWorker};
use crate::relay::{self, Limits, Stream};

/// What the sessions of one listener share on one worker.
#[derive(Debug)]
pub struct Context {
    /// The worker that the sessions run on.
    pub worker: Rc<Worker>,
    /// The listener that accepted the sessions.
    pub listener: Arc<Listener>,
    /// The pool whose backends serve the sessions.
    pub pool: Arc<Pool>,
    /// The settings of the sessions.
    pub settings: Settings,
}

/// A listener's name and counters.
#[derive(Debug)]
pub struct Listener {
    /// The listener's key in config.yaml.
    pub name: Arc<str>,
    /// The listener's counters, one set for each worker.
    pub counters: PerWorker<ListenerCounters>,
}

/// A session's settings. They stay the same from its start to its end.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Attempts and timeouts of the connect to a backend.
    pub connect: config::Connect,
    /// How long the session may be silent.
    pub limits: Limits,
    /// The congestion control of the connection to the backend. `None`: the system's default.
    pub congestion: Option<config::Congestion>,
}

impl From<&config::Pool> for Settings {
    fn from(pool: &config::Pool) -> Self {
        let limits = Limits {
            idle: pool.idle_timeout,
            half_closed: pool.half_close_timeout,
            keepalive: tcp_keepalive(pool.keepalive.idle, pool.keepalive.interval, pool.keepalive.probes),
            keepalive_idle: pool.keepalive.idle,
            peer_timeout: pool.keepalive.timeout(),
            settle_time: pool.keepalive.idle.min(LONGEST_SETTLE_TIME),
        };
        Self { connect: pool.connect, limits, congestion: pool.tcp_congestion.clone() }
    }
}

/// The upper bound of `settle_time`. Switching keepalive on late loses nothing, because the kernel counts
/// the silence from the last packet and not from that call.
const LONGEST_SETTLE_TIME: Duration = Duration::from_secs(5);

/// Serves one client from accept to close.
///
/// The session counts as open from this call on, not from the first poll, so that a worker that is about to
/// end waits for it.
///
/// # Cancel safety
/// Dropping the future resets both connections and reports the session as cut by the shutdown.
pub fn serve(mut client: Stream, address: SocketAddr, context: Rc<Context>) -> impl Future<Output = ()> {
    // Open. The report counts and logs when it is dropped, so that no path forgets it.
    let mut report = Report::open(context, address);
    // A block, because an async function would keep each of its arguments twice for the whole session.
    async move {
        // Pick and connect. Boxed, so that the memory of this stage (timers, a wait for Redis) is freed
        // before the relay, in which a session spends its life.
        let mut backend = match Box::pin(connect::connect(&mut report, &client)).await {
            Ok(backend) => backend,
            Err(reason) => {
                if reason == CloseReason::ConnectLeft {
                    // The client's connection is broken already, so the drop need not reset it.
                    client.finish();
                }
                return report.close(reason);
            }
        };

        // Relay.
        fault::point("session_relays", report.backend());
        let (limits, shared, backend_key, meter) = report.relay_parts();
        let ended = relay::relay(&mut client, &mut backend, limits, shared, backend_key, meter).await;
        // Report: the drop of `report` counts and logs the session.
        report.close(CloseReason::Relayed(ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Balance, Table};
    use crate::config::Config;
    use crate::observe::counters::WorkerId;

    /// A client that was accepted, its address, and the context of its session. Needs a reactor.
    fn accepted() -> (Stream, SocketAddr, Rc<Context>) {
        let config = Config::from_yaml(
            "listeners: {web: {bind: \"127.0.0.1:0\", pool: web}}\n\
             pools: {web: {backends: {\"127.0.0.1:9\": 1}}}",
        )
        .expect("a valid config");
        let worker = Worker::new(
            WorkerId(0),
            Duration::from_secs(1),
            None,
            Arc::new(PerWorker::new(1)),
            Arc::default(),
        );
        let pool = Pool::new("web".into(), Balance::WeightedRandom, Table::default(), None, 1);
        let context = Rc::new(Context {
            worker: Rc::new(worker),
            listener: Arc::new(Listener { name: "web".into(), counters: PerWorker::new(1) }),
            pool: Arc::new(pool),
            settings: Settings::from(&config.pools[0]),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let client = std::net::TcpStream::connect(address).expect("it listens");
        (Stream::accepted(client.into()).expect("a runtime"), address, context)
    }

    /// A session keeps this allocation until it ends. glibc rounds an allocation up to a multiple of 16,
    /// plus 8 bytes: 280 bytes use 280, 281 bytes use 296.
    #[tokio::test]
    async fn a_session_stays_small() {
        let _reactor = crate::reactor::beside_tokio::install();
        let (client, address, context) = accepted();
        let session = serve(client, address, context);
        let bytes = std::mem::size_of_val(&session);
        assert!(bytes <= 280, "{bytes} bytes: what is kept through the relay?");
    }

    /// glibc's thread cache serves allocations of up to 1,032 bytes. A larger one costs 700 instructions
    /// more.
    #[tokio::test]
    async fn what_connecting_needs_fits_into_the_allocators_cache() {
        let _reactor = crate::reactor::beside_tokio::install();
        let (client, address, context) = accepted();
        let mut report = Report::open(context, address);
        let bytes = std::mem::size_of_val(&connect::connect(&mut report, &client));
        assert!(bytes <= 1032, "{bytes} bytes");
    }
}
