//! Takes a slot for a session: at the chosen backend, or at another one if the chosen one refuses.
//!
//! A backend with weight refuses a session for only two reasons, and both are checked here: all its
//! `max_connections` slots are taken, or it is on trial and has its trial session. After a refusal other
//! backends are drawn. A pick that returns `Full` has asked each backend that the session had not tried.

use crate::balance::backend::{Active, TrialPermit, TrialProgress};
use crate::balance::snapshot::{Member, Snapshot, TrialMode, mix};
use crate::balance::values::BackendId;

/// The number of further draws before all backends are looked at. If half of the weight is full, one pick
/// in sixteen looks at all.
const REDRAWS: u32 = 3;

/// Why a backend with weight refuses a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::balance) enum Refusal {
    /// All slots of the backend are taken.
    Full,
    /// The backend is on trial and has its trial session.
    OnTrial,
}

/// A slot, and the permit of a trial session if the session is one.
pub(in crate::balance) type Taken = (Active, Option<TrialPermit>);

/// Takes a slot at the backend of `member`.
#[inline]
pub(in crate::balance) fn take(member: &Member) -> Result<Taken, Refusal> {
    let active = || Active::take(&member.backend).ok_or(Refusal::Full);
    if member.trial == TrialMode::No {
        return Ok((active()?, None));
    }
    let Some(permit) = member.backend.take_trial() else {
        return if member.trial == TrialMode::Alone { Err(Refusal::OnTrial) } else { Ok((active()?, None)) };
    };
    let active = active().inspect_err(|_| {
        member.backend.move_trial(permit, TrialProgress::Wanted);
    })?;
    Ok((active, Some(permit)))
}

/// Takes a slot at another backend, after the chosen one has refused. First `draw` draws a few backends.
/// Then one is drawn by weight among the backends that do not seem to refuse, and at last each backend is
/// asked. If all refuse and none of them is full, a backend on trial gets a second session.
///
/// # Errors `Full`: each backend refused at some moment of the call, and at least one of them was full.
/// `OnTrial`: all refused since they are on trial, and `draw` returned no backend.
#[cold]
pub(in crate::balance) fn take_another<'a>(
    snapshot: &'a Snapshot,
    tried: &[BackendId],
    point: u64,
    draw: impl Fn(u64) -> Option<&'a Member>,
) -> Result<(&'a Member, Taken), Refusal> {
    let mut point = point;
    for _ in 0..REDRAWS {
        // `mix` is applied twice, as in all versions of Statera: in a fleet with two versions, a client of
        // `source_hash` must get the same backend.
        point = mix(mix(point));
        if let Some(member) = draw(point)
            && let Ok(taken) = take(member)
        {
            return Ok((member, taken));
        }
    }
    let refuses = |member: &Member| {
        member.backend.slots().is_full()
            || member.trial == TrialMode::Alone && member.backend.has_trial_session()
    };
    let is_tried = |member: &Member| tried.contains(member.backend.id());
    // The last point has just led to a backend that refused, so it is not evenly distributed any more.
    point = mix(mix(point));
    if let Some(member) = snapshot.pick_where(point, |member| refuses(member) || is_tried(member))
        && let Ok(taken) = take(member)
    {
        return Ok((member, taken));
    }
    let mut refusal = Refusal::OnTrial;
    for member in snapshot.pickable().iter().filter(|member| !is_tried(member)) {
        match take(member) {
            Ok(taken) => return Ok((member, taken)),
            Err(Refusal::Full) => refusal = Refusal::Full,
            Err(Refusal::OnTrial) => {}
        }
    }
    let on_trial = draw(point).filter(|_| refusal == Refusal::OnTrial).ok_or(refusal)?;
    Active::take(&on_trial.backend).map(|active| (on_trial, (active, None))).ok_or(Refusal::Full)
}
