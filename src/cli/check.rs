//! `statera check`: loading the config has already said everything that is wrong with it, so that warnings are left. They go to
//! stderr, one a line, and the exit code is 0 all the same.

use std::io::{self, Write as _};
use std::path::Path;

use super::print;
use crate::config::Config;

/// Says what the config would run.
pub(super) fn check(path: &Path, config: &Config) -> anyhow::Result<()> {
    let redis = match &config.redis {
        Some(redis) => format!("weights from {}", redis.address),
        None => "weights from this file alone".to_owned(),
    };
    let mut errors = io::stderr().lock();
    for warning in &config.warnings.first {
        // Where nothing reads them, the answer is still worth giving.
        let _ = writeln!(errors, "warning: {warning}");
    }
    if config.warnings.more > 0 {
        let _ = writeln!(errors, "and {} more warnings", config.warnings.more);
    }
    print(&format!(
        "{}: valid: {} listeners, {} pools, {redis}\n",
        path.display(),
        config.listeners.len(),
        config.pools.len()
    ))
}
