//! An immutable, pick-ready form of a table.
//!
//! A pick takes a point and finds its backend, without allocation and without a lock. The caller passes the
//! point, a random number or a hash; `weighted_round_robin` gets it from [`Snapshot::next_point`].
//! `pool/cell.rs` publishes snapshots. `member.rs` computes effective weights.

use std::sync::Arc;

use super::least_conn::LeastConn;
use super::maglev::{Maglev, mix};
use super::member::Member;
use super::member::{Weighed, begin_ramps, known, weigh};
use super::sequence::Sequence;
use super::shares::Shares;
use crate::balance::backend::Registry;
use crate::balance::values::{BackendId, Balance, Policy, Table};

/// Where a snapshot's table comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From config.yaml.
    Configured,
    /// From a file in `state_dir`: what Redis held before this process began.
    Saved,
    /// From Redis.
    Redis,
}

impl Origin {
    /// The name in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Saved => "saved",
            Self::Redis => "redis",
        }
    }
}

/// The backends of one pool at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// The number of this snapshot among those of its pool, from 1.
    pub version: u64,
    /// Where the table comes from.
    pub origin: Origin,
    /// Health is ignored, since too little of the weight is on healthy backends.
    pub fails_open: bool,
    /// A backend is in its slow start, so the snapshot has to be made again soon.
    pub ramps: bool,
    /// Members that may be picked come first, so that an interval of `shares` is an index here.
    members: Box<[Member]>,
    /// Backends of the snapshot before that serve while all members with a weight are unresolved names.
    /// Otherwise empty. Ordered like members, with effective weights of their own.
    stand_ins: Box<[Member]>,
    /// The intervals of the stand-ins if there are any, else of the members.
    shares: Shares,
    /// The sequence of `weighted_round_robin`. All snapshots of a pool share it, so that a change of weights
    /// does not restart the spread.
    sequence: Arc<Sequence>,
    /// The Maglev table of the backends in `shares`. `None` unless the balance is `source_hash`.
    maglev: Option<Maglev>,
    /// The costs of the backends in `shares`. `None` unless the balance is `least_conn`.
    least_conn: Option<LeastConn>,
}

impl Snapshot {
    /// Makes a first snapshot of `table`. Backends that live already are taken from `registry`, with their
    /// health and counters.
    #[must_use]
    pub fn new(
        version: u64,
        origin: Origin,
        table: &Table,
        policy: impl Into<Policy>,
        registry: &Registry,
    ) -> Self {
        let (members, policy) = (known(table, registry), policy.into());
        Self::of(members, version, origin, &policy, Arc::default())
    }

    /// Makes the snapshot of `table` that follows this one.
    ///
    /// Backends that are new, or were not ready, begin their slow start if another backend can carry their
    /// part (`member.rs`).
    ///
    /// If all ready members with a weight are DNS names, and none of the names is resolved yet, the
    /// backends that this snapshot picks from stand in. So no session is lost when a backend is replaced
    /// by a name. Backends that `table` itself names do not stand in, since `table` may give them the
    /// weight 0.
    #[must_use]
    pub fn next(
        &self,
        origin: Origin,
        table: &Table,
        policy: impl Into<Policy>,
        registry: &Registry,
    ) -> Self {
        let is_first = origin != self.origin;
        self.next_or_first(origin, table, policy, registry, is_first)
    }

    /// As [`Snapshot::next`]. With `is_first`, the table is the first one that this process reads from its
    /// source. Its backends may have been in use for long, so no backend starts slowly.
    pub(in crate::balance) fn next_or_first(
        &self,
        origin: Origin,
        table: &Table,
        policy: impl Into<Policy>,
        registry: &Registry,
        is_first: bool,
    ) -> Self {
        let (members, policy) = (known(table, registry), policy.into());
        if !policy.slow_start.is_zero() && !is_first {
            begin_ramps(&self.members, &members, policy.slow_start, registry);
        }
        let mut next = Self::of(members, self.version + 1, origin, &policy, Arc::clone(&self.sequence));
        let waits_for_names = pickable(&next.members).is_empty()
            && next.members.iter().any(|member| member.wants_sessions() && !member.backend.is_reachable());
        if waits_for_names {
            let written = table.members();
            let is_written =
                |member: &Member| written.binary_search_by(|(id, _)| id.cmp(member.backend.id())).is_ok();
            // Also backends that are unusable now: they may recover before the names are resolved.
            let can_be = |m: &&Member| m.wants_sessions() && m.backend.is_reachable() && !is_written(m);
            let stand_in =
                |member: &Member| Member { state: table.state(member.backend.id()), ..member.clone() };
            let stand_ins = self.picked_from().iter().filter(can_be).map(stand_in).collect();
            next.pick_from_stand_ins(stand_ins, &policy);
        }
        next
    }

    fn pick_from_stand_ins(&mut self, mut stand_ins: Box<[Member]>, policy: &Policy) {
        let Weighed { fails_open, ramps } = weigh(&mut stand_ins, policy);
        stand_ins.sort_by_key(|member| member.effective_weight.is_zero());
        (self.fails_open, self.ramps) = (fails_open, ramps);
        (self.shares, self.maglev) = (shares(&stand_ins), maglev(&stand_ins, policy.balance));
        self.least_conn = least_conn(&stand_ins, policy.balance);
        self.stand_ins = stand_ins;
    }

