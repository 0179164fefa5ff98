//! The threads of the data plane, as the supervisor starts, commands, replaces and ends them.
//!
//! A worker that dies is replaced by a worker with the same number, which takes over the counters, the
//! listening sockets and the inbox. The sessions of the dead worker end and are reported as a defect.
//! Until the replacement runs, the dead worker's share of the new connections waits in the kernel.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use super::listener_handle::ListenerHandle;
use crate::control::supervised::{self, Pauses};
use crate::data_plane::handover::{self, Inbox, Neighbours};
use crate::data_plane::listeners::{BoundListener, Command, Commands, ListenerId};
use crate::data_plane::worker::{self, End, Ended, Shared, Sharing};
use crate::observe::counters::WorkerId;
use crate::observe::tasks::Task;

/// The longest pause before a worker is replaced: clients wait in the queues of its sockets.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// All workers. Each worker gets a command of its own for each change of a listener.
#[derive(Debug)]
pub(super) struct Workers {
    workers: Vec<Worker>,
    shared: Shared,
    ends: mpsc::UnboundedReceiver<End>,
    /// For replacements; `None` once the workers are dismissed.
    tell: Option<mpsc::UnboundedSender<End>>,
}

/// One worker, or the wait for its replacement.
#[derive(Debug)]
struct Worker {
    id: WorkerId,
    thread: Option<JoinHandle<()>>,
    /// Sends commands to the thread. `None`, like `neighbours`, once the worker is dismissed.
    commands: Option<mpsc::UnboundedSender<Command>>,
    neighbours: Option<Neighbours>,
    inbox: Inbox,
    /// The listeners that a replacement accepts at. Not kept for the first thread.
    accepts_at: Vec<ListenerId>,
    pauses: Pauses,
    /// When to replace the thread, or to give it the listeners that it lacks. `None`: there is no need.
    replaced_at: Option<Instant>,
}

impl Workers {
    /// Starts `count` workers without listeners.
    ///
    /// # Errors
    /// The system gives no thread or no descriptor. Those that were started have ended.
    pub(super) fn start(count: usize, shared: &Shared) -> io::Result<Self> {
        let (tell, ends) = mpsc::unbounded_channel();
        let worker = |(id, (neighbours, inbox))| Worker {
            id: WorkerId(id),
            thread: None,
            commands: None,
            neighbours: Some(neighbours),
            inbox,
            accepts_at: Vec::new(),
            pauses: Pauses::new(LONGEST_PAUSE),
            replaced_at: None,
        };
        let all = handover::between(count, &shared.sessions);
        let mut workers = all.into_iter().enumerate().map(worker).collect::<Vec<_>>();
        let started = workers.iter_mut().try_for_each(|worker| {
            let received = worker.new_commands();
            worker.start(received, shared, &tell)
        });
        let workers = Self { workers, shared: shared.clone(), ends, tell: Some(tell) };
        match started {
            Ok(()) => Ok(workers),
            Err(error) => {
                workers.join();
                Err(error)
            }
        }
    }

    /// Lets each worker watch its part of a listener.
    ///
    /// # Errors
    /// The kernel cannot watch a socket, or a worker has died. Some workers may have the listener then:
    /// close it.
    pub(super) async fn watch(&self, parts: Vec<BoundListener>) -> io::Result<()> {
        let answers: Vec<_> =
            self.workers.iter().zip(parts).map(|(worker, part)| worker.watch(part)).collect();
        for answered in answers {
            answer(answered).await?;
        }
        Ok(())
    }

    /// Lets all workers accept at a listener that they watch.
    pub(super) fn open(&self, listener: ListenerId) {
        self.workers.iter().for_each(|worker| worker.tell(Command::Open(listener)));
    }

    /// Lets all workers accept nothing more at a listener. Its sessions go on.
    pub(super) fn close(&self, listener: ListenerId) {
        self.workers.iter().for_each(|worker| worker.tell(Command::Close(listener)));
    }

    /// Tells the workers that no command comes any more: each ends when its last session has. None is
    /// replaced any more.
    pub(super) fn dismiss(&mut self) {
        self.tell = None;
        for worker in &mut self.workers {
            (worker.commands, worker.neighbours) = (None, None);
        }
    }

    /// Waits for the end of a worker. Returns `Some(Some(cut))` with the number of sessions that it cut,
    /// `Some(None)` if it died, and `None` if all have ended. Cancel safe.
    pub(super) async fn ended(&mut self) -> Option<Option<u64>> {
        self.ends.recv().await.map(|end| end.cut)
    }

    /// Waits until a worker has died and the pause after that is over. Returns its number. Cancel safe.
    pub(super) async fn next_to_replace(&mut self) -> WorkerId {
        loop {
            let waiting = self.workers.iter().filter_map(|worker| Some((worker.replaced_at?, worker.id.0)));
            let next = waiting.min();
            let at = next.map_or_else(Instant::now, |(at, _)| at);
            tokio::select! {
                // `recv` never returns `None`, since `tell` is a sender of the channel.
                Some(end) = self.ends.recv() => self.workers[end.worker.0].has_died(&self.shared),
                () = sleep_until(at), if next.is_some() => {
                    return WorkerId(next.map_or(0, |(_, id)| id));
                }
            }
        }
    }

