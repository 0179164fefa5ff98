//! `pools.*.max_connections` and `pools.*.queue`: how many sessions a backend may have, and how many may
//! wait for a slot.

use std::time::Duration;

use crate::balance::Capacity;
use crate::config::decode::{Keys, Kind, Section};

const QUEUE: Keys = Keys {
    now: &["size", "timeout"],
    later: &[],
    example: "{size: 100}",
    meant: &[(Kind::Number, "size"), (Kind::Duration, "timeout")],
};
/// Far more connections than a machine can have.
const SESSIONS_MAX: u64 = 1_000_000_000;

pub(super) fn capacity(pool: &Section<'_>) -> Capacity {
    let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let most = pool.field("max_connections").map(|field| field.integer(&(0..=SESSIONS_MAX)));
    let queue = pool.section("queue", QUEUE);
    let capacity = Capacity {
        max_connections: most.flatten().map_or(0, number),
        queue_size: number(queue.integer("size", 0..=SESSIONS_MAX, 0)),
        queue_timeout: queue.interval("timeout", Duration::from_secs(1)),
    };
    // A value that was refused already is not reported again.
    let is_unlimited = matches!(most, None | Some(Some(0)));
    if capacity.queue_size > 0
        && is_unlimited
        && let Some(field) = queue.field("size")
    {
        field.refuse(
            "no session waits where backends have no limit: write max_connections too, or remove the queue",
        );
    }
    capacity
}
