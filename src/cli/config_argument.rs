//! The option `-c`: which config a command reads.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::Config;

/// Without `-c` the first of these that exists is read.
const DEFAULTS: [&str; 2] = ["config.yaml", "/etc/statera/config.yaml"];

#[derive(Args, Debug)]
pub(in crate::cli) struct ConfigArgument {
    /// The config file [default: ./config.yaml, else /etc/statera/config.yaml].
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgument {
    /// Reads the config. Returns the config and the path that it was read from.
    ///
    /// # Errors
    /// The config has problems, or there is no file. The message says what to do.
    pub(in crate::cli) fn load(&self) -> Result<(PathBuf, Config), String> {
        let path = match &self.config {
            Some(path) => path.clone(),
            None => first_existing(&DEFAULTS.map(Path::new)).ok_or_else(|| {
                format!("there is neither {} nor {}: name a config by -c FILE", DEFAULTS[0], DEFAULTS[1])
            })?,
        };
        let config = Config::load(&path).map_err(|error| error.to_string())?;
        Ok((path, config))
    }
}

fn first_existing(paths: &[&Path]) -> Option<PathBuf> {
    paths.iter().find(|path| path.exists()).map(|path| path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_file_that_exists_is_read() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let [here, there] = ["here.yaml", "there.yaml"].map(|name| folder.path().join(name));
        assert_eq!(first_existing(&[&here, &there]), None);
        std::fs::write(&there, "").expect("a file");
        assert_eq!(first_existing(&[&here, &there]), Some(there.clone()));
        std::fs::write(&here, "").expect("a file");
        assert_eq!(first_existing(&[&here, &there]), Some(here));
    }
}
