//! A table made ready for picking: what the weight of each backend comes to, and the four ways to choose a
//! backend by it.
//!
//! `member.rs` computes the effective weights, `snapshot.rs` builds the immutable snapshot. Each way to
//! choose has a file: `shares.rs` (`weighted_random`), `sequence.rs` (`weighted_round_robin`),
//! `least_conn.rs`, `maglev.rs` (`source_hash`).

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
