//! Which server is followed: the one that the config names, the one that the sentinels name just now, or a node of a
//! cluster.
//!
//! Known to all connections to it, so that they leave together. `sentinel.rs` and `cluster.rs` find it out. A cluster's node
//! stays the same as long as its part does (`parts.rs`).

use std::sync::Arc;

use redis::{PushInfo, RedisError};
use tokio::sync::watch;

use super::parts::Holder;
use super::redirect::Guide;
use crate::config::{Redis, RedisAddress};
use crate::redis::wire::connection::{self, Connection, Server};
use crate::redis::wire::error::Trouble;

/// The server that tables are read from.
#[derive(Debug)]
pub(in crate::redis) struct Primary {
    address: watch::Sender<Option<RedisAddress>>,
    /// Sentinels or a cluster name it, so it has to be what they say.
    is_named: bool,
    /// In a cluster.
    guide: Option<Arc<Guide>>,
}

impl Primary {
    /// Known at once, unless sentinels have to be asked.
    pub(in crate::redis) fn of(settings: &Redis) -> Self {
        let is_named = matches!(settings.address, RedisAddress::Sentinel(_));
        let address = (!is_named).then(|| settings.address.clone());
        Self { address: watch::channel(address).0, is_named, guide: None }
    }

    /// The node that `guide` is for.
    pub(in crate::redis) fn in_cluster(guide: Guide) -> Self {
        let address = watch::channel(Some(guide.node.clone())).0;
        Self { address, is_named: true, guide: Some(Arc::new(guide)) }
    }

    pub(in crate::redis) fn is_held_by(&self, holder: &Holder) -> bool {
        self.guide
            .as_ref()
            .is_some_and(|guide| guide.node == holder.node && guide.ahead_of == holder.ahead_of)
    }

    /// Connects to it at `address`, where it was last known to be. Pushed messages go to `on_push`.
    pub(in crate::redis) async fn open(
        &self,
        settings: &Redis,
        address: &RedisAddress,
        on_push: impl Fn(PushInfo) + Send + Sync + 'static,
    ) -> Result<Connection, RedisError> {
        let connection = connection::open_at(settings, address, on_push).await?;
        Ok(connection.guided(self.guide.clone()))
    }

    /// It does not answer, or not as a primary: in a cluster another may have taken over.
    pub(in crate::redis) fn is_lost(&self) {
        if let Some(guide) = &self.guide {
            guide.is_lost();
        }
    }

    /// It is at `address` from now on.
    pub(in crate::redis) fn set(&self, address: RedisAddress) {
        self.address.send_replace(Some(address));
    }

    /// Waits until it is known. Cancel safe.
    pub(in crate::redis) async fn known(&self) -> RedisAddress {
        let mut addresses = self.address.subscribe();
        match addresses.wait_for(Option::is_some).await.map(|address| address.clone()) {
            Ok(Some(address)) => address,
            // The sender is `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Waits until it is elsewhere than at `address`. Cancel safe.
    pub(in crate::redis) async fn moved_from(&self, address: &RedisAddress) {
        let mut addresses = self.address.subscribe();
        if addresses.wait_for(|now| now.as_ref().is_some_and(|now| now != address)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// A server that sentinels or a cluster name and that is a replica is not the primary yet, or not any more.
    ///
    /// # Errors
    /// It has to be the primary, and says that it is not.
    pub(in crate::redis) fn check(&self, server: &Server) -> Result<(), RedisError> {
        if self.is_named && server.role != "master" {
            return Err(Trouble::NotPrimary(server.role.clone()).into());
        }
        Ok(())
    }
}
