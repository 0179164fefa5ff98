//! How many lines one pool's health may write: a network that fails takes thousands of backends with it.

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

/// One pool's allowance.
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

    /// True if the next line may be written; then it is counted. Says afterwards how many were not.
    pub(super) fn allow(&mut self, pool: &str) -> bool {
        let now = Instant::now();
        if now - self.period >= PERIOD {
            if self.held_back > 0 {
                let changes = self.held_back;
                warn!(
                    pool,
                    changes, "more backends changed than are told one by one: see statera_backend_up"
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

/// Says that the backend of `target` is ejected for `length`, after `failures` sessions in a row or (`again`) after its trial session.
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

/// Says that the backend of `target` fails its sessions and keeps getting them, since `most` percent of its pool are out already.
pub(super) fn not_ejected(pool: &str, target: &Target, failures: u32, most: u32) {
    let error = target.condition().session_error.get().unwrap_or(Cause::OTHER);
    let (backend, address) = (target.backend().id(), address(target));
    warn!(
        pool, %backend, address, %error, failures,
        "backend not ejected after {failures} failed sessions in a row (last error: {error}): no more than {most} % \
         of a pool are (outlier.max_ejected_percent)"
    );
}

/// Says that so many checks of `target` failed in a row, the last one by `error`, and that it gets no sessions.
pub(super) fn unhealthy(pool: &str, target: &Target, checks: u32, error: &CheckError) {
    let (backend, address) = (target.backend().id(), address(target));
    let failed = counted(checks, "failed");
    warn!(pool, %backend, address, %error, checks, "backend unhealthy after {failed} (last error: {error})");
}

/// Says that so many checks of `target` passed in a row, and that it gets sessions again.
pub(super) fn healthy(pool: &str, target: &Target, checks: u32) {
    let (backend, address) = (target.backend().id(), address(target));
    let passed = counted(checks, "passed");
    info!(pool, %backend, address, checks, "backend healthy again after {passed}");
}

/// Which address of a name the line is about, where the name has several.
fn address(target: &Target) -> Option<DisplayValue<SocketAddr>> {
    target.address_of_several().map(display)
}

fn counted(checks: u32, ended: &str) -> String {
    format!("{checks} {ended} check{}", if checks == 1 { "" } else { "s" })
}

/// Tenths of a second are enough for a person: `9.9s`, `3m 20s`.
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
    fn durations_are_rounded_for_a_person() {
        let round = |millis| rounded(Duration::from_millis(millis));
        assert_eq!([9_851, 10_000, 48, 59_999].map(round), ["9.9s", "10s", "0.1s", "1m"]);
        assert_eq!([200_400, 3_600_000].map(round), ["3m 21s", "1h"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_lines_in_ten_seconds_are_enough() {
        let mut lines = LineLimiter::new();
        assert_eq!((0..5_000).filter(|_| lines.allow("web")).count(), 100);
        tokio::time::advance(PERIOD).await;
        assert_eq!((lines.allow("web"), lines.held_back), (true, 0));
    }
}
