//! Compares what runs with what is to run, by name.
//!
//! Pure: it opens and ends nothing. At a start nothing runs; at a shutdown nothing is desired. Next:
//! `plan.rs` prepares and applies the difference that is found here.

use std::collections::HashSet;
use std::sync::Arc;

use crate::config::{self, Config};

/// What is to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Desired<'a> {
    /// In the order of the config.
    pub(super) pools: &'a [config::Pool],
    /// In the order of the config. The pool of each is among `pools`.
    pub(super) listeners: &'a [config::Listener],
}

impl<'a> Desired<'a> {
    pub(super) fn of(config: &'a Config) -> Self {
        Self { pools: &config.pools, listeners: &config.listeners }
    }

    /// Returns the same pools without listeners: no sessions begin, and open sessions may finish.
    pub(super) fn without_listeners(self) -> Self {
        Self { listeners: &[], ..self }
    }

    pub(super) fn nothing() -> Self {
        Self { pools: &[], listeners: &[] }
    }
}

/// The names of pools and of listeners.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) pools: Vec<Arc<str>>,
    pub(super) listeners: Vec<Arc<str>>,
}

/// How what runs differs from what is desired.
#[derive(Debug, Default)]
pub(super) struct Difference<'a> {
    /// Pools that do not run yet.
    pub(super) new_pools: Vec<&'a config::Pool>,
    /// Listeners that do not run yet.
    pub(super) new_listeners: Vec<&'a config::Listener>,
    /// What runs and is not desired.
    pub(super) gone: Names,
}

/// Finds what is to be added and what is to be removed. What runs and is desired is in neither list.
pub(super) fn difference<'a>(running: &Names, desired: Desired<'a>) -> Difference<'a> {
    let (pools, listeners) = (set(&running.pools), set(&running.listeners));
    let wanted_pools: HashSet<&str> = desired.pools.iter().map(|pool| &*pool.name).collect();
    let wanted_listeners: HashSet<&str> = desired.listeners.iter().map(|listener| &*listener.name).collect();
    Difference {
        new_pools: desired.pools.iter().filter(|pool| !pools.contains(&*pool.name)).collect(),
        new_listeners: desired.listeners.iter().filter(|new| !listeners.contains(&*new.name)).collect(),
        gone: Names {
            pools: without(&running.pools, &wanted_pools),
            listeners: without(&running.listeners, &wanted_listeners),
        },
    }
}

fn set(names: &[Arc<str>]) -> HashSet<&str> {
    names.iter().map(|name| &**name).collect()
}

fn without(names: &[Arc<str>], wanted: &HashSet<&str>) -> Vec<Arc<str>> {
    names.iter().filter(|name| !wanted.contains(&***name)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listeners: &str, pools: &str) -> Config {
        let listeners = listeners.split(' ').enumerate().map(|(port, name)| {
            format!(
                "{name}: {{bind: \"127.0.0.1:{}\", pool: {}}}",
                7000 + port,
                pools.split(' ').next().unwrap_or("")
            )
        });
        let pools = pools.split(' ').map(|name| format!("{name}: {{backends: {{\"127.0.0.1:9\": 1}}}}"));
        let (listeners, pools): (Vec<_>, Vec<_>) = (listeners.collect(), pools.collect());
        let yaml = format!("listeners: {{{}}}\npools: {{{}}}", listeners.join(", "), pools.join(", "));
        Config::from_yaml(&yaml).expect("a valid config")
    }

    fn names(listeners: &[&str], pools: &[&str]) -> Names {
        let all = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
        Names { pools: all(pools), listeners: all(listeners) }
    }

    fn added(difference: &Difference<'_>) -> Names {
        Names {
            pools: difference.new_pools.iter().map(|pool| Arc::clone(&pool.name)).collect(),
            listeners: difference.new_listeners.iter().map(|new| Arc::clone(&new.name)).collect(),
        }
    }

    #[test]
    fn a_start_adds_all_in_the_order_of_the_config() {
        let config = config("web mail", "b a");
        let difference = difference(&Names::default(), Desired::of(&config));
        assert_eq!(added(&difference), names(&["web", "mail"], &["b", "a"]));
        assert_eq!(difference.gone, Names::default());
    }

    #[test]
    fn a_drain_closes_the_listeners_and_leaves_the_pools() {
        let config = config("web mail", "a");
        let running = names(&["web", "mail"], &["a"]);
        let difference = difference(&running, Desired::of(&config).without_listeners());
        assert_eq!(added(&difference), Names::default());
        assert_eq!(difference.gone, names(&["web", "mail"], &[]));
    }

    #[test]
    fn an_end_removes_all_that_runs() {
        let running = names(&["web"], &["a", "b"]);
        let difference = difference(&running, Desired::nothing());
        assert_eq!((added(&difference), difference.gone), (Names::default(), running));
    }

    #[test]
    fn what_runs_and_is_desired_is_left_alone() {
        let config = config("web mail", "a c");
        let running = names(&["old", "web"], &["b", "a"]);
        let difference = difference(&running, Desired::of(&config));
        assert_eq!(added(&difference), names(&["mail"], &["c"]));
        assert_eq!(difference.gone, names(&["old"], &["b"]));
        let same = names(&["web", "mail"], &["a", "c"]);
        let difference = super::difference(&same, Desired::of(&config));
        assert_eq!((added(&difference), difference.gone), (Names::default(), Names::default()));
    }
}
