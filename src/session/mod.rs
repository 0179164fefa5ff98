//! The life of a session: a client was accepted, a backend is found for it, bytes are relayed both ways, and what
//! became of it is reported.

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
use crate::net::options::tcp_keepalive;
use crate::observe::counters::{ListenerCounters, PerWorker};
use crate::relay::{self, Limits, Stream};

/// All that the sessions of one listener have in common on one worker.
#[derive(Debug)]
pub struct Context {
    /// The thread they live on.
    pub worker: Rc<Worker>,
    /// Where they came in.
    pub listener: Arc<Listener>,
    /// Where they go.
    pub pool: Arc<Pool>,
    /// How they are served.
    pub settings: Settings,
}

/// A listener, as far as its sessions are concerned.
#[derive(Debug)]
pub struct Listener {
    /// The key it stands under in config.yaml.
    pub name: Arc<str>,
    /// What the workers count of it.
    pub counters: PerWorker<ListenerCounters>,
}

/// A session's settings: the same from its start to its end.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How a backend is reached.
    pub connect: config::Connect,
    /// How long it may be silent.
    pub limits: Limits,
    /// Of its connection to the backend; `None`: the system's.
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

/// The kernel counts silence from the last packet, not from when it was asked to, so nothing is lost by asking late.
const LONGEST_SETTLE_TIME: Duration = Duration::from_secs(5);

/// Serves one client from accept to close. The session counts as open from the call, not from the first poll: a worker
/// that is about to end waits for it.
///
/// # Cancel safety
/// Dropping the future resets both connections and reports the session as cut by the shutdown.
pub fn serve(mut client: Stream, address: SocketAddr, context: Rc<Context>) -> impl Future<Output = ()> {
    let mut report = Report::open(context, address);
    // A block, not an async function: that would keep each of its arguments twice, for as long as the session lives.
    async move {
        // Boxed, so that what only connecting needs (timers, a place to wait for Redis) is given back before the relay,
        // in which a session spends its life.
        let mut backend = match Box::pin(connect::connect(&mut report, &client)).await {
            Ok(backend) => backend,
            Err(reason) => {
                if reason == CloseReason::ConnectLeft {
                    // There is nothing left to be reset.
                    client.finish();
                }
                return report.close(reason);
            }
        };

        let (limits, shared, backend_key, meter) = report.relay_parts();
        let ended = relay::relay(&mut client, &mut backend, limits, shared, backend_key, meter).await;
        report.close(CloseReason::Relayed(ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Balance, Table};
    use crate::config::Config;
    use crate::observe::counters::WorkerId;

    /// A client that was accepted, and what its session shares with others. Needs a reactor.
    fn accepted() -> (Stream, SocketAddr, Rc<Context>) {
        let config = Config::from_yaml(
            "listeners: {web: {bind: \"127.0.0.1:0\", pool: web}}\npools: {web: {backends: {\"127.0.0.1:9\": 1}}}",
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

    /// Five thousand idle sessions are five thousand of these. The allocator gives out multiples of 16, less 8: one more than 280
    /// is paid for as 296.
    #[tokio::test]
    async fn a_session_stays_small() {
        let _reactor = crate::reactor::beside_tokio::install();
        let (client, address, context) = accepted();
        let session = serve(client, address, context);
        let bytes = std::mem::size_of_val(&session);
        assert!(bytes <= 280, "{bytes} bytes: what holds them through the relay?");
    }

    /// Up to 1,032 bytes glibc's thread cache serves an allocation; a larger one costs 700 instructions more.
    #[tokio::test]
    async fn what_connecting_needs_fits_into_the_allocators_cache() {
        let _reactor = crate::reactor::beside_tokio::install();
        let (client, address, context) = accepted();
        let mut report = Report::open(context, address);
        let bytes = std::mem::size_of_val(&connect::connect(&mut report, &client));
        assert!(bytes <= 1032, "{bytes} bytes");
    }
}
