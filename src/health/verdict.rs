//! How the results of checks change the health of an address.

use crate::balance::backend::{Condition, Health};
use crate::config::HealthCheck;

/// True if the last check of this address failed. That is a check against its health, unless the address is
/// unhealthy and no check has passed since.
pub(super) fn failed_last(condition: &Condition) -> bool {
    match condition.health() {
        Health::Unchecked => false,
        Health::Healthy => condition.is_in_doubt(),
        Health::Unhealthy => !condition.is_in_doubt(),
    }
}

/// Counts the result of a check. If it changes the health of the address, returns how many results in a row
/// were needed.
pub(super) fn judge(condition: &Condition, passed: bool, settings: &HealthCheck) -> Option<u32> {
    let (needed, verdict) = match (condition.health(), passed) {
        (Health::Unchecked, true) => {
            condition.set_health(Health::Healthy);
            return None;
        }
        (Health::Unchecked, false) => (1, Health::Unhealthy),
        (Health::Healthy, false) => (settings.fall.get(), Health::Unhealthy),
        (Health::Unhealthy, true) => (settings.rise.get(), Health::Healthy),
        (Health::Healthy, true) | (Health::Unhealthy, false) => {
            condition.forget_checks_against();
            return None;
        }
    };
    let decided = condition.count_check_against() >= needed;
    if decided {
        condition.forget_checks_against();
        condition.set_health(verdict);
    }
    decided.then_some(needed)
}
