//! The pool that a command names, and the Redis that holds its weights.

use super::Failure;
use super::arguments::Target;
use crate::config::{Config, Pool, Redis};

pub(super) struct Settings {
    pub(super) redis: Redis,
    pub(super) pool: Pool,
}

pub(super) fn settings(target: &Target) -> Result<Settings, Failure> {
    let (pool, redis) = find_pool(target)?;
    let Some(redis) = redis else {
        return Err(Failure::Invalid(format!(
            "{} has no redis section, so its pools use `backends` alone: change the weights in that file",
            target.config.config.display()
        )));
    };
    Ok(Settings { redis, pool })
}

/// The pool that `target` names, and the Redis of its config. Without Redis, a pool uses only its
/// `backends`.
pub(super) fn find_pool(target: &Target) -> Result<(Pool, Option<Redis>), Failure> {
    let path = &target.config.config;
    let config = Config::load(path).map_err(|error| Failure::Invalid(error.to_string()))?;
    let Some(pool) = config.pools.iter().find(|pool| *pool.name == *target.pool) else {
        let names: Vec<&str> = config.pools.iter().map(|pool| &*pool.name).collect();
        return Err(Failure::Invalid(format!(
            "there is no pool {:?} in {}: its pools are {}",
            target.pool,
            path.display(),
            names.join(", ")
        )));
    };
    Ok((pool.clone(), config.redis))
}
