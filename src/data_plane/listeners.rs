//! The listeners of one worker, which the supervisor opens and closes by commands while the worker runs.
//!
//! A listener is watched first and opened later: to watch a socket can fail, to accept from it cannot. So
//! the supervisor knows that all workers can have a listener before any of them accepts.
//!
//! An accept loop has the context of its listener at hand. Only a connection that comes from another worker
//! needs a [`ListenerId`], by which this worker finds the context. Next: `listen/accept.rs` accepts,
//! `worker.rs` runs this.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{self, Poll};

use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use super::handover::{Connection, Neighbours};
use super::kept;
use crate::balance::pool::Pool;
use crate::control::supervised::Defects;
use crate::drain::{self, Drain, DrainControl, Phase};
use crate::fault;
use crate::listen::accept::{self, Listening};
use crate::observe::tasks::Task;
use crate::reactor::spawn as spawn_task;
use crate::relay::Stream;
use crate::session::{self, Context, Listener, Settings, Worker};

/// Names a listener in commands and in connections that change workers. No other listener of the process
/// ever has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerId(u64);

impl ListenerId {
    /// An id that no other listener has.
    #[must_use]
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// What one worker gets of a listener: sockets of its own, and what its sessions share.
#[derive(Debug)]
pub struct BoundListener {
    /// The same for all workers.
    pub id: ListenerId,
    /// One for each address of the listener. They are bound and listen.
    pub sockets: Vec<TcpListener>,
    /// The listener's name and counters.
    pub listener: Arc<Listener>,
    /// The pool that its sessions go to.
    pub pool: Arc<Pool>,
    /// How its sessions are served.
    pub settings: Settings,
}

impl BoundListener {
    /// Returns the same listener, with duplicated descriptors of its sockets.
    ///
    /// # Errors
    /// The system gives no descriptor.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self {
            id: self.id,
            sockets: self.sockets.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?,
            listener: Arc::clone(&self.listener),
            pool: Arc::clone(&self.pool),
            settings: self.settings.clone(),
        })
    }
}

/// What the supervisor tells a worker to do. A worker whose commands end closes all its listeners, and ends
/// after its sessions.
#[derive(Debug)]
pub enum Command {
    /// Watch the sockets, and answer whether the kernel allows it. Nothing is accepted yet.
    Watch(Box<BoundListener>, oneshot::Sender<io::Result<()>>),
    /// Accept connections.
    Open(ListenerId),
    /// Accept what the kernel took before this, and nothing more. Sessions go on.
    Close(ListenerId),
}

/// The commands for one worker: few for each change of the configuration, so they need no bound.
pub type Commands = mpsc::UnboundedReceiver<Command>;

/// An accept loop died, which is a defect.
#[derive(Debug)]
pub(super) struct AcceptDied;

/// All listeners that this worker has or had.
#[derive(Debug)]
pub(super) struct Listeners {
    worker: Rc<Worker>,
    defects: Arc<Defects>,
    known: RefCell<Vec<Known>>,
}

/// One listener. It stays known after its close: connections of it may still come from other workers.
#[derive(Debug)]
struct Known {
    id: ListenerId,
    context: Rc<Context>,
    /// Sockets that are watched and not open yet.
    watched: Vec<Listening>,
    /// Tells the accept loops to close. Only [`Phase::Draining`] is ever reached.
    closing: DrainControl,
    closes: Drain,
}

/// The accept loops that run: each sends when it ends, and drops its sender when it panics.
type AcceptLoops = Vec<oneshot::Receiver<()>>;

impl Listeners {
    pub(super) fn new(worker: Rc<Worker>, defects: Arc<Defects>) -> Self {
        Self { worker, defects, known: RefCell::default() }
    }

    /// Does what the commands say, until they end and every listener has closed. After the last command,
    /// only the accept loops hold `neighbours`. So when the accept loops of all workers have ended, no more
    /// connections are handed over.
    pub(super) async fn obey(
        &self,
        mut commands: Commands,
        neighbours: Neighbours,
    ) -> Result<(), AcceptDied> {
        let neighbours = Rc::new(neighbours);
        let mut accept_loops = AcceptLoops::new();
        while let Some(command) = next(&mut commands, &mut accept_loops).await? {
            match command {
                Command::Watch(bound, answer) => {
                    // The supervisor waits for the answer, unless it has ended.
                    let _ = answer.send(self.watch(*bound));
                }
                Command::Open(id) => self.open(id, &neighbours, &mut accept_loops),
                Command::Close(id) => self.close(|known| known == id),
            }
        }
        self.close(|_| true);
        drop(neighbours);
        poll_fn(|cx| poll_ended(&mut accept_loops, cx)).await
    }

    /// Begins a session of a connection that another worker accepted.
    pub(super) fn take_over(&self, connection: Connection) {
        let known = self.known.borrow();
        match known.iter().find(|known| known.id == connection.listener) {
            Some(known) => begin(connection, &known.context),
            // A worker that replaced another one does not know the listeners that were closed before.
            None => warn!(client = %connection.client, "a connection of a listener that is closed is reset"),
        }
    }

