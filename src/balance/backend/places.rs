//! A session's place at a backend: taken by the pick, given back when the session ends.
//!
//! Whatever may refuse a session though the backend has weight is asked here and nowhere else: `max_connections`, and the one
//! session that probes an ejected backend. Where nothing is limited, a place costs one atomic add. Where the first choice
//! refuses, others are drawn; a pick that says that all are full has asked each of them.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32,
    Ordering::{Relaxed, SeqCst},
};

use super::backend::Backend;
use super::condition::Probe;
use super::endpoint::ProbePermit;
use crate::balance::queue::Queue;
use crate::balance::snapshot::{Member, Probing, Snapshot, mix};
use crate::balance::values::BackendId;

/// Draws before all backends are looked at. Where half of the weight is full, one pick in sixteen comes that far.
const REDRAWS: u32 = 3;

/// One backend's places. Written at each session's begin and end, of all workers, so it shares no cache line with what is
/// read at each pick.
#[derive(Debug)]
#[repr(align(128))]
pub(in crate::balance) struct Places {
    active: AtomicU32,
    /// 0: any number.
    most: u32,
    /// Who waits for one: the pool's.
    queue: Arc<Queue>,
}

impl Places {
    pub(in crate::balance) fn new(most: u32, queue: Arc<Queue>) -> Self {
        Self { active: AtomicU32::new(0), most, queue }
    }

    #[inline]
    pub(in crate::balance) fn active(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// It may have only so many sessions.
    pub(in crate::balance) fn has_limit(&self) -> bool {
        self.most > 0
    }

    /// `None`: it has as many sessions as it may have.
    #[inline]
    pub(in crate::balance) fn active_unless_full(&self) -> Option<u32> {
        let active = self.active.load(Relaxed);
        (self.most == 0 || active < self.most).then_some(active)
    }

    pub(in crate::balance) fn is_full(&self) -> bool {
        self.most > 0 && self.active.load(SeqCst) >= self.most
    }
}

/// A session at a backend, counted as active from the pick to its end. Another backend is another one's.
#[derive(Debug)]
pub struct Active(Arc<Backend>);

impl Active {
    /// Takes a place. `None`: the backend has as many sessions as it may have.
    #[inline]
    #[must_use]
    pub fn take(backend: &Arc<Backend>) -> Option<Self> {
        let Places { active, most, .. } = backend.places();
        if *most == 0 {
            active.fetch_add(1, Relaxed);
        } else {
            let one_more = |active| (active < *most).then_some(active + 1);
            active.fetch_update(SeqCst, SeqCst, one_more).ok()?;
        }
        Some(Self(Arc::clone(backend)))
    }

    /// Where.
    #[must_use]
    pub fn backend(&self) -> &Arc<Backend> {
        &self.0
    }
}

impl Deref for Active {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.0
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let Places { active, most, queue } = self.0.places();
        if *most == 0 {
            active.fetch_sub(1, Relaxed);
        } else {
            queue.free(|| {
                active.fetch_sub(1, SeqCst);
            });
        }
    }
}

/// Why a backend that has weight takes no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::balance) enum Refusal {
    /// It has as many as it may have.
    Full,
    /// It was ejected, and has got the one session that shows whether it is back.
    Probed,
}

/// A place, and whether the session that has it is to show whether the backend is back.
pub(in crate::balance) type Place = (Active, Option<ProbePermit>);

/// A place at `member`'s backend.
#[inline]
pub(in crate::balance) fn take(member: &Member) -> Result<Place, Refusal> {
    let active = || Active::take(&member.backend).ok_or(Refusal::Full);
    if member.probing == Probing::No {
        return Ok((active()?, None));
    }
    let Some(permit) = member.backend.take_probe() else {
        return if member.probing == Probing::Alone { Err(Refusal::Probed) } else { Ok((active()?, None)) };
    };
    let active = active().inspect_err(|_| {
        member.backend.move_probe(permit, Probe::Wanted);
    })?;
    Ok((active, Some(permit)))
}

/// A place at another backend than the one that was chosen first, which refused: a few more are drawn by `draw`, then one by
/// weight from those that do not seem to refuse, and then each is asked. Only if no other takes it, and none of them because
/// it is full, does one get the session that has its probe already.
///
/// # Errors
/// `Full` after each backend was full at some moment of the call.
#[cold]
pub(in crate::balance) fn take_another<'a>(
    snapshot: &'a Snapshot,
    tried: &[BackendId],
    point: u64,
    draw: impl Fn(u64) -> Option<&'a Member>,
) -> Result<(&'a Member, Place), Refusal> {
    let mut point = point;
    for _ in 0..REDRAWS {
        // Twice, as in all versions: proxies of a fleet that mixes them lead a client of `source_hash` to the same backend.
        point = mix(mix(point));
        if let Some(member) = draw(point)
            && let Ok(place) = take(member)
        {
            return Ok((member, place));
        }
    }
    let refuses = |member: &Member| {
        member.backend.places().is_full() || member.probing == Probing::Alone && member.backend.is_probed()
    };
    let is_tried = |member: &Member| tried.contains(member.backend.id());
    // The last one has just led to a backend that refused, so it is not as likely to lie anywhere.
    point = mix(mix(point));
    if let Some(member) = snapshot.pick_where(point, |member| refuses(member) || is_tried(member))
        && let Ok(place) = take(member)
    {
        return Ok((member, place));
    }
    let mut refusal = Refusal::Probed;
    for member in snapshot.pickable().iter().filter(|member| !is_tried(member)) {
        match take(member) {
            Ok(place) => return Ok((member, place)),
            Err(Refusal::Full) => refusal = Refusal::Full,
            Err(Refusal::Probed) => {}
        }
    }
    let probed = draw(point).filter(|_| refusal == Refusal::Probed).ok_or(refusal)?;
    Active::take(&probed.backend).map(|active| (probed, (active, None))).ok_or(Refusal::Full)
}
