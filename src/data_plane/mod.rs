//! The threads of the data plane.
//!
//! [`worker`] runs the sessions of one thread. [`listeners`] opens and closes the sockets that it accepts
//! from, as the supervisor commands. [`handover`] gives new connections to a worker that has far fewer
//! sessions.
//! `kept.rs` runs what a worker has beside its sessions.

pub mod handover;
mod kept;
pub mod listeners;
pub mod worker;