    fn watch(&self, bound: BoundListener) -> io::Result<()> {
        let BoundListener { id, sockets, listener, pool, settings } = bound;
        let watched = sockets.into_iter().map(Listening::watch).collect::<io::Result<Vec<_>>>();
        let watched = watched.map_err(|error| {
            let text = format!("listeners.{}: a listening socket cannot be watched: {error}", listener.name);
            io::Error::new(error.kind(), text)
        })?;
        self.close_sessions_of(&pool, &settings);
        let context = Rc::new(Context { worker: Rc::clone(&self.worker), listener, pool, settings });
        let (closing, closes) = drain::channel();
        self.known.borrow_mut().push(Known { id, context, watched, closing, closes });
        Ok(())
    }

    /// Starts a task that closes the sessions of the pool's draining backends, unless another listener of
    /// the same pool has started one.
    fn close_sessions_of(&self, pool: &Arc<Pool>, settings: &Settings) {
        if !self.known.borrow().iter().any(|known| Arc::ptr_eq(&known.context.pool, pool)) {
            let (worker, pool) = (Rc::clone(&self.worker), Arc::clone(pool));
            let settle_time = settings.limits.settle_time;
            kept::keep_running(Task::DrainBackends, &self.defects, move || {
                session::draining::close_sessions(Rc::clone(&worker), Arc::clone(&pool), settle_time)
            });
        }
    }

    fn open(&self, id: ListenerId, neighbours: &Rc<Neighbours>, accept_loops: &mut AcceptLoops) {
        let mut known = self.known.borrow_mut();
        let Some(known) = known.iter_mut().find(|known| known.id == id) else { return };
        for socket in known.watched.drain(..) {
            let (context, neighbours) = (Rc::clone(&known.context), Rc::clone(neighbours));
            let accepts = accept_at(socket, id, context, neighbours, known.closes.clone());
            let (tell, ended) = oneshot::channel();
            accept_loops.push(ended);
            spawn_task(async move {
                accepts.await;
                // Without a receiver the worker is about to end.
                let _ = tell.send(());
            });
        }
    }

    fn close(&self, which: impl Fn(ListenerId) -> bool) {
        for known in self.known.borrow_mut().iter_mut().filter(|known| which(known.id)) {
            known.watched.clear();
            known.closing.advance(Phase::Draining);
        }
    }
}

/// Waits for the next command. Returns `None` when no more can come.
async fn next(
    commands: &mut Commands,
    accept_loops: &mut AcceptLoops,
) -> Result<Option<Command>, AcceptDied> {
    poll_fn(|cx| match poll_ended(accept_loops, cx) {
        Poll::Ready(Err(died)) => Poll::Ready(Err(died)),
        Poll::Ready(Ok(())) | Poll::Pending => commands.poll_recv(cx).map(Ok),
    })
    .await
}

/// Ready once all accept loops have ended, or one has died.
fn poll_ended(accept_loops: &mut AcceptLoops, cx: &mut task::Context<'_>) -> Poll<Result<(), AcceptDied>> {
    let mut died = false;
    accept_loops.retain_mut(|ended| match Pin::new(ended).poll(cx) {
        Poll::Pending => true,
        Poll::Ready(result) => {
            died |= result.is_err();
            false
        }
    });
    if died {
        error!("an accept loop died");
        return Poll::Ready(Err(AcceptDied));
    }
    if accept_loops.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
}

async fn accept_at(
    socket: Listening,
    id: ListenerId,
    context: Rc<Context>,
    neighbours: Rc<Neighbours>,
    closes: Drain,
) {
    let Context { worker, listener, .. } = &*context;
    let on_connection = |socket, client| {
        fault::point("accept_loop", &listener.name);
        if let Some(connection) = neighbours.offer(Connection::new(id, socket, client)) {
            begin(connection, &context);
        }
    };
    let counters = listener.counters.of(worker.id);
    accept::run(socket, &listener.name, counters, &closes, || worker.is_starved(), on_connection).await;
}

/// Begins a session. A panic in here ends only this connection: without the catch it would end the accept
/// loop, and with it the worker.
fn begin(connection: Connection, context: &Rc<Context>) {
    let client = connection.client;
    let (listener, worker) = (&context.listener, context.worker.id);
    let begins = AssertUnwindSafe(|| {
        fault::point("session_begins", &listener.name);
        let stream = Stream::accepted(connection.into_socket())?;
        spawn_task(session::serve(stream, client, Rc::clone(context)));
        Ok(())
    });
    let failed = match catch_unwind(begins) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => Ok::<io::Error, _>(error),
        Err(panic) => Err(panic),
    };
    listener.counters.of(worker).accept_failed.add(1);
    match failed {
        Ok(error) => warn!(listener = %listener.name, %client, %error, "cannot watch a connection"),
        Err(_) => error!(
            listener = %listener.name, %client,
            "beginning a session panicked, which is a defect: its connection is reset"
        ),
    }
}
