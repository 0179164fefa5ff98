//! Finds a backend that takes a session.

use crate::balance::backend::{Active, TrialPermit, TrialProgress};
use crate::balance::snapshot::{Member, Snapshot, TrialMode, mix};
use crate::balance::values::BackendId;

/// Draws before all backends are looked at. Where half of the weight is full, one pick in sixteen comes that far.
const REDRAWS: u32 = 3;

/// Why a backend that has weight takes no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::balance) enum Refusal {
    /// It has as many as it may have.
    Full,
    /// It was ejected, and has got the one session that shows whether it is back.
    OnTrial,
}

/// A place, and whether the session that has it is to show whether the backend is back.
pub(in crate::balance) type Taken = (Active, Option<TrialPermit>);

/// A place at `member`'s backend.
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
) -> Result<(&'a Member, Taken), Refusal> {
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
        member.backend.slots().is_full()
            || member.trial == TrialMode::Alone && member.backend.has_trial_session()
    };
    let is_tried = |member: &Member| tried.contains(member.backend.id());
    // The last one has just led to a backend that refused, so it is not as likely to lie anywhere.
    point = mix(mix(point));
    if let Some(member) = snapshot.pick_where(point, |member| refuses(member) || is_tried(member))
        && let Ok(place) = take(member)
    {
        return Ok((member, place));
    }
    let mut refusal = Refusal::OnTrial;
    for member in snapshot.pickable().iter().filter(|member| !is_tried(member)) {
        match take(member) {
            Ok(place) => return Ok((member, place)),
            Err(Refusal::Full) => refusal = Refusal::Full,
            Err(Refusal::OnTrial) => {}
        }
    }
    let probed = draw(point).filter(|_| refusal == Refusal::OnTrial).ok_or(refusal)?;
    Active::take(&probed.backend).map(|active| (probed, (active, None))).ok_or(Refusal::Full)
}
