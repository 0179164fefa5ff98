//! The threads of the data plane: [`worker`] runs the sessions of one thread, [`listeners`] has the sockets
//! that it accepts from, as the supervisor commands, [`handover`] moves new connections from a busy worker
//! to one that has far fewer sessions.

pub mod handover;
pub mod listeners;
pub mod worker;
