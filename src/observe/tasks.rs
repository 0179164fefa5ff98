//! The names of all tasks and threads that are restarted after a defect, and how often that happened.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A task or a thread that is restarted when it panics or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Answers HTTP requests.
    Admin,
    /// Follows the tables in Redis.
    WatchRedis,
    /// Reports to Redis which tables are applied.
    ReportApplied,
    /// Lets Redis pick.
    LuaPick,
    /// Saves the tables of one pool.
    SaveTable,
    /// Resolves the names of one pool.
    ResolveNames,
    /// Checks the health of one pool's backends.
    HealthChecks,
    /// Ejects backends of one pool.
    Ejections,
    /// Lets weights of one pool grow after a recovery.
    SlowStart,
    /// Logs when the health of one pool is ignored.
    WatchFailOpen,
    /// Logs when one pool has no usable backend, or only one.
    WatchUsable,
    /// The thread that notices tasks that block.
    Watchdog,
    /// A thread of the data plane.
    Worker,
    /// The clock of the sessions on one worker.
    WorkerClock,
    /// Writes the session lines of one worker.
    AccessLog,
    /// Closes the sessions of draining backends on one worker.
    DrainBackends,
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 16] = [
        Self::Admin,
        Self::WatchRedis,
        Self::ReportApplied,
        Self::LuaPick,
        Self::SaveTable,
        Self::ResolveNames,
        Self::HealthChecks,
        Self::Ejections,
        Self::SlowStart,
        Self::WatchFailOpen,
        Self::WatchUsable,
        Self::Watchdog,
        Self::Worker,
        Self::WorkerClock,
        Self::AccessLog,
        Self::DrainBackends,
    ];

    /// Returns the name, as the metric's label and the log's field have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::WatchRedis => "watch_redis",
            Self::ReportApplied => "report_applied",
            Self::LuaPick => "lua_pick",
            Self::SaveTable => "save_table",
            Self::ResolveNames => "resolve_names",
            Self::HealthChecks => "health_checks",
            Self::Ejections => "ejections",
            Self::SlowStart => "slow_start",
            Self::WatchFailOpen => "watch_fail_open",
            Self::WatchUsable => "watch_usable",
            Self::Watchdog => "watchdog",
            Self::Worker => "worker",
            Self::WorkerClock => "worker_clock",
            Self::AccessLog => "access_log",
            Self::DrainBackends => "drain_backends",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Counts restarts, by task. Any thread writes.
#[derive(Debug, Default)]
pub struct Restarts([AtomicU64; Task::ALL.len()]);

impl Restarts {
    /// Counts one restart.
    pub fn count(&self, task: Task) {
        self.0[task as usize].fetch_add(1, Relaxed);
    }

    /// Returns how often tasks named `task` were restarted, for all pools or workers together.
    #[must_use]
    pub fn of(&self, task: Task) -> u64 {
        self.0[task as usize].load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_has_a_name_and_a_counter_of_its_own() {
        let restarts = Restarts::default();
        Task::ALL.into_iter().for_each(|task| restarts.count(task));
        let mut names = Task::ALL.map(Task::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Task::ALL.len());
        assert!(Task::ALL.into_iter().all(|task| restarts.of(task) == 1));
    }
}
