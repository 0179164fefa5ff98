//! A data-plane thread: its own runtime, its own listening sockets, its own sessions.

use std::future::poll_fn;
use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::task::{self, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::oneshot::{self, error::RecvError};
use tokio::task::yield_now;
use tracing::{error, warn};

use super::handover::{Connection, Inbox, Neighbours};
use crate::balance::pool::Pool;
use crate::config::LogFormat;
use crate::drain::Drain;
use crate::listen::accept::{self, Listening};
use crate::observe::counters::{PerWorker, WorkerId};
use crate::observe::log_sink::LogSink;
use crate::reactor::{Runtime, spawn as spawn_task};
use crate::relay::Stream;
use crate::session::access_log::AccessLog;
use crate::session::{self, Context, Listener, SessionCounters, Settings, Starvation, Worker};

/// One socket that a worker accepts from: a [`Listening`] one once the worker has started.
#[derive(Debug)]
pub struct BoundListener<S = TcpListener> {
    /// Bound and listening.
    pub socket: S,
    /// Whose it is.
    pub listener: Arc<Listener>,
    /// Where its sessions go.
    pub pool: Arc<Pool>,
    /// How they are served.
    pub settings: Settings,
}

impl BoundListener {
    /// Begins to watch its socket on this thread.
    fn watch(self) -> io::Result<BoundListener<Listening>> {
        let Self { socket, listener, pool, settings } = self;
        let socket = Listening::watch(socket).map_err(|error| {
            let name = &listener.name;
            io::Error::new(
                error.kind(),
                format!("listeners.{name}: a listening socket cannot be watched: {error}"),
            )
        })?;
        Ok(BoundListener { socket, listener, pool, settings })
    }
}

/// What a worker needs beside its sockets.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Where sessions are logged; `None`: nowhere.
    pub access_log: Option<(LogFormat, LogSink)>,
    /// How sessions ended.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    /// Whether sessions lack descriptors.
    pub starvation: Arc<Starvation>,
    /// When to end.
    pub drain: Drain,
}

/// How a worker shares the work with the others.
#[derive(Debug)]
pub struct Sharing {
    /// Those it may hand connections to.
    pub neighbours: Neighbours,
    /// What they hand to it.
    pub inbox: Inbox,
}

/// A worker's end, sent however it ends.
#[derive(Debug)]
pub struct Ended {
    tell: mpsc::UnboundedSender<Option<u64>>,
    cut: Option<u64>,
}

impl Ended {
    /// Tells `tell` how many sessions were cut, or `None` if the worker died.
    #[must_use]
    pub fn new(tell: mpsc::UnboundedSender<Option<u64>>) -> Self {
        Self { tell, cut: None }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens once the control plane has died.
        let _ = self.tell.send(self.cut);
    }
}

