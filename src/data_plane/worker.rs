//! One thread of the data plane: a worker with its own reactor, listening sockets (`listeners.rs`) and
//! sessions.

use std::io;
use std::panic::resume_unwind;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::yield_now;

use super::handover::{Inbox, Neighbours};
use super::kept::keep_running;
use super::listeners::{AcceptDied, Commands, Listeners};
use crate::config::LogFormat;
use crate::control::supervised::Defects;
use crate::drain::Drain;
use crate::observe::counters::{PerWorker, WorkerId};
use crate::observe::log_sink::LogSink;
use crate::observe::tasks::Task;
use crate::reactor::Runtime;
use crate::session::access_log::AccessLog;
use crate::session::{SessionCounters, Starvation, Worker};

/// What all workers share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The format and the sink of the access log; `None` if it is off.
    pub access_log: Option<(LogFormat, LogSink)>,
    /// Counts how sessions ended.
    pub sessions: Arc<PerWorker<SessionCounters>>,
    /// Whether sessions lack descriptors.
    pub starvation: Arc<Starvation>,
    /// The shortest silence that any session is allowed.
    pub shortest_limit: Duration,
    /// Counts and logs the defects of workers.
    pub defects: Arc<Defects>,
    /// The phase of the process. In the last one, sessions are closed by force.
    pub drain: Drain,
}

/// A worker's ends of the handover of connections.
#[derive(Debug)]
pub struct Sharing {
    /// The other workers, to which it may hand connections.
    pub neighbours: Neighbours,
    /// The connections that the other workers hand to it.
    pub inbox: Inbox,
}

/// The end of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The worker.
    pub worker: WorkerId,
    /// How many sessions were closed by force; `None`: the worker panicked, or its runtime could not be
    /// created.
    pub cut: Option<u64>,
}

/// Reports the end of a worker when it is dropped, so also after a panic.
#[derive(Debug)]
pub struct Ended {
    tell: mpsc::UnboundedSender<End>,
    end: End,
}

impl Ended {
    /// Creates the report of `worker`, which is sent to `tell` when it is dropped.
    #[must_use]
    pub fn new(worker: WorkerId, tell: mpsc::UnboundedSender<End>) -> Self {
        Self { tell, end: End { worker, cut: None } }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // An error means that the control plane has ended already.
        let _ = self.tell.send(self.end);
    }
}

