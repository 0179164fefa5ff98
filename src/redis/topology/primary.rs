//! The server that tables are read from: the one in the config, the one that sentinels name, or a node of a
//! cluster.
//!
//! All connections to the server share one [`Primary`], so that all leave it when its address changes.
//! `sentinel.rs` sets the address. In a cluster the address of a `Primary` never changes: another node is
//! another shard (`shards.rs`).

use std::sync::Arc;

use redis::PushInfo;
use tokio::sync::watch;

use super::routed::{KeyNode, Route, RoutedConnection};
use crate::config::{Redis, RedisAddress};
use crate::redis::wire::connection::Server;
use crate::redis::wire::error::RedisError;

/// The server that tables are read from.
#[derive(Debug)]
pub(in crate::redis) struct Primary {
    /// `None` until sentinels have named the server.
    address: watch::Sender<Option<RedisAddress>>,
    /// True where sentinels or a cluster name the server, which then has to be a primary.
    is_named: bool,
    /// `None` outside of a cluster.
    route: Option<Arc<Route>>,
}

impl Primary {
    /// The server that `settings` names. Its address is known at once, unless sentinels have to be asked.
    pub(super) fn of(settings: &Redis) -> Self {
        let is_named = matches!(settings.address, RedisAddress::Sentinel(_));
        let address = (!is_named).then(|| settings.address.clone());
        Self { address: watch::channel(address).0, is_named, route: None }
    }

    /// The node of a cluster that `route` leads to.
    pub(super) fn in_cluster(route: Route) -> Self {
        let address = watch::channel(Some(route.node.address.clone())).0;
        Self { address, is_named: true, route: Some(Arc::new(route)) }
    }

    pub(super) fn is(&self, node: &KeyNode) -> bool {
        self.route.as_ref().is_some_and(|route| route.node == *node)
    }

    /// Connects to the server at `address`, its last known address. Pushed messages go to `on_push`, which
    /// must not wait.
    pub(in crate::redis) async fn open(
        &self,
        settings: &Redis,
        address: &RedisAddress,
        on_push: impl Fn(PushInfo) + Send + Sync + 'static,
    ) -> Result<RoutedConnection, RedisError> {
        RoutedConnection::open(settings, address, self.route.clone(), on_push).await
    }

    /// Reports that the server does not answer, or is no primary: in a cluster another node may have taken
    /// over. Does nothing outside of a cluster.
    pub(in crate::redis) fn report_lost(&self) {
        if let Some(route) = &self.route {
            route.report_lost();
        }
    }

    pub(super) fn set_address(&self, address: RedisAddress) {
        self.address.send_replace(Some(address));
    }

    /// Waits until the server's address is known, and returns it. Cancel safe.
    pub(in crate::redis) async fn known(&self) -> RedisAddress {
        let mut addresses = self.address.subscribe();
        match addresses.wait_for(Option::is_some).await.map(|address| address.clone()) {
            Ok(Some(address)) => address,
            // Cannot happen: the sender is a field of `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Waits until the server's address differs from `address`. Cancel safe.
    pub(in crate::redis) async fn moved_from(&self, address: &RedisAddress) {
        let mut addresses = self.address.subscribe();
        if addresses.wait_for(|now| now.as_ref().is_some_and(|now| now != address)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Checks that a server named by sentinels or by a cluster is a primary: it may be a replica that is
    /// not promoted yet, or an old primary that was demoted. Accepts every server that the config names
    /// itself.
    ///
    /// # Errors
    /// The server has to be a primary and is not.
    pub(in crate::redis) fn check(&self, server: &Server) -> Result<(), RedisError> {
        if self.is_named && !server.is_primary() {
            return Err(RedisError::NotPrimary(server.role.clone()));
        }
        Ok(())
    }
}
