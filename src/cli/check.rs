//! `statera check`: prints the warnings of a config that was loaded without a problem.
//!
//! Warnings are printed to standard error, one a line. They do not change the exit code, which is 0.

use std::io::{self, Write as _};
use std::path::Path;

use super::print;
use crate::config::Config;

/// Prints the warnings, and then in one line what the config would run.
pub(super) fn check(path: &Path, config: &Config) -> anyhow::Result<()> {
    let redis = match &config.redis {
        Some(redis) => format!("weights from {}", redis.address),
        None => "weights from this file alone".to_owned(),
    };
    let mut errors = io::stderr().lock();
    for warning in &config.warnings.first {
        // Where standard error is closed, the answer is still printed.
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
