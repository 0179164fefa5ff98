//! Which backends of a snapshot get sessions, and why the others get none: for the log and for the report of
//! this proxy.

use std::fmt;

use super::member::{Member, TrialMode};
use super::snapshot::Snapshot;
use crate::balance::backend::{Cause, Condition, Ejection, Target};
use crate::balance::values::{AdminState, BackendId};

/// How many backends get sessions, as far as the log distinguishes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usable {
    /// None: sessions are refused.
    None,
    /// One: if this backend fails too, health is ignored or sessions fail.
    One,
    /// Two or more, or health is ignored.
    #[default]
    Several,
}

/// One reason why a backend gets no sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The backend's checks fail. The cause is that of the last check that failed.
    Unhealthy(Option<Cause>),
    /// The backend is ejected. The cause is that of the last session that failed.
    Ejected(Option<Cause>),
    /// The backend is on trial after an ejection and gets one session. The cause is that of the last
    /// session that failed.
    Trial(Option<Cause>),
    /// The backend's name has no address yet.
    Unresolved,
    /// The backend is in drain.
    Drain,
    /// The backend is in maint.
    Maint,
    /// The backend's weight is 0.
    WeightZero,
}

impl Reason {
    /// The name in log and report, without spaces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unhealthy(_) => "unhealthy",
            Self::Ejected(_) => "ejected",
            Self::Trial(_) => "trial",
            Self::Unresolved => "unresolved",
            Self::Drain => "drain",
            Self::Maint => "maint",
            Self::WeightZero => "weight_0",
        }
    }

    /// The cause of the last failure.
    #[must_use]
    pub fn cause(self) -> Option<Cause> {
        match self {
            Self::Unhealthy(cause) | Self::Ejected(cause) | Self::Trial(cause) => cause,
            Self::Unresolved | Self::Drain | Self::Maint | Self::WeightZero => None,
        }
    }
}

/// All reasons why one backend gets no sessions: first those from Redis or config.yaml, then those that this
/// proxy has found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    reasons: [Option<Reason>; 5],
}

impl Reasons {
    fn of(member: &Member, fails_open: bool) -> Self {
        let backend = &member.backend;
        let state = match member.state {
            AdminState::Ready => None,
            AdminState::Drain => Some(Reason::Drain),
            AdminState::Maint => Some(Reason::Maint),
        };
        // A name is unusable if all of its addresses are. For each reason, the first address that has it
        // gives the cause.
        let health_counts = !fails_open && !backend.is_usable();
        let of_address = |reason: fn(&Condition) -> Option<Reason>| {
            let mut targets = Target::all_of(backend).filter(|_| health_counts);
            targets.find_map(|target| reason(target.condition()))
        };
        let reasons = [
            state,
            member.weight.is_zero().then_some(Reason::WeightZero),
            (!backend.is_reachable()).then_some(Reason::Unresolved),
            of_address(|condition| {
                condition.fails_checks().then(|| Reason::Unhealthy(condition.check_error.get()))
            }),
            of_address(|condition| match condition.ejection() {
                Ejection::None => None,
                Ejection::Ejected => Some(Reason::Ejected(condition.session_error.get())),
                Ejection::Trial => Some(Reason::Trial(condition.session_error.get())),
            }),
        ];
        Self { reasons }
    }

    /// The reasons, in their order.
    pub fn iter(&self) -> impl Iterator<Item = Reason> {
        self.reasons.iter().flatten().copied()
    }

    fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// True if this proxy has found out one of the reasons.
    fn is_of_this_proxy(&self) -> bool {
        self.reasons[2..].iter().any(Option::is_some)
    }
}

/// The backends that get no sessions from this proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unusable {
    /// First the backends with a reason that this proxy has found out, then the others. Each of the two
    /// groups is sorted by name.
    pub backends: Vec<(BackendId, Reasons)>,
    /// The number of unusable backends that are not in `backends`.
    pub more: usize,
    /// Health is ignored, since too little of the pool is healthy.
    pub fails_open: bool,
}

impl Unusable {
    /// The members of `newest` that get no sessions, at most `most` of them.
    pub(in crate::balance) fn of(newest: &Snapshot, most: usize) -> Self {
        let gets_none = |member: &&Member| !is_usable(member);
        let of = |member: &Member| (member.backend.id().clone(), Reasons::of(member, newest.fails_open));
        let mut backends: Vec<_> =
            newest.members().iter().filter(gets_none).map(of).filter(|(_, why)| !why.is_empty()).collect();
        backends.sort_by(|(a, of_a), (b, of_b)| {
            of_b.is_of_this_proxy().cmp(&of_a.is_of_this_proxy()).then_with(|| a.cmp(b))
        });
        let more = backends.len().saturating_sub(most);
        backends.truncate(most);
        Self { backends, more, fails_open: newest.fails_open }
    }
}

/// True if the member gets sessions. A single trial session does not count.
fn is_usable(member: &Member) -> bool {
    !member.effective_weight.is_zero() && member.trial != TrialMode::Alone
}

impl Snapshot {
    /// How many backends get sessions.
    #[must_use]
    pub fn usable(&self) -> Usable {
        match self.usable_members().take(2).count() {
            _ if self.fails_open => Usable::Several,
            0 => Usable::None,
            1 => Usable::One,
            _ => Usable::Several,
        }
    }

