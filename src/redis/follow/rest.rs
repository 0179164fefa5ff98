//! How long a pool rests after its table was read, so that neither one proxy nor a whole fleet keeps
//! Redis busy with reads.

use std::time::Duration;

/// The rest for each member that a read returned. A read costs Redis 0.5 µs a member, so with up to 10,000
/// members the reads of one pool by one proxy take a twentieth of Redis's time at most. Above that,
/// [`LONGEST_REST`] limits the rest.
const REST_PER_MEMBER: Duration = Duration::from_micros(10);
const LONGEST_REST: Duration = Duration::from_millis(100);
/// A read that took long, because Redis was busy with the reads of a fleet, is followed by a rest of this
/// many times its duration. So all proxies together take a fifth of Redis's time, as long as a read takes
/// 100 ms at most. Above that, [`LONGEST_REST_OF_A_FLEET`] limits the rest.
const REST_PER_READ: u32 = 4;
/// A read that takes at most this long counts as one that did not wait for other proxies' reads.
const QUICK_READ: Duration = Duration::from_micros(200);
const LONGEST_REST_OF_A_FLEET: Duration = Duration::from_millis(400);

/// Returns how long a pool rests after a read that returned `members` and took `took`.
pub(super) fn rest_after(members: usize, took: Duration) -> Duration {
    let of_members = REST_PER_MEMBER * u32::try_from(members).unwrap_or(u32::MAX);
    let of_fleet = if took > QUICK_READ { took * REST_PER_READ } else { Duration::ZERO };
    of_members.min(LONGEST_REST).max(of_fleet.min(LONGEST_REST_OF_A_FLEET))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::schema::MAX_MEMBERS;

    #[test]
    fn a_rest_grows_with_the_table_and_the_time_of_the_read_up_to_a_bound() {
        let (micros, millis) = (Duration::from_micros, Duration::from_millis);
        assert_eq!(rest_after(10, micros(200)), micros(100), "no other read was in the way");
        assert_eq!(rest_after(10, micros(201)), micros(804));
        assert_eq!(rest_after(10_000, millis(10)), millis(100));
        assert_eq!(rest_after(MAX_MEMBERS, millis(20)), millis(100));
        assert_eq!(rest_after(10, millis(50)), millis(200), "a slow answer means that many proxies read");
        assert_eq!(rest_after(usize::MAX, Duration::from_secs(20)), LONGEST_REST_OF_A_FLEET);
    }
}
