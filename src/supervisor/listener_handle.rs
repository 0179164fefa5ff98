//! A listener that runs: its addresses, where it leads, and its counters.
//!
//! The workers accept from its sockets. The handle keeps a duplicate of each, so that the kernel keeps the
//! connections that wait at the socket of a worker that dies, for the worker that replaces it.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use super::StartError;
use super::pool_handle::PoolHandle;
use crate::config;
use crate::data_plane::listeners::{BoundListener, ListenerId};
use crate::listen::socket::{self, Options};
use crate::observe::counters::{PerWorker, WorkerId};
use crate::session::{Listener, Settings};

/// One entry of `listeners` that runs.
#[derive(Debug)]
pub(super) struct ListenerHandle {
    /// Names it in commands to the workers.
    pub(super) id: ListenerId,
    /// Its name and its counters.
    pub(super) listener: Arc<Listener>,
    /// The addresses that it really has: a port 0 is replaced.
    pub(super) addresses: Vec<SocketAddr>,
    /// Duplicates of the parts of all workers, in their order.
    parts: Vec<BoundListener>,
}

impl ListenerHandle {
    /// Binds the addresses of `settings`, once for each worker. Sessions go to `pool`.
    pub(super) fn bind(
        settings: &config::Listener,
        pool: &PoolHandle,
        workers: usize,
    ) -> Result<(Self, Vec<BoundListener>), StartError> {
        let listener =
            Arc::new(Listener { name: Arc::clone(&settings.name), counters: PerWorker::new(workers) });
        let id = ListenerId::unique();
        let part = |_| BoundListener {
            id,
            sockets: Vec::new(),
            listener: Arc::clone(&listener),
            pool: Arc::clone(pool.pool()),
            settings: Settings::from(&pool.settings),
        };
        let mut parts: Vec<BoundListener> = (0..workers).map(part).collect();
        let options =
            Options { keepalive: pool.settings.keepalive, congestion: settings.tcp_congestion.clone() };
        let mut addresses = Vec::new();
        for address in &settings.bind {
            let sockets = socket::bind(&settings.name, *address, &options, workers)?;
            addresses.extend(sockets.first().map(TcpListener::local_addr).transpose()?);
            for (part, socket) in parts.iter_mut().zip(sockets) {
                part.sockets.push(socket);
            }
        }
        let of_workers = parts.iter().map(BoundListener::duplicate).collect::<io::Result<_>>()?;
        Ok((Self { id, listener, addresses, parts }, of_workers))
    }

    /// The part of a worker, for its replacement. `None`: the listener is closed.
    ///
    /// # Errors
    /// The system gives no descriptor.
    pub(super) fn part(&self, worker: WorkerId) -> Option<io::Result<BoundListener>> {
        self.parts.get(worker.0).map(BoundListener::duplicate)
    }

    /// Lets the sockets close when the workers close them.
    pub(super) fn release(&mut self) {
        self.parts.clear();
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.listener.name
    }
}