    /// The backends that get sessions.
    pub fn usable_members(&self) -> impl Iterator<Item = &Member> {
        self.picked_from().iter().filter(|member| is_usable(member))
    }

    /// Why no backend gets sessions, if none does.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        let has_weight = |member: &Member| !member.weight.is_zero();
        if self.members().is_empty() {
            Refusal::Empty
        } else if !self.members().iter().any(has_weight) {
            Refusal::AllZero
        } else if !self.members().iter().any(Member::wants_sessions) {
            Refusal::NoneReady
        } else {
            Refusal::Unresolved
        }
    }
}

/// Why a pool refuses its sessions. Health is never the reason: if no backend is healthy, health is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The table has no members.
    Empty,
    /// All weights are 0.
    AllZero,
    /// All members with a weight are in drain or maint.
    NoneReady,
    /// All members with a weight that are ready are names without an address.
    Unresolved,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the table is empty",
            Self::AllZero => "all weights are 0",
            Self::NoneReady => "all backends with a weight are in drain or maint",
            Self::Unresolved => "no backend's name is resolved",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::backend::Health;
    use crate::balance::pool::Cell;
    use crate::balance::values::{Balance, Table};

    /// Each backend as `name reason:cause reason …`.
    fn reported(cell: &Cell, most: usize) -> (Vec<String>, usize) {
        let Unusable { backends, more, .. } = cell.unusable(most);
        let line = |(id, why): &(BackendId, Reasons)| {
            why.iter().fold(id.to_string(), |line, reason| match reason.cause() {
                Some(cause) => format!("{line} {}:{cause}", reason.name()),
                None => format!("{line} {}", reason.name()),
            })
        };
        (backends.iter().map(line).collect(), more)
    }

    #[test]
    fn every_reason_is_reported_and_those_that_only_this_proxy_knows_come_first() {
        let members = [
            ("10.0.0.1:80", 0.0),
            ("10.0.0.2:80", 1.0),
            ("10.0.0.3:80", 1.0),
            ("a.test:80", 1.0),
            ("10.0.0.4:80", 5.0),
        ];
        let cell = Cell::new(Table::of(&members), Balance::WeightedRandom, 1);
        let drained = vec![("10.0.0.3:80".parse().expect("an address"), AdminState::Drain)];
        cell.set_states(drained);
        let backend = |id: &str| cell.registry().get_or_create(&id.parse().expect("an address"));
        let condition = &backend("10.0.0.2:80").condition;
        condition.set_health(Health::Unhealthy);
        condition.check_error.set(Cause::TIMED_OUT);
        condition.session_error.set(Cause::RESET);
        condition.set_ejection(Ejection::Ejected);
        cell.refresh();
        let all = [
            "10.0.0.2:80 unhealthy:timed out ejected:connection reset by peer",
            "a.test:80 unresolved",
            "10.0.0.1:80 weight_0",
            "10.0.0.3:80 drain",
        ];
        assert_eq!(reported(&cell, 10), (all.map(String::from).to_vec(), 0));
        assert_eq!(reported(&cell, 1), (all[..1].iter().map(|text| (*text).to_owned()).collect(), 3));
        assert_eq!(cell.load().usable(), Usable::One);

        // Health is ignored, so the unhealthy backend gets sessions.
        backend("10.0.0.4:80").condition.set_health(Health::Unhealthy);
        cell.refresh();
        assert_eq!(reported(&cell, 10).0, all[1..].iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert!(cell.unusable(10).fails_open);
        assert_eq!(cell.load().usable(), Usable::Several);
    }

    #[test]
    fn a_name_is_reported_once_all_of_its_addresses_are_unusable_with_the_cause_of_one_of_them() {
        let cell =
            Cell::new(Table::of(&[("db.test:80", 1.0), ("10.0.0.1:80", 1.0)]), Balance::WeightedRandom, 1);
        let name = cell.registry().get_or_create(&"db.test:80".parse().expect("a name"));
        name.set_resolved([1, 2].map(|n| std::net::SocketAddr::from(([10, 0, 1, n], 80))).to_vec());
        let mut out = Target::all_of(&name).map(|target| {
            target.condition().session_error.set(Cause::RESET);
            target.condition().set_ejection(Ejection::Ejected);
            cell.refresh();
            reported(&cell, 10).0
        });
        assert_eq!(out.next(), Some(vec![]), "its other address gets its sessions");
        assert_eq!(out.next(), Some(vec!["db.test:80 ejected:connection reset by peer".to_owned()]));
    }

    #[test]
    fn a_refusal_names_its_reason() {
        let of = |members: &[(&str, f64)]| {
            let cell = Cell::new(Table::of(members), Balance::WeightedRandom, 1);
            let newest = cell.load();
            (newest.usable(), newest.refusal())
        };
        assert_eq!(of(&[]), (Usable::None, Refusal::Empty));
        assert_eq!(of(&[("10.0.0.1:80", 0.0)]), (Usable::None, Refusal::AllZero));
        assert_eq!(of(&[("a.test:80", 1.0), ("10.0.0.1:80", 0.0)]), (Usable::None, Refusal::Unresolved));
        let cell = Cell::new(Table::of(&[("10.0.0.1:80", 1.0)]), Balance::WeightedRandom, 1);
        cell.set_states(vec![("10.0.0.1:80".parse().expect("an address"), AdminState::Maint)]);
        assert_eq!((cell.load().usable(), cell.load().refusal()), (Usable::None, Refusal::NoneReady));
    }
}
