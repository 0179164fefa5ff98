//! The program as it ships, for the benchmarks that run it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Builds the program as it ships, and returns where it is.
///
/// What cargo builds beside a benchmark is not that: it has the features that only tests ask for. Tokio's
/// `test-util` alone, whose clock can be paused, makes a request 14 % longer.
pub fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // What the cargo that runs us says of this crate would be news to the build scripts of others, which then
    // build anew.
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    let built = command
        .args(["build", "--locked", "--release", "--bin", "statera"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("cannot run cargo")?;
    ensure!(built.success(), "cargo build --release: {built}");
    Ok(env!("CARGO_BIN_EXE_statera").into())
}
