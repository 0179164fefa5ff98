//! Turns the tree of a config file into a [`Config`] that can run, or reports every problem in it.
//!
//! The files below `check/` read the sections; this file puts them together. Nothing is guessed: what is not
//! understood is an error.

mod capacity;
mod health;
mod listeners;
mod pools;
mod process;
mod redis;
mod secret_file;
mod warnings;

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

pub use super::decode::Problem;
use super::decode::{Field, Keys, Problems, Section, escaped};
use super::file::{ConfigFile, Unreadable, environment};
use super::{Config, Congestion, Redis, Warnings};

const ROOT: Keys = Keys {
    now: &["workers", "redis", "lua_pick", "state_dir", "listeners", "pools", "admin", "log", "shutdown"],
    later: &[],
    example: "{listeners: {…}, pools: {…}}",
    meant: &[],
};
const NAME_MAX_BYTES: usize = 64;

/// The problems of a config, at least one. Displays each on a line of its own.
#[derive(Clone, Debug)]
pub struct InvalidConfig {
    /// The first 50, in the order of the file.
    pub problems: Vec<Problem>,
    /// How many more there are.
    pub more: usize,
}

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, problem) in self.problems.iter().enumerate() {
            let line_break = if position == 0 { "" } else { "\n" };
            write!(f, "{line_break}{problem}")?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more: correct these first", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidConfig {}

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read, or is no YAML document.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// The config was read, and has problems.
    #[error("{}:\n{problems}", .path.as_deref().map_or("config".into(), shown_path))]
    Invalid {
        /// The file; `None` where the config came as a text.
        path: Option<PathBuf>,
        /// The problems in it.
        problems: InvalidConfig,
    },
}

fn shown_path(path: &Path) -> String {
    escaped(&path.to_string_lossy(), 4096)
}

impl Config {
    /// Reads and checks a file, with `${NAME}` from this process's environment.
    ///
    /// # Errors
    /// `Unreadable` where there is no YAML document; otherwise `Invalid` with every problem.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let file = ConfigFile::read(path)?;
        check(file, &process_environment)
            .map_err(|problems| LoadError::Invalid { path: Some(path.to_owned()), problems })
    }

    /// Checks a config that is given as a text.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_yaml(text: &str) -> Result<Self, LoadError> {
        Self::from_yaml_with(text, &process_environment)
    }

    /// Checks a config that is given as a text, with the variables that `environment` knows.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_yaml_with(
        text: &str,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, LoadError> {
        let file = ConfigFile::parse(text)?;
        check(file, environment).map_err(|problems| LoadError::Invalid { path: None, problems })
    }
}

fn process_environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn check(
    mut file: ConfigFile,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Config, InvalidConfig> {
    let problems = Problems::default();
    environment::fill_in(&mut file.root, environment, &problems);
    let root = Section::open(Field::root(&file.root, &problems), ROOT);
    let mut config = config(&root);
    if problems.is_empty() {
        warnings::look(&root, &config);
        let (first, more) = problems.finish_warnings(&file);
        config.warnings = Warnings { first, more };
        return Ok(config);
    }
    let (problems, more) = problems.finish(&file);
    Err(InvalidConfig { problems, more })
}

fn config(root: &Section<'_>) -> Config {
    let redis: Option<Redis> = root.has("redis").then(|| redis::redis(&root.section("redis", redis::REDIS)));
    let listeners = listeners::listeners(root);
    let lua_section = root.section("lua_pick", redis::LUA_PICK);
    let lua_pick = redis::lua_pick(&lua_section);
    let asks_redis = redis.is_some() && lua_pick.enabled;
    let least_deadline = (asks_redis && !lua_section.has("timeout")).then_some(redis::LUA_TIMEOUT);
    let pools = pools::pools(root, redis.is_some(), least_deadline);
    if asks_redis {
        redis::check_lua_timeout(&lua_section, &lua_pick, &pools);
    }
    Config {
        workers: process::workers(root),
        state_dir: process::state_dir(root),
        lua_pick,
        admin: root.has("admin").then(|| listeners.admin(&root.section("admin", listeners::ADMIN))).flatten(),
        log: process::log(&root.section("log", process::LOG)),
        shutdown: process::shutdown(&root.section("shutdown", process::SHUTDOWN)),
        listeners: listeners.listeners,
        redis,
        pools,
        warnings: Warnings::default(),
    }
}

/// Opens a required section whose keys are names. The names are checked, since they become metric labels
/// and parts of paths.
fn named_section<'a>(
    root: &Section<'a>,
    key: &str,
    inner: Keys,
    example: &str,
    missing: &str,
) -> Option<Section<'a>> {
    if !root.has(key) {
        root.whole().miss(key, format!("it is missing: {missing}"));
        return None;
    }
    let section = Section::open_named(root.field(key)?, inner, example);
    if section.is_empty() && section.whole().is_map() {
        section.whole().refuse_unshown(format!("it is empty: {missing}"));
    }
    for (name, field) in section.entries() {
        let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if name.is_empty() || name.len() > NAME_MAX_BYTES || !name.bytes().all(is_valid) {
            field.refuse_unshown("a name has 1 to 64 letters, digits, _ . or -: rename it");
        }
    }
    Some(section)
}

/// Checks only the shape of the name: whether the kernel has the algorithm is known when the proxy starts.
fn tcp_congestion(section: &Section<'_>) -> Option<Congestion> {
    section.field("tcp_congestion")?.parsed("the name of an algorithm is needed, like cubic or bbr")
}

/// Converts a number that was read with a range that begins above zero.
fn non_zero_usize(value: u64) -> NonZeroUsize {
    usize::try_from(value).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN)
}

/// Converts a number that was read with a range that begins above zero and ends below 2^32.
fn non_zero_u32(value: u64) -> NonZeroU32 {
    u32::try_from(value).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN)
}
