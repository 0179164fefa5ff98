//! A listener that runs: its addresses, where it leads, and its counters. Its sockets are the workers'.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use super::StartError;
use super::pool_handle::PoolHandle;
use crate::config;
use crate::data_plane::listeners::{BoundListener, ListenerId};
use crate::listen::socket::{self, Options};
use crate::observe::counters::PerWorker;
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
        Ok((Self { id, listener, addresses }, parts))
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.listener.name
    }
}
