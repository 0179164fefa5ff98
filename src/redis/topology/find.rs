//! Finds the server that has a key, for a command that connects, asks and ends.

use std::sync::Arc;

use super::routed::{KeyNode, Route, RoutedConnection};
use super::{cluster, sentinel};
use crate::config::{Redis, RedisAddress};
use crate::redis::wire::error::RedisError;

/// Finds the server that has `key`, through sentinels or the nodes of a cluster where the config names
/// these.
pub(in crate::redis) async fn find(settings: &Redis, key: &str) -> Result<RedisAddress, RedisError> {
    match &settings.address {
        RedisAddress::Sentinel(sentinel) => sentinel::find(settings, sentinel).await,
        RedisAddress::Cluster(nodes) => cluster::find(settings, nodes, key).await,
        address => Ok(address.clone()),
    }
}

/// Connects to the server that [`find`] has found.
pub(in crate::redis) async fn open(
    settings: &Redis,
    found: &RedisAddress,
) -> Result<RoutedConnection, RedisError> {
    let route = matches!(settings.address, RedisAddress::Cluster(_)).then(|| {
        let node = KeyNode { address: found.clone(), importing_from: None };
        let settings = Arc::new(settings.clone());
        Arc::new(Route { settings, node, follows_redirects: true, keys: Vec::new(), events: None })
    });
    RoutedConnection::open(settings, found, route, |_| {}).await
}
