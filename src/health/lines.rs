//! The log lines about the health of backends, and how many of them a pool may write: a failed network may
//! change the health of thousands of backends at once.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;
use tracing::field::{DisplayValue, display};
use tracing::{info, warn};

use super::check_error::CheckError;
use crate::balance::backend::Cause;
use crate::balance::backend::Target;

const PERIOD: Duration = Duration::from_secs(10);
const LINES_A_PERIOD: u32 = 100;

/// Permits 100 lines in 10 s for one pool.
#[derive(Debug)]
pub(super) struct LineLimiter {
    period: Instant,
    written: u32,
    held_back: u32,
}

impl LineLimiter {
    pub(super) fn new() -> Self {
        Self { period: Instant::now(), written: 0, held_back: 0 }
    }

    /// Counts one line, and returns true if it may be written. The first call of a new period logs how many
    /// lines of the period before were held back.
    pub(super) fn allow(&mut self, pool: &str) -> bool {
        let now = Instant::now();
        if now - self.period >= PERIOD {
            if self.held_back > 0 {
                let changes = self.held_back;
                warn!(
                    pool,
                    changes, "more backends changed than are logged one by one: see statera_backend_up"
                );
            }
            *self = Self::new();
        }
        let allowed = self.written < LINES_A_PERIOD;
        if allowed {
            self.written += 1;
        } else {
            self.held_back += 1;
        }
        allowed
    }
}

/// Logs that `target` is ejected for `length`: after `failures` sessions in a row or, with `again`, after
/// its trial session.
pub(super) fn ejected(pool: &str, target: &Target, again: bool, failures: u32, times: u32, length: Duration) {
    let error = target.condition().session_error.get().unwrap_or(Cause::OTHER);
    let (backend, address, ejection) = (target.backend().id(), address(target), rounded(length));
    if again {
        warn!(
            pool, %backend, address, %error, times, ejection,
            "trial session failed ({error}): backend stays ejected for {ejection}"
        );
    } else {
        warn!(
            pool, %backend, address, %error, failures, times, ejection,
            "backend ejected after {failures} failed sessions in a row (last error: {error}), no sessions for {ejection}"
        );
    }
}

/// Logs that `target` is not ejected although its sessions fail: with it, more than `most` percent of its
/// pool would get no sessions.
pub(super) fn not_ejected(pool: &str, target: &Target, failures: u32, most: u32) {
    let error = target.condition().session_error.get().unwrap_or(Cause::OTHER);
    let (backend, address) = (target.backend().id(), address(target));
    warn!(
        pool, %backend, address, %error, failures,
        "backend not ejected after {failures} failed sessions in a row (last error: {error}): no more than {most} % \
         of a pool are (outlier.max_ejected_percent)"
    );
}

/// Logs that `target` is unhealthy after this number of failed checks in a row, the last one with `error`.
pub(super) fn unhealthy(pool: &str, target: &Target, checks: u32, error: &CheckError) {
    let (backend, address) = (target.backend().id(), address(target));
    let failed = counted(checks, "failed");
    warn!(pool, %backend, address, %error, checks, "backend unhealthy after {failed} (last error: {error})");
}

/// Logs that `target` is healthy again after this number of passed checks in a row.
pub(super) fn healthy(pool: &str, target: &Target, checks: u32) {
    let (backend, address) = (target.backend().id(), address(target));
    let passed = counted(checks, "passed");
    info!(pool, %backend, address, checks, "backend healthy again after {passed}");
}

/// Returns the address of `target` if its name has several.
fn address(target: &Target) -> Option<DisplayValue<SocketAddr>> {
    target.address_of_several().map(display)
}

fn counted(checks: u32, ended: &str) -> String {
    format!("{checks} {ended} check{}", if checks == 1 { "" } else { "s" })
}

/// Rounds a duration up: below a minute to tenths of a second (`9.9s`), else to seconds (`3m 21s`).
fn rounded(length: Duration) -> String {
    let tenths = length.as_millis().div_ceil(100);
    match u64::try_from(tenths).unwrap_or(u64::MAX) {
        tenths if tenths < 600 && tenths % 10 > 0 => format!("{}.{}s", tenths / 10, tenths % 10),
        tenths => humantime::format_duration(Duration::from_secs(tenths.div_ceil(10))).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_rounded_to_tenths_of_a_second() {
        let round = |millis| rounded(Duration::from_millis(millis));
        assert_eq!([9_851, 10_000, 48, 59_999].map(round), ["9.9s", "10s", "0.1s", "1m"]);
        assert_eq!([200_400, 3_600_000].map(round), ["3m 21s", "1h"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pool_writes_at_most_a_hundred_lines_in_ten_seconds() {
        let mut lines = LineLimiter::new();
        assert_eq!((0..5_000).filter(|_| lines.allow("web")).count(), 100);
        tokio::time::advance(PERIOD).await;
        assert_eq!((lines.allow("web"), lines.held_back), (true, 0));
    }
}
