//! A pool's weights as an operator changes them: whole or not at all, with a version and a history.
//!
//! All changes of weights are made by one script (`weights.lua`), so that no other client ever sees half
//! of a change; states are changed by `states.lua`. Other programs may write a weights key too: the next
//! command notices their changes, and the history names them as such. `ledger.rs` runs the commands,
//! `answer.rs` reads what Redis answers, `refusal.rs` makes the messages for commands that fail.

mod answer;
mod ledger;
mod limits;
mod refusal;
mod states;

pub use crate::redis::fleet::applied::{LANDING, Report, Reports};
pub use crate::redis::fleet::content::ContentHash;
pub use crate::redis::fleet::unusable::{ReportedReason, UnusableReport};
pub use answer::{Change, Changes, Done, Entry, History, LeftOut, Seen};
pub use ledger::{Author, Ledger, Order};
pub use limits::{LONGEST_HISTORY, MOST_CHANGES};
pub use refusal::WeightsError;