    /// Replaces the worker `id`, which has died, and lets its replacement accept at `listeners`. After a
    /// failure, sets the time of the next try.
    pub(super) async fn replace(&mut self, id: WorkerId, listeners: &[ListenerHandle]) {
        let Some(tell) = &self.tell else { return };
        let worker = &mut self.workers[id.0];
        match worker.run_again(&self.shared, tell, listeners).await {
            Ok(()) => {
                worker.replaced_at = None;
                info!(worker = id.0, "the worker is replaced, and accepts again");
            }
            Err(error) => {
                let pause = worker.pauses.pause();
                worker.replaced_at = Some(Instant::now() + pause);
                if let Some(held_back) = self.shared.defects.permit() {
                    error!(
                        worker = id.0, %error, ?pause, held_back,
                        "a worker cannot be replaced: it is tried again"
                    );
                }
            }
        }
    }

    /// Replaces the workers that have died, without a pause.
    pub(super) async fn replace_dead(&mut self, listeners: &[ListenerHandle]) {
        while let Ok(end) = self.ends.try_recv() {
            self.workers[end.worker.0].has_died(&self.shared);
        }
        let dead = |worker: &Worker| worker.replaced_at.is_some().then_some(worker.id);
        for id in self.workers.iter().filter_map(dead).collect::<Vec<_>>() {
            self.replace(id, listeners).await;
        }
    }

    /// Waits until the threads are gone.
    pub(super) fn join(mut self) {
        self.dismiss();
        for worker in self.workers {
            if let Some(thread) = worker.thread {
                // `ended` has returned how the worker ended.
                let _ = thread.join();
            }
            let connections = worker.inbox.waiting();
            if connections > 0 {
                let worker = worker.id.0;
                warn!(worker, connections, "connections that were handed to a worker that died are reset");
            }
        }
    }
}

impl Worker {
    /// Makes the channel of commands for a new thread, and returns the receiver.
    fn new_commands(&mut self) -> Commands {
        let (commands, received) = mpsc::unbounded_channel();
        self.commands = Some(commands);
        self.accepts_at.clear();
        received
    }

    /// Starts the thread, which gets its commands from `received`.
    fn start(
        &mut self,
        received: Commands,
        shared: &Shared,
        tell: &mpsc::UnboundedSender<End>,
    ) -> io::Result<()> {
        self.thread = None;
        let Some(neighbours) = self.neighbours.clone() else { return Ok(()) };
        let sharing = Sharing { neighbours, inbox: self.inbox.clone() };
        let ended = Ended::new(self.id, tell.clone());
        self.thread = Some(worker::spawn(self.id, received, sharing, shared.clone(), ended)?);
        self.pauses.begins();
        Ok(())
    }

    fn tell(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // Fails if the worker has ended, which `ends` reports.
            let _ = commands.send(command);
        }
    }

    /// Tells the worker to watch `part`. The receiver gets the answer, or an error if the worker has died.
    fn watch(&self, part: BoundListener) -> oneshot::Receiver<io::Result<()>> {
        let (answer, answered) = oneshot::channel();
        self.tell(Command::Watch(Box::new(part), answer));
        answered
    }

    /// Sets the time of the replacement, and counts and logs that the worker has ended without a command.
    fn has_died(&mut self, shared: &Shared) {
        // A replacement that could not start is reported here, too; `replace` has set its next try.
        if self.replaced_at.is_some() {
            return;
        }
        let ended = self.thread.take().map(JoinHandle::join);
        let panic = match &ended {
            Some(Err(panic)) => supervised::text(&**panic),
            _ => "it returned".to_owned(),
        };
        let pause = self.pauses.pause();
        self.replaced_at = Some(Instant::now() + pause);
        shared.defects.restarts().count(Task::Worker);
        if let Some(held_back) = shared.defects.permit() {
            error!(
                worker = self.id.0,
                panic,
                ?pause,
                held_back,
                "a worker died, which is a defect: its sessions are closed and it is replaced; other workers \
                 go on"
            );
        }
    }

    /// Starts the thread if it does not run, and lets the worker accept at the `listeners` that it lacks.
    async fn run_again(
        &mut self,
        shared: &Shared,
        tell: &mpsc::UnboundedSender<End>,
        listeners: &[ListenerHandle],
    ) -> io::Result<()> {
        let is_gone = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        let received = is_gone.then(|| self.new_commands());
        let missing = listeners.iter().filter(|listener| !self.accepts_at.contains(&listener.id));
        let mut answers = Vec::new();
        for listener in missing {
            let Some(part) = listener.part(self.id) else { continue };
            answers.push((listener.id, part.map(|part| self.watch(part))));
            self.tell(Command::Open(listener.id));
        }
        // All commands are sent before the thread starts, so that it knows the listeners of the connections
        // in its inbox.
        if let Some(received) = received {
            self.start(received, shared, tell)?;
        }
        for (listener, answered) in answers {
            answer(answered?).await?;
            self.accepts_at.push(listener);
        }
        Ok(())
    }
}

async fn answer(answered: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
    answered.await.unwrap_or_else(|_| Err(io::Error::other("the worker died")))
}
