//! Metrics of the listeners.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::Observed;
use super::samples::{counters, gauges};
use crate::session::Listener;

impl Observed {
    pub(super) fn encode_listeners(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let listeners = self.listeners();
        let by_listener = |value: fn(&Listener) -> u64| {
            listeners.iter().map(move |l| ([("listener", l.name.to_string())], value(l)))
        };
        counters(
            encoder,
            "statera_listener_connections",
            "Connections accepted",
            by_listener(|l| l.counters.sum(|c| &c.connections)),
        )?;
        gauges(
            encoder,
            "statera_listener_connections_active",
            "Sessions that have not ended",
            by_listener(|l| {
                // `closed` is read first: a session that begins or ends between the two reads counts as
                // active.
                let closed = l.counters.sum(|c| &c.closed);
                l.counters.sum(|c| &c.connections).saturating_sub(closed)
            })
            .map(|(labels, value)| (labels, value as f64)),
        )?;
        let rejected = listeners.iter().flat_map(|l| {
            let row =
                |reason, count| ([("listener", l.name.to_string()), ("reason", String::from(reason))], count);
            [
                row("exhausted", l.counters.sum(|c| &c.accept_exhausted)),
                row("accept_failed", l.counters.sum(|c| &c.accept_failed)),
                row("no_backend", l.counters.sum(|c| &c.no_backend)),
                row("queue_full", l.counters.sum(|c| &c.queue_full)),
                row("queue_timeout", l.counters.sum(|c| &c.queue_timeout)),
            ]
        });
        counters(
            encoder,
            "statera_listener_rejected",
            "Connections that could not be accepted, or found no backend or no slot; exhausted: accepts that \
             failed for want of descriptors or memory",
            rejected,
        )
    }
}
