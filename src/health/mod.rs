//! Keeps the health of each backend up to date, in the control plane.
//!
//! [`active`] checks backends on a [`thread`] of its own: `check.rs` is one check, `verdict.rs` turns
//! results into health. [`passive`] ejects backends whose sessions fail. [`slow_start`] lets the weights of
//! returning backends grow. [`fail_open`] and [`usable`] log when a pool ignores health, refuses sessions or
//! has one backend left; `lines.rs` limits and formats the other log lines.
//!
//! Health is stored on the backend (`balance/backend/condition.rs`), and becomes weight with the next
//! snapshot (`balance/snapshot/snapshot.rs`).

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
