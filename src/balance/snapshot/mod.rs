//! A table made ready for picking: what each weight comes to, and the four ways to choose a backend by it.

mod least_conn;
mod maglev;
mod member;
mod sequence;
mod shares;
#[expect(clippy::module_inception, reason = "the folder has the name of its main type")]
mod snapshot;
mod usability;

pub(in crate::balance) use maglev::{client_hash, mix};
pub use member::{Member, TrialMode};
pub use snapshot::{Origin, Snapshot};
pub use usability::{Reason, Reasons, Refusal, Unusable, Usable};
