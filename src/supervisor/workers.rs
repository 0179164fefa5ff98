//! The threads of the data plane, as the supervisor starts, commands and ends them.

use std::io;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot};

use crate::data_plane::handover;
use crate::data_plane::listeners::{BoundListener, Command, ListenerId};
use crate::data_plane::worker::{self, Ended, Shared, Sharing};
use crate::observe::counters::WorkerId;

/// All workers. Each is told of a listener by a command of its own.
#[derive(Debug)]
pub(super) struct Workers {
    threads: Vec<JoinHandle<()>>,
    /// In the order of the workers; none once they were told that no command comes any more.
    commands: Vec<mpsc::UnboundedSender<Command>>,
    /// From each worker the number of sessions that it cut; `None`: it died.
    ends: mpsc::UnboundedReceiver<Option<u64>>,
}

impl Workers {
    /// Starts so many workers, without listeners.
    ///
    /// # Errors
    /// The system gives no thread or no descriptor. Those that were started have ended.
    pub(super) fn start(count: usize, shared: &Shared) -> io::Result<Self> {
        let (tell, ends) = mpsc::unbounded_channel();
        let mut workers = Self { threads: Vec::new(), commands: Vec::new(), ends };
        match workers.start_all(count, shared, &tell) {
            Ok(()) => Ok(workers),
            Err(error) => {
                workers.join();
                Err(error)
            }
        }
    }

    fn start_all(
        &mut self,
        count: usize,
        shared: &Shared,
        tell: &mpsc::UnboundedSender<Option<u64>>,
    ) -> io::Result<()> {
        for (id, (neighbours, inbox)) in handover::between(count, &shared.sessions).into_iter().enumerate() {
            let (commands, received) = mpsc::unbounded_channel();
            let (sharing, ended) = (Sharing { neighbours, inbox }, Ended::new(tell.clone()));
            self.threads.push(worker::spawn(WorkerId(id), received, sharing, shared.clone(), ended)?);
            self.commands.push(commands);
        }
        Ok(())
    }

    /// Lets each worker watch its part of a listener.
    ///
    /// # Errors
    /// The kernel cannot watch a socket, or a worker has died. Some workers may have the listener then:
    /// close it.
    pub(super) async fn watch(&self, parts: Vec<BoundListener>) -> io::Result<()> {
        let mut answers = Vec::new();
        for (commands, part) in self.commands.iter().zip(parts) {
            let (answer, answered) = oneshot::channel();
            // The answer is dropped with the command where the worker has died.
            let _ = commands.send(Command::Watch(Box::new(part), answer));
            answers.push(answered);
        }
        for answered in answers {
            answered.await.unwrap_or_else(|_| Err(io::Error::other("the worker died")))?;
        }
        Ok(())
    }

    /// Lets all workers accept at a listener that they watch.
    pub(super) fn open(&self, listener: ListenerId) {
        self.tell(|| Command::Open(listener));
    }

    /// Lets all workers accept nothing more at a listener. Its sessions go on.
    pub(super) fn close(&self, listener: ListenerId) {
        self.tell(|| Command::Close(listener));
    }

    fn tell(&self, command: impl Fn() -> Command) {
        for commands in &self.commands {
            // The end of a worker is heard from `ended`.
            let _ = commands.send(command());
        }
    }

    /// Tells the workers that no command comes any more: each ends when its last session has.
    pub(super) fn dismiss(&mut self) {
        self.commands.clear();
    }

    /// Waits for the end of a worker: how many sessions it cut, or `None` inside if it died. `None`: all
    /// have ended. Cancel safe.
    pub(super) async fn ended(&mut self) -> Option<Option<u64>> {
        self.ends.recv().await
    }

    /// Waits until the threads are gone.
    pub(super) fn join(mut self) {
        self.dismiss();
        for thread in self.threads {
            // How it ended was told by `ended`.
            let _ = thread.join();
        }
    }
}
