//! `statera check`: loading the config has already said everything that is wrong with it.

use std::path::Path;

use super::say;
use crate::config::Config;

/// Says what the config would run.
pub(super) fn check(path: &Path, config: &Config) -> anyhow::Result<()> {
    let redis = match &config.redis {
        Some(redis) => format!("weights from {}", redis.address),
        None => "weights from this file alone".to_owned(),
    };
    say(&format!(
        "{}: valid: {} listeners, {} pools, {redis}\n",
        path.display(),
        config.listeners.len(),
        config.pools.len()
    ))
}
