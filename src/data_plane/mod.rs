//! The threads of the data plane.
//!
//! [`worker`] runs the sessions of one thread. [`listeners`] opens and closes the sockets that it accepts
//! from, as the supervisor commands. [`handover`] gives new connections to a worker that has far fewer
//! sessions.

pub mod handover;
pub mod listeners;
pub mod worker;
