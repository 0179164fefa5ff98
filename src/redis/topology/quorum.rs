//! Whom to follow, where several were asked and some may be wrong: the sentinels, or the nodes of a cluster.
//!
//! Each failover, and each move of a slot, raises an epoch, so that whoever was cut off meanwhile can be told from the others.

use crate::config::RedisAddress;

/// What one of those that are asked says of the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::redis) struct Opinion {
    /// Of the configuration: each failover raises it.
    pub(in crate::redis) epoch: u64,
    pub(in crate::redis) address: RedisAddress,
    /// It takes that server for dead.
    pub(in crate::redis) is_down: bool,
}

/// Whom to follow: the newest configuration, unless its server is down. `None`: stay with `present`.
///
/// An older one than `present`'s counts only where most sentinels answer and none knows better: then they were set up
/// anew. Otherwise the one that was cut off during a failover would lead back to the old primary.
pub(in crate::redis) fn choose<'a>(
    opinions: &'a [Option<Opinion>],
    present: Option<&Opinion>,
) -> Option<&'a Opinion> {
    let answering = opinions.iter().flatten().count();
    let newest = opinions.iter().flatten().map(|opinion| opinion.epoch).max()?;
    if present.is_some_and(|present| newest < present.epoch) && answering * 2 <= opinions.len() {
        return None;
    }
    let up = || opinions.iter().flatten().filter(|opinion| opinion.epoch == newest && !opinion.is_down);
    // Where they differ over one epoch, the present one stays, so that nothing swings.
    up().find(|opinion| present.is_some_and(|present| present.address == opinion.address))
        .or_else(|| up().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opinion(epoch: u64, port: u16) -> Option<Opinion> {
        let address = RedisAddress::Tcp { host: "10.0.0.1".into(), port };
        Some(Opinion { epoch, address, is_down: false })
    }

    fn down(epoch: u64, port: u16) -> Option<Opinion> {
        opinion(epoch, port).map(|opinion| Opinion { is_down: true, ..opinion })
    }

    #[track_caller]
    fn chosen(opinions: &[Option<Opinion>], present: Option<Opinion>) -> Option<u16> {
        choose(opinions, present.as_ref()).map(|opinion| match opinion.address {
            RedisAddress::Tcp { port, .. } => port,
            _ => panic!("{opinion:?}"),
        })
    }

    #[test]
    fn the_newest_configuration_wins_and_a_server_that_is_down_is_nobody() {
        assert_eq!(chosen(&[opinion(1, 1), opinion(2, 2), opinion(1, 1)], opinion(1, 1)), Some(2));
        assert_eq!(chosen(&[down(1, 1), down(1, 1), None], opinion(1, 1)), None);
        assert_eq!(chosen(&[down(1, 1), opinion(1, 1), None], None), Some(1));
        assert_eq!(chosen(&[None, None, None], opinion(1, 1)), None);
        // The newest is down: the old one, which one sentinel still takes for the primary, is no way back.
        assert_eq!(chosen(&[down(2, 2), opinion(1, 1), down(2, 2)], opinion(2, 2)), None);
    }

    #[test]
    fn one_sentinel_that_was_cut_off_does_not_lead_back() {
        assert_eq!(chosen(&[opinion(1, 1), None, None], opinion(2, 2)), None);
        assert_eq!(chosen(&[opinion(1, 1), opinion(2, 2), None], opinion(2, 2)), Some(2));
        // Set up anew, they count from the beginning.
        assert_eq!(chosen(&[opinion(0, 3), opinion(0, 3), None], opinion(2, 2)), Some(3));
    }

    #[test]
    fn a_tie_leaves_things_as_they_are() {
        assert_eq!(chosen(&[opinion(1, 1), opinion(1, 2)], opinion(1, 2)), Some(2));
        assert_eq!(chosen(&[opinion(1, 1), opinion(1, 2)], opinion(1, 1)), Some(1));
    }
}
