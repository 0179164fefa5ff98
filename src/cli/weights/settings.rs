//! The pool that a command names, and the Redis that holds its weights.

use std::path::PathBuf;

use super::Failure;
use super::arguments::Target;
use crate::config::{Pool, Redis};

pub(super) struct Settings {
    pub(super) redis: Redis,
    pub(super) pool: Pool,
}

pub(super) fn settings(target: &Target) -> Result<Settings, Failure> {
    let (path, pool, redis) = find_pool(target)?;
    let Some(redis) = redis else {
        return Err(Failure::Invalid(format!(
            "{} has no redis section, so its pools use `backends` alone: change the weights in that file",
            path.display()
        )));
    };
    Ok(Settings { redis, pool })
}

/// Returns the path of the config, the pool that `target` names, and the Redis of the config, if it has one.
/// Without Redis, a pool uses only its `backends`.
pub(super) fn find_pool(target: &Target) -> Result<(PathBuf, Pool, Option<Redis>), Failure> {
    let (path, config) = target.config.load().map_err(Failure::Invalid)?;
    let Some(pool) = config.pools.iter().find(|pool| *pool.name == *target.pool) else {
        let names: Vec<&str> = config.pools.iter().map(|pool| &*pool.name).collect();
        return Err(Failure::Invalid(format!(
            "there is no pool {:?} in {}: its pools are {}",
            target.pool,
            path.display(),
            names.join(", ")
        )));
    };
    Ok((path, pool.clone(), config.redis))
}