/// Starts the thread of a worker. It has no listeners until `commands` bring some.
///
/// It ends once the commands have ended and no session is left, or when sessions are closed by force, and
/// reports its end through `ended`.
///
/// # Errors
/// The system gives no thread or no epoll descriptor. No thread is left then.
pub fn spawn(
    id: WorkerId,
    commands: Commands,
    sharing: Sharing,
    shared: Shared,
    ended: Ended,
) -> io::Result<JoinHandle<()>> {
    let (started, has_started) = sync_channel(1);
    let thread = thread::Builder::new().name(format!("statera-{}", id.0)).spawn(move || {
        let mut ended = ended;
        // Made on its own thread, because it cannot be sent to another one.
        match Runtime::new() {
            Ok(runtime) => {
                // `spawn` waits for this.
                let _ = started.send(Ok(()));
                ended.end.cut = Some(run(runtime, id, commands, sharing, &shared));
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        }
    })?;
    let started = has_started.recv().unwrap_or_else(|_| Err(io::Error::other("the worker died")));
    if let Err(error) = started {
        // The error says why it ended, so its result has nothing to add.
        let _ = thread.join();
        return Err(error);
    }
    Ok(thread)
}

fn run(runtime: Runtime, id: WorkerId, commands: Commands, sharing: Sharing, shared: &Shared) -> u64 {
    let access_log = shared.access_log.as_ref().map(|(format, sink)| AccessLog::new(*format, sink.clone()));
    let worker = Rc::new(Worker::new(
        id,
        shared.shortest_limit,
        access_log,
        Arc::clone(&shared.sessions),
        Arc::clone(&shared.starvation),
    ));
    // Dropped after the runtime, also if this thread panics, so that the lines of all sessions are written.
    let _last_lines = LastLines(Rc::clone(&worker));
    // Dropping the runtime drops the futures of the remaining sessions, which resets and reports them.
    let mut runtime = runtime;
    runtime.block_on(serve(&worker, commands, sharing, shared))
}

/// When dropped, hands over the lines of the access log that are still in the buffer.
struct LastLines(Rc<Worker>);

impl Drop for LastLines {
    fn drop(&mut self) {
        if let Some(log) = &self.0.access_log {
            log.hand_over_last();
        }
    }
}

/// Serves until the commands and all sessions have ended, or until sessions are closed by force. Returns the
/// number of sessions that remain.
async fn serve(worker: &Rc<Worker>, commands: Commands, sharing: Sharing, shared: &Shared) -> u64 {
    let Shared { defects, drain, .. } = shared;
    if worker.access_log.is_some() {
        let worker = Rc::clone(worker);
        keep_running(Task::AccessLog, defects, move || {
            let worker = Rc::clone(&worker);
            async move {
                if let Some(log) = &worker.access_log {
                    log.run().await;
                }
            }
        });
    }
    let with_clock = Rc::clone(worker);
    keep_running(Task::WorkerClock, defects, move || {
        let worker = Rc::clone(&with_clock);
        async move { worker.relay.clock.run().await }
    });
    let Sharing { neighbours, inbox } = sharing;
    let mut inbox = inbox.open().await;
    let listeners = Listeners::new(Rc::clone(worker), Arc::clone(defects));
    let finished = async {
        let taken_over = async {
            while let Some(connection) = inbox.recv().await {
                listeners.take_over(connection);
                yield_now().await;
            }
            Ok(())
        };
        match tokio::try_join!(listeners.obey(commands, neighbours), taken_over) {
            Ok(_) => worker.idle().await,
            // The whole worker ends by a panic, and is replaced.
            Err(AcceptDied) => resume_unwind(Box::new("an accept loop panicked")),
        }
    };
    tokio::select! {
        biased;
        () = finished => {}
        () = drain.closing() => {}
    }
    // Connections in the inbox become sessions too, so that they are closed, counted and logged like the
    // others.
    inbox.close();
    while let Ok(connection) = inbox.try_recv() {
        listeners.take_over(connection);
    }
    worker.active()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use tokio::sync::oneshot;

    use crate::balance::pool::Pool;
    use crate::balance::{Balance, Table};
    use crate::config::Config;
    use crate::data_plane::handover::{self, Connection};
    use crate::data_plane::listeners::{BoundListener, Command, ListenerId};
    use crate::drain::{self, DrainControl, Phase};
    use crate::session::{CloseReason, Listener, Settings};

    fn any() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").expect("a free port")
    }

    fn bound(sockets: Vec<TcpListener>) -> BoundListener {
        let config = Config::from_yaml(
            "listeners: {web: {bind: \"127.0.0.1:0\", pool: web}}\npools: {web: {backends: {\"127.0.0.1:9\": 1}}}",
        )
        .expect("a valid config");
        BoundListener {
            id: ListenerId::unique(),
            sockets,
            listener: Arc::new(Listener { name: "web".into(), counters: PerWorker::new(1) }),
            pool: Arc::new(Pool::new("web".into(), Balance::WeightedRandom, Table::default(), None, 1)),
            settings: Settings::from(&config.pools[0]),
        }
    }

    fn shared(phase: Phase) -> (DrainControl, Shared) {
        let (control, drain) = drain::channel();
        control.advance(phase);
        let shared = Shared {
            access_log: None,
            sessions: Arc::new(PerWorker::new(1)),
            starvation: Arc::default(),
            shortest_limit: Duration::from_secs(1),
            defects: Arc::new(Defects::new(Arc::default())),
            drain,
        };
        (control, shared)
    }

    /// The kernel refuses to watch a plain file, as it refuses sockets beyond fs.epoll.max_user_watches.
    #[test]
    fn a_listening_socket_that_cannot_be_watched_is_reported_and_leaves_no_thread() {
        let file = std::fs::File::open("/proc/self/exe").expect("this program");
        let (_control, shared) = shared(Phase::Serving);
        let (neighbours, inbox) = handover::between(1, &shared.sessions).remove(0);
        let (tell, mut ends) = mpsc::unbounded_channel();
        let (commands, received) = mpsc::unbounded_channel();
        let sharing = Sharing { neighbours, inbox };
        let thread =
            spawn(WorkerId(0), received, sharing, shared, Ended::new(WorkerId(0), tell)).expect("a thread");
        let (answer, answered) = oneshot::channel();
        let listener = bound(vec![any(), TcpListener::from(std::os::fd::OwnedFd::from(file))]);
        commands.send(Command::Watch(Box::new(listener), answer)).expect("it runs");
        let error = answered.blocking_recv().expect("it answers").expect_err("a file");
        assert!(error.to_string().starts_with("listeners.web: a listening socket"), "{error}");
        drop(commands);
        thread.join().expect("it has not died");
        let end = End { worker: WorkerId(0), cut: Some(0) };
        assert_eq!(ends.try_recv(), Ok(end), "the thread has ended without sessions");
    }

    #[test]
    fn a_listener_accepts_from_its_open_to_its_close() {
        let socket = any();
        socket.set_nonblocking(true).expect("a socket");
        let address = socket.local_addr().expect("bound");
        let (_control, shared) = shared(Phase::Serving);
        let (neighbours, inbox) = handover::between(1, &shared.sessions).remove(0);
        let (tell, _ends) = mpsc::unbounded_channel();
        let (commands, received) = mpsc::unbounded_channel();
        let sharing = Sharing { neighbours, inbox };
        let thread =
            spawn(WorkerId(0), received, sharing, shared, Ended::new(WorkerId(0), tell)).expect("a thread");
        let (listener, (answer, answered)) = (bound(vec![socket]), oneshot::channel());
        let (id, counted) = (listener.id, Arc::clone(&listener.listener));
        let accepted = || counted.counters.sum(|counters| &counters.connections);

        commands.send(Command::Watch(Box::new(listener), answer)).expect("it runs");
        answered.blocking_recv().expect("it answers").expect("it is watched");
        let mut client = TcpStream::connect(address).expect("the kernel takes it");
        assert_eq!(accepted(), 0, "it is watched and not open");
        commands.send(Command::Open(id)).expect("it runs");
        // The only backend is no member of the table, so the session is refused and closed.
        let _ = client.read(&mut [0]);
        assert_eq!(accepted(), 1);
        commands.send(Command::Close(id)).expect("it runs");
        while TcpStream::connect(address).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
        drop(commands);
        thread.join().expect("it has not died");
    }

    /// The connection is closed like a session: counted, logged and reset.
    #[test]
    fn a_connection_that_is_handed_over_at_the_very_end_is_cut() {
        let socket = any();
        socket.set_nonblocking(true).expect("a socket");
        let other = any();
        let mut client = TcpStream::connect(other.local_addr().expect("bound")).expect("it listens");
        let (accepted, address) = other.accept().expect("a client");

        let (_control, shared) = shared(Phase::Closing);
        let sessions = Arc::clone(&shared.sessions);
        let (neighbours, _) = handover::between(1, &sessions).remove(0);
        let (hand, connections) = mpsc::channel(1);
        let inbox = Inbox::new(connections);
        let bound = bound(vec![socket]);
        hand.try_send(Connection::new(bound.id, accepted.into(), address)).expect("room");
        let listener = Arc::clone(&bound.listener);
        let (commands, received) = mpsc::unbounded_channel();
        commands.send(Command::Watch(Box::new(bound), oneshot::channel().0)).expect("it will run");
        let runtime = Runtime::new().expect("descriptors");
        let cut = run(runtime, WorkerId(0), received, Sharing { neighbours, inbox }, &shared);

        assert_eq!((cut, listener.counters.of(WorkerId(0)).connections.get()), (1, 1));
        assert_eq!(sessions.of(WorkerId(0)).closed(CloseReason::Shutdown).get(), 1);
        let error = client.read(&mut [0]).expect_err("no clean end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