    fn of(
        mut members: Box<[Member]>,
        version: u64,
        origin: Origin,
        policy: &Policy,
        sequence: Arc<Sequence>,
    ) -> Self {
        let Weighed { fails_open, ramps } = weigh(&mut members, policy);
        members.sort_by_key(|member| member.effective_weight.is_zero());
        let (shares, maglev) = (shares(&members), maglev(&members, policy.balance));
        let least_conn = least_conn(&members, policy.balance);
        Self {
            version,
            origin,
            fails_open,
            ramps,
            stand_ins: Box::default(),
            shares,
            sequence,
            maglev,
            least_conn,
            members,
        }
    }

    /// The backends that picks choose from, usable or not: the members, or their stand-ins.
    #[must_use]
    pub fn picked_from(&self) -> &[Member] {
        if self.stand_ins.is_empty() { &self.members } else { &self.stand_ins }
    }

    /// The next point of the even spread, for [`Snapshot::pick`].
    #[inline]
    #[must_use]
    pub fn next_point(&self) -> u64 {
        self.sequence.next()
    }

    /// The backend at `point`, without those in `tried`. `None`: none is left.
    #[inline]
    #[must_use]
    pub fn pick(&self, point: u64, tried: &[BackendId]) -> Option<&Member> {
        let members = self.picked_from();
        let index = if tried.is_empty() {
            self.shares.at(point)
        } else {
            self.shares.at_excluding(point, |i| tried.contains(members[i].backend.id()))
        };
        index.map(|i| &members[i])
    }

    /// The backend at `point`, without those for which `leaves_out` is true. Visits all of them. `None`:
    /// none is left.
    pub(in crate::balance) fn pick_where(
        &self,
        point: u64,
        leaves_out: impl Fn(&Member) -> bool,
    ) -> Option<&Member> {
        let members = self.picked_from();
        self.shares.at_excluding(point, |i| leaves_out(&members[i])).map(|i| &members[i])
    }

    /// The backends that may be picked.
    pub(in crate::balance) fn pickable(&self) -> &[Member] {
        pickable(self.picked_from())
    }

    /// The members and stand-ins that have a weight and are ready, healthy or not.
    pub(in crate::balance) fn in_use(&self) -> impl Iterator<Item = &Member> {
        self.members_and_stand_ins().filter(|member| member.wants_sessions())
    }

    /// Returns the backend with the fewest active sessions for its weight: of all backends, or in a large
    /// pool of some that `point` draws. Leaves out the backends in `tried`, and those that would refuse
    /// the session. If only these were found, returns the backend at `point` that is not in `tried`.
    /// `None`: all backends are in `tried`.
    #[inline]
    #[must_use]
    pub fn pick_least_busy(&self, point: u64, tried: &[BackendId]) -> Option<&Member> {
        let members = self.picked_from();
        let least = self.least_conn.as_ref().and_then(|all| all.pick(members, &self.shares, point, tried));
        least.map(|index| &members[index]).or_else(|| self.pick(point, tried))
    }

    /// Returns the backend of a client with this hash. If that backend is in `tried`, returns another one
    /// by weight, the same one each time. `None`: no backend is left.
    #[inline]
    #[must_use]
    pub fn pick_for(&self, client: u64, tried: &[BackendId]) -> Option<&Member> {
        let own = self.maglev.as_ref()?.at(client).map(|index| &self.picked_from()[index])?;
        if tried.contains(own.backend.id()) { self.pick(mix(client), tried) } else { Some(own) }
    }

    /// The members that have a weight, but are not ready, or are unhealthy, ejected or on trial while
    /// health counts. A ready name that is unresolved is not among them.
    pub fn unusable(&self) -> impl Iterator<Item = &Member> {
        let is_out =
            |member: &&Member| !member.wants_sessions() || !self.fails_open && !member.backend.is_usable();
        self.members.iter().filter(|member| !member.weight.is_zero()).filter(is_out)
    }

    /// All members of the table, also those with the weight 0.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The members, then the stand-ins.
    pub fn members_and_stand_ins(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().chain(&self.stand_ins)
    }
}

fn pickable(members: &[Member]) -> &[Member] {
    &members[..members.partition_point(|member| !member.effective_weight.is_zero())]
}

fn maglev(members: &[Member], balance: Balance) -> Option<Maglev> {
    let members = pickable(members).iter();
    let names = members.map(|member| (member.backend.id().as_str(), member.effective_weight.get()));
    (balance == Balance::SourceHash).then(|| Maglev::new(names))
}

fn least_conn(members: &[Member], balance: Balance) -> Option<LeastConn> {
    (balance == Balance::LeastConn).then(|| LeastConn::new(pickable(members)))
}

fn shares(members: &[Member]) -> Shares {
    let weights: Vec<f64> = pickable(members).iter().map(|member| member.effective_weight.get()).collect();
    Shares::new(&weights)
}

#[cfg(test)]
mod tests;
