//! When a measurement begins, and when it is over.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::Instant;

use super::machine::{Disturbance, Processes, Reading};

/// Nothing lasts longer, whatever a proxy does.
const LONGEST: Duration = Duration::from_secs(30);

/// Loads call [`Meter::over`] after every batch of events; all else follows from the clock.
pub struct Meter {
    proxy: Processes,
    created: Option<Instant>,
    warm_up: Duration,
    length: Duration,
    count: Option<u64>,
    begun: Option<(Reading, u64)>,
    ended: Option<(Reading, u64)>,
}

impl Meter {
    /// Measures for `length`, after a tenth of it (at least 100 ms) to warm up.
    pub fn timed(proxy: &Processes, length: Duration) -> Self {
        let warm_up = (length / 10).max(Duration::from_millis(100));
        let proxy = proxy.clone();
        Self { proxy, created: None, warm_up, length, count: None, begun: None, ended: None }
    }

    /// Measures until `count` units are done, from the first on.
    pub fn counted(proxy: &Processes, count: u64) -> Self {
        Self { count: Some(count), warm_up: Duration::ZERO, ..Self::timed(proxy, LONGEST) }
    }

    /// How many units a load may start.
    pub fn limit(&self) -> u64 {
        self.count.unwrap_or(u64::MAX)
    }

    pub fn length(&self) -> Duration {
        self.length
    }

    /// When the measurement proper begins, counted from the first call of [`Meter::over`].
    pub fn warm_up(&self) -> Duration {
        self.warm_up
    }

    /// Whether the load may stop, having done `units` since it started.
    pub fn over(&mut self, units: u64) -> bool {
        let now = Instant::now();
        let created = *self.created.get_or_insert(now);
        let Some((begun, _)) = &self.begun else {
            if now - created >= self.warm_up {
                self.begun = Some((Reading::now(&self.proxy), units));
            }
            return false;
        };
        if now - begun.at >= self.length || self.count.is_some_and(|count| units >= count) {
            self.ended = Some((Reading::now(&self.proxy), units));
        }
        self.ended.is_some()
    }

    /// What was seen between the two ends.
    pub fn window(&self) -> Result<Window> {
        let (Some((begun, before)), Some((ended, after))) = (&self.begun, &self.ended) else {
            anyhow::bail!("the measurement did not end");
        };
        ensure!(after > before, "nothing at all was done in {:?}", ended.at - begun.at);
        Ok(Window {
            units: (after - before) as f64,
            wall: ended.at - begun.at,
            cpu: ended.cpu.saturating_sub(begun.cpu),
            busiest_worker: ended.evenness_since(begun),
            disturbance: ended.disturbance_since(begun),
        })
    }
}

/// What a load did in its time, and what it cost the proxy.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub units: f64,
    pub wall: Duration,
    pub cpu: Duration,
    /// Its share of the work, see [`Reading::evenness_since`].
    pub busiest_worker: Option<f64>,
    pub disturbance: Disturbance,
}

impl Window {
    pub fn per_second(&self) -> f64 {
        self.units / self.wall.as_secs_f64()
    }

    /// CPU seconds of the proxy for each unit.
    pub fn cpu_per_unit(&self) -> f64 {
        self.cpu.as_secs_f64() / self.units
    }
}
