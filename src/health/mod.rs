//! Keeps what is known of each backend's health up to date, in the control plane.
//!
//! [`active`] asks backends whether they live (`check.rs` is one such question), on a [`thread`] of its own; [`passive`] ejects those that fail their
//! sessions, and [`slow_start`] and [`fail_open`] lets weights grow and says when health is ignored. What they find is kept on the backend
//! (`balance/backend/condition.rs`), and becomes weight with the next snapshot (`balance/snapshot/snapshot.rs`).

pub mod active;
mod check;
mod check_error;
pub mod fail_open;
mod lines;
pub mod passive;
pub mod slow_start;
pub mod thread;
pub mod usable;
mod verdict;
