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
    /// Identifies the listener in commands to the workers.
    pub(super) id: ListenerId,
    /// The name and the counters of the listener.
    pub(super) listener: Arc<Listener>,
    /// The bound addresses: a port 0 is replaced by the port that the kernel chose.
    pub(super) addresses: Vec<SocketAddr>,
    /// A duplicate of each worker's part, in the order of the workers. Empty once the listener is closed.
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

    /// Duplicates the part of `worker` for its replacement. Returns `None` if the listener is closed.
    ///
    /// # Errors
    /// The system gives no descriptor.
    pub(super) fn part(&self, worker: WorkerId) -> Option<io::Result<BoundListener>> {
        self.parts.get(worker.0).map(BoundListener::duplicate)
    }

    /// Drops the duplicates, so that a socket is closed as soon as its worker closes it.
    pub(super) fn release(&mut self) {
        self.parts.clear();
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.listener.name
    }
}
