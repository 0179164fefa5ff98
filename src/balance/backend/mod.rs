//! A backend and what is known of it: its sessions, its health, its addresses. All of it outlives snapshots.

#[expect(clippy::module_inception, reason = "the folder has the name of its main type")]
mod backend;
mod cause;
mod condition;
mod departed;
mod endpoint;
mod leaving;
pub(in crate::balance) mod places;

pub use backend::{Backend, Registry};
pub use cause::{Cause, LastCause};
pub use condition::{Condition, Ejection, Failure, Health, Probe, ProbeNumber, Reached};
pub use endpoint::{AddressNumber, Endpoint, ProbePermit, Route, Target};
pub use leaving::{Leavers, Leaving};
pub use places::Active;
