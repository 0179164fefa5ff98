//! How long a pool's table rests after it was read, so that neither one proxy nor a whole fleet keeps Redis
//! busy with reads.

use std::time::Duration;

/// Rest after a read, for each member that it gave: a read costs Redis 0.5 µs a member, so it is never busy
/// with us for more than a twentieth of its time.
const REST_PER_MEMBER: Duration = Duration::from_micros(10);
const LONGEST_REST: Duration = Duration::from_millis(100);
/// A read that took long, because Redis is busy with a whole fleet's, is followed by a rest of so many times
/// that. Then all of them together, however many, take a fifth of its time.
const REST_PER_READ: u32 = 4;
/// One that took no longer has met nobody else's.
const QUICK_READ: Duration = Duration::from_micros(200);
const LONGEST_REST_OF_A_FLEET: Duration = Duration::from_millis(400);

/// How long to rest after a read of so many members that took so long.
pub(in crate::redis) fn rest_after(members: usize, took: Duration) -> Duration {
    let of_members = REST_PER_MEMBER * u32::try_from(members).unwrap_or(u32::MAX);
    let of_fleet = if took > QUICK_READ { took * REST_PER_READ } else { Duration::ZERO };
    of_members.min(LONGEST_REST).max(of_fleet.min(LONGEST_REST_OF_A_FLEET))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::schema::MAX_MEMBERS;

    #[test]
    fn a_rest_grows_with_the_table_and_with_what_the_read_took_up_to_a_bound() {
        let (micros, millis) = (Duration::from_micros, Duration::from_millis);
        assert_eq!(rest_after(10, micros(200)), micros(100), "nobody else's read was in the way");
        assert_eq!(rest_after(10, micros(201)), micros(804));
        assert_eq!(rest_after(10_000, millis(10)), millis(100));
        assert_eq!(rest_after(MAX_MEMBERS, millis(20)), millis(100));
        assert_eq!(rest_after(10, millis(50)), millis(200), "whoever waits for redis is one of many");
        assert_eq!(rest_after(usize::MAX, Duration::from_secs(20)), LONGEST_REST_OF_A_FLEET);
    }
}
