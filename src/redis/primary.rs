//! Which server is followed: the one that the config names, or the one that the sentinels name just now.
//!
//! Known to all connections to it, so that they leave together. `sentinel.rs` finds it out.

use redis::RedisError;
use tokio::sync::watch;

use super::connection::Server;
use super::trouble::Trouble;
use crate::config::{Redis, RedisAddress};

/// The server that tables are read from.
#[derive(Debug)]
pub struct Primary {
    address: watch::Sender<Option<RedisAddress>>,
    /// Sentinels name it, so it has to be what they say.
    is_named: bool,
}

impl Primary {
    /// Known at once, unless sentinels have to be asked.
    #[must_use]
    pub fn of(settings: &Redis) -> Self {
        let is_named = matches!(settings.address, RedisAddress::Sentinel(_));
        let address = (!is_named).then(|| settings.address.clone());
        Self { address: watch::channel(address).0, is_named }
    }

    /// It is at `address` from now on.
    pub(super) fn set(&self, address: RedisAddress) {
        self.address.send_replace(Some(address));
    }

    /// Waits until it is known. Cancel safe.
    pub(super) async fn known(&self) -> RedisAddress {
        let mut addresses = self.address.subscribe();
        match addresses.wait_for(Option::is_some).await.map(|address| address.clone()) {
            Ok(Some(address)) => address,
            // The sender is `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Waits until it is elsewhere than at `address`. Cancel safe.
    pub(super) async fn moved_from(&self, address: &RedisAddress) {
        let mut addresses = self.address.subscribe();
        if addresses.wait_for(|now| now.as_ref().is_some_and(|now| now != address)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// A server whom the sentinels name and that is a replica is not the primary yet, or not any more.
    ///
    /// # Errors
    /// It has to be the primary, and says that it is not.
    pub(super) fn check(&self, server: &Server) -> Result<(), RedisError> {
        if self.is_named && server.role != "master" {
            return Err(Trouble::NotPrimary(server.role.clone()).into());
        }
        Ok(())
    }
}
