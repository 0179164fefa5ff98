//! How the results of checks change the health of an address.

use crate::balance::backend::{Condition, Health};
use crate::config::HealthCheck;

/// Returns true if the last check of this address failed. An address is in doubt if its last check differed
/// from its health, so an unhealthy address in doubt has passed its last check.
pub(super) fn failed_last(condition: &Condition) -> bool {
    match condition.health() {
        Health::Unchecked => false,
        Health::Healthy => condition.is_in_doubt(),
        Health::Unhealthy => !condition.is_in_doubt(),
    }
}

/// Counts the result of a check, and changes the health of the address if there are enough in a row. Returns
/// how many were needed if it changed, but `None` if the first check passed, which is not logged.
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