/// Starts the thread. It ends when the drain has begun and no session is left, or when sessions are cut, and says so
/// through `ended`.
///
/// # Errors
/// No thread, no epoll descriptor, or a listening socket that cannot be watched. The thread has ended then.
pub fn spawn(
    id: WorkerId,
    listeners: Vec<BoundListener>,
    sharing: Sharing,
    shared: Shared,
    ended: Ended,
) -> io::Result<JoinHandle<()>> {
    let (started, has_started) = sync_channel(1);
    let thread = thread::Builder::new().name(format!("statera-{}", id.0)).spawn(move || {
        let mut ended = ended;
        // Made on the thread that drives it: it cannot be sent there.
        let ready = Runtime::new().and_then(|runtime| {
            let listeners =
                listeners.into_iter().map(BoundListener::watch).collect::<io::Result<Vec<_>>>()?;
            Ok((runtime, listeners))
        });
        match ready {
            Ok((runtime, listeners)) => {
                // `spawn` waits for this.
                let _ = started.send(Ok(()));
                ended.cut = Some(run(runtime, id, listeners, sharing, &shared));
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        }
    })?;
    let started = has_started.recv().unwrap_or_else(|_| Err(io::Error::other("the worker died")));
    if let Err(error) = started {
        // It was told why, or has died: nothing more is to be heard from it.
        let _ = thread.join();
        return Err(error);
    }
    Ok(thread)
}

fn run(
    mut runtime: Runtime,
    id: WorkerId,
    listeners: Vec<BoundListener<Listening>>,
    sharing: Sharing,
    shared: &Shared,
) -> u64 {
    let access_log = shared.access_log.as_ref().map(|(format, sink)| AccessLog::new(*format, sink.clone()));
    let limits = listeners.iter().map(|bound| &bound.settings.limits);
    let shortest = limits
        .map(|limits| limits.half_closed.min(limits.peer_timeout).min(limits.idle.unwrap_or(Duration::MAX)));
    let shortest = shortest.min();
    let worker = Rc::new(Worker::new(
        id,
        shortest.unwrap_or(Duration::MAX),
        access_log,
        Arc::clone(&shared.sessions),
        Arc::clone(&shared.starvation),
    ));
    let cut = runtime.block_on(serve(&worker, listeners, sharing, &shared.drain));
    // Sessions that are left end here: their futures are dropped, which resets and reports them.
    drop(runtime);
    if let Some(log) = &worker.access_log {
        log.hand_over_last();
    }
    cut
}

/// Returns the number of sessions that are left.
async fn serve(
    worker: &Rc<Worker>,
    listeners: Vec<BoundListener<Listening>>,
    sharing: Sharing,
    drain: &Drain,
) -> u64 {
    if worker.access_log.is_some() {
        let worker = Rc::clone(worker);
        spawn_task(async move {
            if let Some(log) = &worker.access_log {
                log.run().await;
            }
        });
    }
    let clock = Rc::clone(worker);
    spawn_task(async move { clock.relay.clock.run().await });
    let mut accepting = Vec::new();
    let neighbours = Rc::new(sharing.neighbours);
    let mut contexts = Vec::new();
    close_leaving(&listeners, worker);
    for (index, BoundListener { socket, listener, pool, settings }) in listeners.into_iter().enumerate() {
        let context = Rc::new(Context { worker: Rc::clone(worker), listener, pool, settings });
        contexts.push(Rc::clone(&context));
        let accepts = accept_at(socket, index, context, Rc::clone(&neighbours), drain.clone());
        let (tell, ended) = oneshot::channel();
        accepting.push(ended);
        spawn_task(async move {
            accepts.await;
            // Who does not listen any more is about to end.
            let _ = tell.send(());
        });
    }
    // The accept loops alone hold the neighbours: when all have ended everywhere, so do the inboxes.
    drop(neighbours);
    let mut inbox = sharing.inbox;
    let finished = async {
        // A defect of ours. The control plane sees this worker end before the drain, and starts it.
        let died = |_: &_| error!("an accept loop died");
        let accepted = async { poll_fn(|cx| poll_ended(&mut accepting, cx)).await.inspect_err(died) };
        let taken_over = async {
            while let Some(connection) = inbox.recv().await {
                let context = &contexts[connection.listener];
                begin(connection, context);
                yield_now().await;
            }
            Ok(())
        };
        if tokio::try_join!(accepted, taken_over).is_ok() {
            worker.idle().await;
        }
    };
    tokio::select! {
        biased;
        () = finished => {}
        () = drain.closing() => {}
    }
    // What nobody has begun yet is cut like the sessions that are left, and counted and logged like them.
    inbox.close();
    while let Ok(connection) = inbox.try_recv() {
        let context = &contexts[connection.listener];
        begin(connection, context);
    }
    worker.active()
}

/// Ready once all have ended, or one has died.
fn poll_ended(
    all: &mut Vec<oneshot::Receiver<()>>,
    cx: &mut task::Context<'_>,
) -> Poll<Result<(), RecvError>> {
    let mut died = Ok(());
    all.retain_mut(|ended| match Pin::new(ended).poll(cx) {
        Poll::Pending => true,
        Poll::Ready(result) => {
            died = died.clone().and(result);
            false
        }
    });
    if died.is_ok() && !all.is_empty() { Poll::Pending } else { Poll::Ready(died) }
}

/// One task for each pool, however many listeners lead to it.
fn close_leaving(listeners: &[BoundListener<Listening>], worker: &Rc<Worker>) {
    for (index, bound) in listeners.iter().enumerate() {
        if !listeners[..index].iter().any(|before| Arc::ptr_eq(&before.pool, &bound.pool)) {
            let (worker, pool) = (Rc::clone(worker), Arc::clone(&bound.pool));
            spawn_task(session::leaving::close(worker, pool, bound.settings.limits.settle_time));
        }
    }
}

async fn accept_at(
    socket: Listening,
    index: usize,
    context: Rc<Context>,
    neighbours: Rc<Neighbours>,
    drain: Drain,
) {
    let Context { worker, listener, .. } = &*context;
    let on_connection = |socket, client| {
        if let Some(connection) = neighbours.offer(Connection::new(index, socket, client)) {
            begin(connection, &context);
        }
    };
    let counters = listener.counters.of(worker.id);
    accept::run(socket, &listener.name, counters, &drain, || worker.is_starved(), on_connection).await;
}

fn begin(connection: Connection, context: &Rc<Context>) {
    let client = connection.client;
    match Stream::accepted(connection.into_socket()) {
        Ok(stream) => spawn_task(session::serve(stream, client, Rc::clone(context))),
        Err(error) => {
            let listener = &context.listener;
            listener.counters.of(context.worker.id).accept_failed.add(1);
            warn!(listener = %listener.name, %client, %error, "cannot watch a connection");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::TcpStream;

    use crate::balance::{Balance, Table};
    use crate::config::Config;
    use crate::data_plane::handover;
    use crate::drain::{self, Phase};

    fn any() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").expect("a free port")
    }

    fn bound(socket: TcpListener) -> BoundListener {
        let config = Config::from_yaml(
            "listeners: {web: {bind: \"127.0.0.1:0\", pool: web}}\npools: {web: {backends: {\"127.0.0.1:9\": 1}}}",
        )
        .expect("a valid config");
        BoundListener {
            socket,
            listener: Arc::new(Listener { name: "web".into(), counters: PerWorker::new(1) }),
            pool: Arc::new(Pool::new("web".into(), Balance::WeightedRandom, Table::default(), None, 1)),
            settings: Settings::from(&config.pools[0]),
        }
    }

    /// The kernel refuses to watch a plain file, as it refuses sockets beyond fs.epoll.max_user_watches.
    #[test]
    fn a_listening_socket_that_cannot_be_watched_fails_the_start_and_leaves_no_thread() {
        let file = std::fs::File::open("/proc/self/exe").expect("this program");
        let (control, drain) = drain::channel();
        control.advance(Phase::Serving);
        let sessions = Arc::new(PerWorker::new(1));
        let (neighbours, inbox) = handover::between(1, &sessions).remove(0);
        let shared = Shared { access_log: None, sessions, starvation: Arc::default(), drain };
        let (tell, mut ends) = mpsc::unbounded_channel();
        let listeners = vec![bound(any()), bound(TcpListener::from(std::os::fd::OwnedFd::from(file)))];
        let sharing = Sharing { neighbours, inbox };
        let error = spawn(WorkerId(0), listeners, sharing, shared, Ended::new(tell)).expect_err("a file");
        assert!(error.to_string().starts_with("listeners.web: a listening socket"), "{error}");
        assert_eq!(ends.try_recv(), Ok(None), "the thread has ended");
    }

    /// It was accepted, so it is cut like a session, not lost: counted, logged and reset.
    #[test]
    fn a_connection_that_is_handed_over_at_the_very_end_is_cut() {
        let bound = bound(any());
        bound.socket.set_nonblocking(true).expect("a socket");
        let other = any();
        let mut client = TcpStream::connect(other.local_addr().expect("bound")).expect("it listens");
        let (socket, address) = other.accept().expect("a client");

        let (control, drain) = drain::channel();
        control.advance(Phase::Closing);
        let sessions = Arc::new(PerWorker::new(1));
        let (neighbours, _) = handover::between(1, &sessions).remove(0);
        let (hand, inbox) = mpsc::channel(1);
        hand.try_send(Connection::new(0, socket.into(), address)).expect("room");
        let listener = Arc::clone(&bound.listener);
        let shared =
            Shared { access_log: None, sessions: Arc::clone(&sessions), starvation: Arc::default(), drain };
        let sharing = Sharing { neighbours, inbox };
        let runtime = Runtime::new().expect("descriptors");
        let listeners = vec![bound.watch().expect("a socket")];
        let cut = run(runtime, WorkerId(0), listeners, sharing, &shared);

        assert_eq!((cut, listener.counters.of(WorkerId(0)).connections.get()), (1, 1));
        assert_eq!(sessions.of(WorkerId(0)).closed(session::CloseReason::Shutdown).get(), 1);
        let error = client.read(&mut [0]).expect_err("no clean end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
