//! `pools.*.max_connections` and `pools.*.queue`: how much a backend is given, and who waits for a place.

use std::time::Duration;

use crate::balance::queue::Capacity;
use crate::config::decode::{Keys, Kind, Section};

const QUEUE: Keys = Keys {
    now: &["size", "timeout"],
    later: &[],
    example: "{size: 100}",
    meant: &[(Kind::Number, "size"), (Kind::Duration, "timeout")],
};
/// Far more than a machine has connections.
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
    // Not where what is written is refused already.
    let is_unlimited = matches!(most, None | Some(Some(0)));
    if capacity.queue_size > 0
        && is_unlimited
        && let Some(field) = queue.field("size")
    {
        field.refuse(
            "nobody waits where backends have no limit: write max_connections too, or leave the queue out",
        );
    }
    capacity
}
